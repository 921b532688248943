"""What ``fastvideo-grpo tiny`` has to know of a tiny checkpoint that it can write."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TinyCheckpoint:
    """How a model's tiny checkpoints are written.

    Attributes:
        writer: of a random one, as "module:function", imported when it is run and called with ``(folder, *, seed, overwrite)``.
        folder: where that goes, under runs/.
        pretraining: likewise of one that is trained, called with ``progress``, which takes lines, besides; None: there is none.
        pretrained_folder: where that goes, under runs/.
        pretrained_on: what it is trained on, and how long on one CPU core.
        layouts: forms in which the model is published, the default first.
        layout_argument: the writer's argument for them.
        layout_help: what they are.
    """

    writer: str
    folder: str
    pretraining: str | None = None
    pretrained_folder: str | None = None
    pretrained_on: str = ""
    layouts: tuple[str, ...] = ()
    layout_argument: str = "layout"
    layout_help: str = ""
