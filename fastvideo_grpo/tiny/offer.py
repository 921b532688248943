"""What ``fastvideo-grpo tiny`` has to know of a model's tiny checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TinyOffer:
    """How they are written.

    Attributes:
        writer: of a random one, as "module:function", imported when it is run and called with ``(folder, *, seed, overwrite)``.
        folder: where that goes, under runs/.
        pretraining: likewise of one that is trained, called with ``progress``, which takes lines, besides; None: there is none.
        pretrained_folder: where that goes, under runs/.
        pretrained_on: what it is trained on, and how long on one CPU core.
        layouts: form in which the model is published, the default first -> what it is.
        layout_argument: the writer's argument for them.
    """

    writer: str
    folder: str
    pretraining: str | None = None
    pretrained_folder: str | None = None
    pretrained_on: str = ""
    layouts: Mapping[str, str] = field(default_factory=dict)
    layout_argument: str = "layout"
