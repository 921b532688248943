"""Whole weights from a saved engine folder, without a process group and whatever engine, ZeRO stage and world size
wrote it."""

from __future__ import annotations

import math
import os
from pathlib import Path

from torch import Tensor

from fastvideo_grpo.engines.averages import CALLED
from fastvideo_grpo.engines.shards import EngineStateError, SavedTensors, read_engine_json

WEIGHTS = ("model", *CALLED)


def weights_from_checkpoint(folder: str | os.PathLike[str], which: str = "model") -> dict[str, Tensor]:
    """The trainable weights of a saved engine folder.

    Args:
        folder: what `Engine.save` wrote, the folder with engine.json (for a run's checkpoint: 000100/state).
        which: "model", "ema" for the exponential moving average, or "old" for the weights that drew the next samples.

    Returns:
        name -> float32 CPU tensor, names as in the module's `named_parameters()`. Frozen parameters are not in it.

    Raises:
        ValueError: `which` is something else.
        EngineStateError: the folder is not one, is damaged, or does not hold the weights that were asked for.
    """
    if which not in WEIGHTS:
        raise ValueError(f"weights {which!r} are not known; allowed: {', '.join(WEIGHTS)}")
    folder = Path(folder)
    description = read_engine_json(folder)
    if which != "model" and which not in description["averages"]:
        key = {"ema": "optim.ema_decay", "old": "grpo.old_weights"}[which]
        raise EngineStateError(
            f"{folder} holds no {CALLED[which]} ({key} was null); ask for 'model', or train with it set"
        )
    saved = SavedTensors(folder, "weights" if which == "model" else which, description["world_size"])
    return {name: saved.read(name, 0, math.prod(shape)).view(shape) for name, shape in description["parameters"].items()}
