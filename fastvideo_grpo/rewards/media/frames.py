"""Which frames of a sample a reward for pictures looks at."""

from __future__ import annotations

import torch

DEFAULT = "middle"


class Frames:
    """A choice of frames, the parameter `frames` of the rewards that score pictures; the chosen frames' scores are averaged.

    "first": frame 0. "middle": frame F // 2 of F. "uniform:N": the middle frames of N parts of equal length; all frames when
    there are no more than N. "all": every frame. An image, F = 1, is itself under every choice.

    One frame costs as much as an image and says nothing about the others: a model trained on it alone is free to neglect
    them. "uniform:N" costs N times as much.

    Raises ValueError, with the reward's `kind`, for anything else.
    """

    def __init__(self, choice: str, kind: str) -> None:
        self.choice = choice
        self.count: int | None = None
        if choice in ("first", "middle", "all"):
            return
        name, _, number = choice.partition(":") if isinstance(choice, str) else ("", "", "")
        if name != "uniform" or not (number.isascii() and number.isdigit()) or int(number) < 1:
            raise ValueError(
                f"{kind}: frames is {choice!r}; it must be first, middle, all, or uniform:N for N frames, at least 1 "
                "(uniform:4)"
            )
        self.count = int(number)

    def positions(self, frames: int) -> list[int]:
        """The chosen positions among `frames` frames, in order, each once."""
        if self.choice == "first":
            return [0]
        if self.choice == "middle":
            return [frames // 2]
        if self.count is None or self.count >= frames:
            return list(range(frames))
        return [(2 * part + 1) * frames // (2 * self.count) for part in range(self.count)]

    def of(self, media: torch.Tensor) -> torch.Tensor:
        """[B, F, H, W, 3] of any dtype -> [B, n, H, W, 3], on the same device."""
        return media[:, self.positions(media.shape[1])]
