"""Whole weights from a saved engine folder, without a process group and whatever engine, ZeRO stage and world size
wrote it."""

from __future__ import annotations

import math
import os
from pathlib import Path

from torch import Tensor

from fastvideo_grpo.engines.shards import EngineStateError, SavedTensors, read_engine_json


def weights_from_checkpoint(folder: str | os.PathLike[str], which: str = "model") -> dict[str, Tensor]:
    """The trainable weights of a saved engine folder.

    Args:
        folder: what `Engine.save` wrote, the folder with engine.json (for a run's checkpoint: 000100/state).
        which: "model", or "ema" for the exponential moving average.

    Returns:
        name -> float32 CPU tensor, names as in the module's `named_parameters()`. Frozen parameters are not in it.

    Raises:
        ValueError: `which` is something else.
        EngineStateError: the folder is not one, is damaged, or holds no EMA weights though they were asked for.
    """
    if which not in ("model", "ema"):
        raise ValueError(f"weights {which!r} are not known; allowed: model, ema")
    folder = Path(folder)
    description = read_engine_json(folder)
    if which == "ema" and description["ema_decay"] is None:
        raise EngineStateError(
            f"{folder} holds no EMA weights (optim.ema_decay was null); ask for 'model', or train with optim.ema_decay set"
        )
    saved = SavedTensors(folder, "weights" if which == "model" else "ema", description["world_size"])
    return {name: saved.read(name, 0, math.prod(shape)).view(shape) for name, shape in description["parameters"].items()}
