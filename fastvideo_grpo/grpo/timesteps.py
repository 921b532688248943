"""Which timesteps an update trains on, step 5 of Algorithm 1 (``late`` is ReFL's, objectives/refl.py)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvideo_grpo.sampling.noise import SampleKey
from fastvideo_grpo.sampling.rollout import Span

STRATEGIES = ("random", "first", "last", "all", "late")
LEVELS = ("sampler", "uniform", "logit_normal")
"""Where noise is added to clean samples: at the sampler's levels, or at drawn times."""

_EARLIEST = 1e-4
"""Of drawn times: nearer to the data there is no noise to speak of."""


def count(steps: int, strategy: str, fraction: float, trainable: int | None = None) -> int:
    """Trained timesteps per sample: ``min(ceil(fraction * steps), steps - 1)``; the last transition has no density (where every
    step is trainable, on clean samples, ``steps`` at most). With ``all`` it is all that are trainable, with ``late`` 1.

    Args:
        trainable: transitions that can be trained (default: all but the last).

    Raises:
        ValueError: an unknown strategy, a fraction outside (0, 1], fewer than two steps, or more timesteps than can be trained.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown timestep strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    if not 0 < fraction <= 1:
        raise ValueError(f"the timestep fraction must be above 0 and at most 1; got {fraction}")
    if steps < 2:
        raise ValueError(f"training needs at least 2 steps, since the last transition is never trained; got {steps}")
    trainable = steps - 1 if trainable is None else trainable
    if strategy == "all":
        return trainable
    if strategy == "late":
        return 1
    wanted = min(_ceil(fraction * steps), max(steps - 1, trainable))
    if wanted > trainable:
        raise ValueError(
            f"fraction {fraction:g} of {steps} steps is {wanted} trained timesteps, but only {trainable} can be trained: use "
            f"strategy=all (with fraction=1.0), or a fraction of at most {trainable / steps:.3g}"
        )
    return wanted


def within(trainable: int, share: float) -> int:
    """How many of the trainable timesteps are left of the first ``share`` of them, at least 1."""
    return max(1, _ceil(share * trainable))


def times(
    keys: list[SampleKey], count: int, levels: str, per: str, *, within: float, mean: float, std: float, shift: float
) -> Tensor:
    """Drawn times in (0, 1], 1 noise: float32 ``[B, count]`` on the CPU.

    ``uniform``: t uniform; ``logit_normal``: ``logit(t)`` normal with ``mean`` and ``std`` (Esser et al. 2024,
    arXiv:2403.03206). Then ``shift t / (1 + (shift - 1) t)``. ``within``: of that distribution the part above ``1 - within``.

    Raises:
        ValueError: another kind of levels.
    """
    if levels not in LEVELS[1:]:
        raise ValueError(f"levels {levels!r} are not drawn; those that are: {', '.join(LEVELS[1:])}")
    drawn = torch.stack([torch.from_numpy(key.generator("levels", shared=per == "group").random(count)) for key in keys])
    lowest = torch.tensor(1 - within, dtype=torch.float64)
    lowest = lowest / (shift - (shift - 1) * lowest)  # before the shift
    if levels == "uniform":
        t = lowest + (1 - lowest) * drawn
    else:
        below = torch.special.ndtr((torch.logit(lowest) - mean) / std)
        t = torch.sigmoid(mean + std * torch.special.ndtri(below + (1 - below) * drawn))
    return (shift * t / (1 + (shift - 1) * t)).clamp(_EARLIEST, 1).float()


def kept(steps: int, strategy: str, fraction: float, trainable: int | None = None) -> tuple[int, int]:
    """(first, how many) of the trainable transitions of a sample, which ``choose`` may take: a rollout keeps no others."""
    trainable = steps - 1 if trainable is None else trainable
    n = count(steps, strategy, fraction, trainable)
    if strategy == "first":
        return 0, n
    if strategy == "last":
        return trainable - n, n
    if strategy == "late":
        earliest = _earliest(trainable, fraction)
        return earliest, trainable - earliest
    return 0, trainable


def _ceil(number: float) -> int:
    # 0.6 * 15 is 9.000000000000002 in some roundings: the tolerance keeps it 9.
    return math.ceil(number - 1e-9)


def _earliest(trainable: int, fraction: float) -> int:
    return trainable - _ceil(fraction * trainable)


def choose(
    keys: list[SampleKey], steps: int, strategy: str, fraction: float, per: str, trainable: Span | None = None
) -> Tensor:
    """The trained transitions of each sample, int64 ``[B, n]`` on the CPU.

    ``random`` draws without replacement from the trainable ones, ``first`` are the noisiest, ``last`` the ones nearest data,
    ``late`` is one drawn from the last ``fraction`` of the trainable ones. ``per``: "sample" (each its own draw, as the
    released code) or "group" (one draw for the group, as Algorithm 1 is written).

    Args:
        trainable: of each sample (default: all but the last).
    """
    trainable = Span.of(len(keys), 0, steps - 1) if trainable is None else trainable
    n = count(steps, strategy, fraction, trainable.count)
    first, among = trainable.first.unsqueeze(1), trainable.count
    if strategy == "first" or strategy == "all":
        return first + torch.arange(n)
    if strategy == "last":
        return first + torch.arange(among - n, among)
    drawn = [key.generator("timesteps", shared=per == "group") for key in keys]
    if strategy == "late":
        rows = [torch.from_numpy(draws.integers(_earliest(among, fraction), among, (1,))) for draws in drawn]
    else:
        rows = [torch.from_numpy(draws.permutation(among)[:n]) for draws in drawn]
    return first + torch.stack(rows)
