"""Weights & Biases, on rank 0 only."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any, Literal, cast

from fastvideo_grpo.durable_files import write_atomic


class WandbRun:
    """A wandb run that a resumed training continues; with mode ``disabled`` nothing is imported and every call is a no-op.

    Args:
        mode: ``disabled``, ``offline`` (written under the run folder, uploaded with ``wandb sync``) or ``online``.
        folder: the run's folder; the wandb id is kept in ``wandb.json`` there.
    """

    def __init__(self, mode: str, folder: Path, config: dict[str, Any]) -> None:
        self._run: Any = None
        if mode == "disabled":
            return
        import wandb

        self._wandb = wandb
        known = folder / "wandb.json"
        identity = json.loads(known.read_text())["id"] if known.is_file() else secrets.token_hex(4)
        self._run = wandb.init(
            project="fastvideo_grpo",
            name=folder.name,
            id=identity,
            resume="allow",
            mode=cast(Literal["offline", "online"], mode),
            dir=folder,
            config=config,
        )
        write_atomic(known, json.dumps({"id": identity}).encode())

    def log(self, metrics: dict[str, Any]) -> None:
        """Log the metrics of an iteration, under its number."""
        if self._run is not None:
            numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
            self._run.log(numbers, step=metrics["iteration"])

    def log_pictures(self, iteration: int, files: list[Path], captions: list[str]) -> None:
        """Log captioned pictures, or clips (files that end in ``.mp4``), under an iteration."""
        if self._run is not None:
            # By path: from arrays wandb would encode clips itself, with a library that this project does not need.
            samples = [
                self._wandb.Video(str(file), caption=text, format="mp4")
                if file.suffix == ".mp4"
                else self._wandb.Image(str(file), caption=text)
                for file, text in zip(files, captions, strict=True)
            ]
            self._run.log({"samples": samples}, step=iteration)

    def finish(self) -> None:
        """Flush and close."""
        if self._run is not None:
            self._run.finish()
