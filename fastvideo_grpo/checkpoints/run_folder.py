"""Reading what a run left: its configuration and its newest, or a named, checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvideo_grpo.checkpoints.store import CheckpointStore
from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.engines.consolidate import weights_from_checkpoint
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models import run_config


@dataclass(frozen=True)
class RunCheckpoint:
    """A verified checkpoint of a run, and the configuration it was trained with."""

    folder: Path
    iteration: int
    config: Config

    def weights(self, which: str) -> dict[str, Tensor]:
        """Trained weights ("model", "ema" or "old"), float32, under the model's own names."""
        return weights_from_checkpoint(self.folder / "state", which)


def open_run(run: str | Path, iteration: int | None = None, overrides: list[str] | None = None) -> RunCheckpoint:
    """The newest whole checkpoint of a run folder, or that of ``iteration``.

    Raises:
        UserError: the folder is no run.
        CheckpointError: no whole checkpoint.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run folder: it has no config.yaml (a run.dir that `train` made is needed)")
    config = run_config.load(run / "config.yaml", overrides)
    store = CheckpointStore(run / "checkpoints", keep=1)
    folder = store.at(iteration) if iteration is not None else store.newest(required=True)
    assert folder is not None
    state: dict[str, Any] = store.load_trainer_json(folder)
    return RunCheckpoint(folder, int(state["iteration"]), config)
