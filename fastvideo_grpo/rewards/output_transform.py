"""What becomes of a reward's raw score before it counts: the keys beside ``weight`` of an output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OutputTransform:
    """Applied in this order, each where it is given:

    affine: (a, b): score -> a * score + b.
    clamp: (low, high): what is beyond is brought to them.
    threshold: 1 above it, else 0 (a binary reward).
    invert: score -> -score, for an output of which less is better.

    Raises ValueError, naming the key, for a number that is not finite and limits in the wrong order.
    """

    affine: tuple[float, float] | None = None
    clamp: tuple[float, float] | None = None
    threshold: float | None = None
    invert: bool = False

    def __post_init__(self) -> None:
        for name in ("affine", "clamp"):
            pair = getattr(self, name)
            if pair is not None and (len(pair) != 2 or not all(_is_finite(value) for value in pair)):
                raise ValueError(f"{name} is {list(pair)}; it must be two finite numbers")
        if self.affine is not None and self.affine[0] == 0:
            raise ValueError(
                f"affine is {list(self.affine)}, which makes all scores equal; weight=0 only watches an output"
            )
        if self.clamp is not None and self.clamp[0] >= self.clamp[1]:
            raise ValueError(f"clamp is {list(self.clamp)}; it must be [low, high] with low below high")
        if self.threshold is not None and not _is_finite(self.threshold):
            raise ValueError(f"threshold is {self.threshold!r}; it must be a finite number")

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """float32 of any shape; NaN stays NaN."""
        if self.affine is not None:
            scores = scores * self.affine[0] + self.affine[1]
        if self.clamp is not None:
            scores = scores.clamp(*self.clamp)
        if self.threshold is not None:
            scores = torch.where(scores.isnan(), scores, (scores > self.threshold).to(scores.dtype))
        return -scores if self.invert else scores.clone()


def _is_finite(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
