"""Means over seeds, differences paired by seed, and what they say of a claim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

ERRORS = 2.0
"""Standard errors that a difference must have to count."""


NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds and its standard error (None for one seed; ``mean`` None for none)."""

    mean: float | None
    error: float | None
    n: int

    def __str__(self) -> str:
        if self.mean is None:
            return "none"
        return f"{self.mean:.3f}" + (f" ± {self.error:.3f}" if self.error is not None else "")


def estimate(values: Sequence[float | None]) -> Estimate:
    """Mean and standard error (unbiased standard deviation over the root of n) of the values that are there."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return Estimate(None, None, 0)
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)
    return Estimate(mean, math.sqrt(variance / len(known)), len(known))


def difference(first: Mapping[int, float | None], second: Mapping[int, float | None]) -> Estimate:
    """First minus second, seed by seed: runs of one seed share prompt order and noise, so what they share drops out.

    Args:
        first, second: seed -> value; seeds that one of them lacks are left out.
    """
    pairs = [(first[seed], second[seed]) for seed in sorted(first) if seed in second]
    return estimate([None if a is None or b is None else a - b for a, b in pairs])


def verdict(relation: str, found: Estimate) -> str:
    """What a difference says of the claim ``first RELATION second``.

    ">": "shown" if it is at least :data:`ERRORS` standard errors above 0, "contradicted" if as far below, else "not shown".
    "=": "not told apart" if it is within them, else "contradicted". "not measured" where fewer than two seeds have both.

    Raises:
        ValueError: another relation.
    """
    if relation not in (">", "="):
        raise ValueError(f"a comparison's relation is {relation!r}; it must be > or =")
    if found.mean is None or found.error is None:
        return NOT_MEASURED
    far = found.mean != 0 and abs(found.mean) >= ERRORS * found.error
    if relation == "=":
        return "contradicted" if far else "not told apart"
    if not far:
        return "not shown"
    return "shown" if found.mean > 0 else "contradicted"


def agrees(found: str) -> bool:
    """Whether a verdict is what the paper claims."""
    return found in ("shown", "not told apart")


def overall(verdicts: Sequence[str]) -> str:
    """The verdict on a study of several comparisons."""
    if not verdicts or all(v == NOT_MEASURED for v in verdicts):
        return NOT_MEASURED
    if all(agrees(v) for v in verdicts):
        return "agrees"
    if "contradicted" in verdicts:
        return "contradicts" if not any(agrees(v) for v in verdicts) else "agrees in part, contradicts in part"
    return "agrees in part" if any(agrees(v) for v in verdicts) else "does not show it"


def chance(seeds: int) -> float:
    """How often a difference of :data:`ERRORS` standard errors comes about where there is none: two-sided, of Student's t
    with ``seeds`` - 1 degrees of freedom (0.18 for three seeds, 0.05 for many)."""
    degrees = seeds - 1
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    steps = 1000  # Simpson's rule over 0 to ERRORS
    width = ERRORS / steps
    density = [(1 + (i * width) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(steps + 1)]
    inside = width / 3 * (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2]))
    return 1 - 2 * scale * inside


def area(points: Sequence[tuple[float, float | None]]) -> float | None:
    """Mean height of a curve over its width (trapezoids): how fast was learned, whatever the end. None for gaps."""
    known = [(x, height) for x, height in points if height is not None]
    if len(points) < 2 or len(known) < len(points):
        return None
    total = math.fsum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(known))
    return total / (known[-1][0] - known[0][0])


def reached(points: Sequence[tuple[float, float | None]], height: float) -> float | None:
    """Where a curve first is at ``height``, on straight lines between its points; None where it never is, or after a gap."""
    before: tuple[float, float] | None = None
    for x, y in points:
        if y is None:
            return None
        if y >= height:
            if before is None:
                return x
            return before[0] + (x - before[0]) * (height - before[1]) / (y - before[1])
        before = x, y
    return None
