"""Which timesteps an update trains on, step 5 of Algorithm 1 (``late`` is ReFL's, objectives/refl.py)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvideo_grpo.sampling.noise import SampleKey

STRATEGIES = ("random", "first", "last", "all", "late")


def count(steps: int, strategy: str, fraction: float) -> int:
    """Trained timesteps per sample: ``min(ceil(fraction * steps), steps - 1)``; the last transition has no density.
    With ``late`` it is 1.

    Raises:
        ValueError: an unknown strategy, a fraction outside (0, 1], or fewer than two steps.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown timestep strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    if not 0 < fraction <= 1:
        raise ValueError(f"the timestep fraction must be above 0 and at most 1; got {fraction}")
    if steps < 2:
        raise ValueError(f"training needs at least 2 steps, since the last transition is never trained; got {steps}")
    if strategy == "all":
        return steps - 1
    if strategy == "late":
        return 1
    return min(_ceil(fraction * steps), steps - 1)


def _ceil(number: float) -> int:
    # 0.6 * 15 is 9.000000000000002 in some roundings: the tolerance keeps it 9.
    return math.ceil(number - 1e-9)


def choose(keys: list[SampleKey], steps: int, strategy: str, fraction: float, per: str) -> Tensor:
    """The trained transitions of each sample, int64 ``[B, n]`` on the CPU.

    ``random`` draws without replacement from the ``steps - 1`` trainable ones, ``first`` are the noisiest, ``last`` the
    ones nearest data, ``late`` is one drawn from the last ``fraction`` of the trainable ones. ``per``: "sample" (each its own
    draw, as the released code) or "group" (one draw for the group, as Algorithm 1 is written).
    """
    n = count(steps, strategy, fraction)
    trainable = steps - 1
    if strategy == "first" or strategy == "all":
        return torch.arange(n).repeat(len(keys), 1)
    if strategy == "last":
        return torch.arange(trainable - n, trainable).repeat(len(keys), 1)
    if strategy == "late":
        earliest = trainable - _ceil(fraction * trainable)
        drawn = [key.generator("timesteps", shared=per == "group") for key in keys]
        return torch.stack([torch.from_numpy(draws.integers(earliest, trainable, (1,))) for draws in drawn])
    rows = [torch.from_numpy(key.generator("timesteps", shared=per == "group").permutation(trainable)[:n]) for key in keys]
    return torch.stack(rows)
