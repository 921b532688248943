"""Which steps of a rollout draw noise; the others are those of the sampler's ODE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastvideo_grpo.sampling.noise import SampleKey, generator
from fastvideo_grpo.sampling.rollout import Span

CHOICES = ("all", "window", "one", "none")
MOVES = ("fixed", "progressive", "random")


@dataclass(frozen=True)
class StochasticSteps:
    """The stochastic steps of samples of ``steps`` transitions, of which the last is never trained.

    ``all``: each (the paper). ``window``: ``width`` of them, from ``start`` on, the same for all samples of an iteration
    (MixGRPO, Li et al. 2025, arXiv:2507.21802); ``fixed`` it stays there, ``progressive`` it moves on by ``stride`` every
    ``every`` iterations and begins at 0 again behind the last place, ``random`` each iteration draws a place. ``one``: a single
    one, drawn from the first ``fraction`` of the transitions (Flash-GRPO, arXiv:2605.15980), for each group or each sample.
    ``none``: the samples are those of the ODE.

    A place is a function of seed and iteration (``one``: of group, prompt and member, too), so that resuming needs no state.

    Raises:
        ValueError: the window does not fit; names what would.
    """

    steps: int
    choice: str = "all"
    width: int = 4
    start: int = 0
    moves: str = "fixed"
    stride: int = 1
    every: int = 25
    fraction: float = 0.5
    per: str = "group"

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise ValueError(f"unknown choice of stochastic steps {self.choice!r}; known: {', '.join(CHOICES)}")
        if self.choice != "window":
            return
        if self.width > self.steps - 1:
            raise ValueError(
                f"width is {self.width}, but of {self.steps} steps all but the last can be trained: use at most "
                f"{self.steps - 1}"
            )
        if self.start > self.steps - 1 - self.width:
            raise ValueError(
                f"start is {self.start}, where a window of {self.width} of {self.steps} steps would reach the last, which is "
                f"never trained: use at most {self.steps - 1 - self.width}"
            )

    @property
    def count(self) -> int:
        """Transitions of a sample that draw noise."""
        return {"all": self.steps, "window": self.width, "one": 1, "none": 0}[self.choice]

    @property
    def trainable(self) -> int:
        """Transitions of a sample that can be trained: stochastic ones, and not the last."""
        return min(self.count, self.steps - 1)

    @property
    def candidates(self) -> int:
        """The first transitions that ``one`` is drawn from."""
        return min(math.ceil(self.fraction * self.steps - 1e-9), self.steps - 1)

    def first(self, key: SampleKey) -> int:
        """The first stochastic transition of a sample."""
        if self.choice == "one":
            return int(key.generator("stochastic step", shared=self.per == "group").integers(self.candidates))
        if self.choice == "window":
            return self._window(key.seed, key.iteration)
        return 0

    def span(self, keys: Sequence[SampleKey]) -> Span:
        """The stochastic transitions of each sample."""
        return Span(torch.tensor([self.first(key) for key in keys]), self.count)

    def places(self, group_size: int, iterations: int) -> list[tuple[int, float]]:
        """(where the first stochastic transition of a group is in a run of so many iterations, how often)."""
        if self.choice == "one" and self.per == "sample":
            n = self.candidates
            beyond = [((n - k) / n) ** group_size for k in range(n + 1)]  # all samples are drawn at k or behind it
            return [(k, beyond[k] - beyond[k + 1]) for k in range(n)]
        if self.choice == "one":
            found = list(range(self.candidates))
        elif self.choice == "window" and self.moves == "random":
            found = self._windows()
        elif self.choice == "window":
            found = [self._window(0, iteration) for iteration in range(iterations)]
        else:
            found = [0]
        return [(place, found.count(place) / len(found)) for place in sorted(set(found))]

    def _windows(self) -> list[int]:
        """Where the window may be, in the order in which it is there."""
        there = self.steps - self.width
        if self.moves == "fixed":
            return [self.start]
        if self.moves == "random":
            return list(range(there))
        return [(self.start + self.stride * k) % there for k in range(there // math.gcd(self.stride, there))]

    def _window(self, seed: int, iteration: int) -> int:
        if self.moves == "random":
            return int(generator("window", seed, iteration).integers(self.steps - self.width))
        places = self._windows()
        return places[iteration // self.every % len(places)]
