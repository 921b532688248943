"""How weights follow the trained ones: the decay of each move of their average."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Decay:
    """How much of an average stays when it moves.

    ``bound``: the decay, or, with a ramp, what it rises to. ``ramp``: it is ``ramp`` times the number of moves made (None: the
    bound from the first on). ``delay``: moves before that with decay 0, in which the average is the weights themselves.

    Raises:
        ValueError: the bound is not between 0 (the weights themselves) and 1, exclusive.
    """

    bound: float
    ramp: float | None = None
    delay: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.bound < 1 or not math.isfinite(self.bound):
            raise ValueError(f"a decay of {self.bound} is no average; it must be at least 0 and below 1")

    def at(self, move: int) -> float:
        """The decay of the ``move``-th move, counted from 0."""
        if move < self.delay:
            return 0.0
        return self.bound if self.ramp is None else min(self.ramp * (move - self.delay), self.bound)
