"""Solving a sampler's ODE in fewer steps than the schedule has."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fastvideo_grpo.sampling.schedules import Schedule


def fewer_levels(begin: int, steps: int, fraction: float) -> tuple[int, ...]:
    """Levels of a schedule of ``steps`` that lead from level ``begin`` to the data in ``ceil(fraction (steps - begin))`` steps,
    as evenly as levels lie: indices from ``begin`` to ``steps``."""
    remaining = steps - begin
    # 0.4 * 5 is 2.0000000000000004 in some roundings.
    count = math.ceil(fraction * remaining - 1e-9)
    return (*(begin + round(k * remaining / count) for k in range(count)), steps)


class DPMSolver:
    """DPM-Solver++ of second order, multistep, in its midpoint form (Lu et al. 2022, arXiv:2211.01095): diffusers'
    ``DPMSolverMultistepScheduler`` with ``solver_type="midpoint"``.

    From level s to t, with ``lambda = log(alpha / sigma)``, ``h = lambda_t - lambda_s`` and the clean samples x_s that the
    network predicts at s and x_r at the level r before:

        ``z_t = sigma_t / sigma_s z_s + alpha_t (1 - exp(-h)) (x_s + (x_s - x_r) h / (2 (lambda_s - lambda_r)))``

    Without a level before, and to sigma 0, it is the step of first order, without the difference.

    Args:
        levels: indices of the schedule's levels that it goes through, from noise to data.
    """

    def __init__(self, schedule: Schedule, levels: Sequence[int]) -> None:
        self.levels = tuple(levels)
        # The first alpha of a flow is 0 to rounding only, and its logarithm would be anything.
        self._alpha = [max(0.0, float(schedule.alpha[i])) for i in self.levels]
        self._sigma = [float(schedule.sigma[i]) for i in self.levels]

    def coefficients(self, k: int) -> tuple[float, float, float]:
        """``(a, b, c)`` of its step from level k to k + 1, ``z = a z + b x_k + c x_(k-1)``."""
        alpha, sigma = self._alpha, self._sigma
        keep = sigma[k + 1] / sigma[k]
        gain = alpha[k + 1] - keep * alpha[k]  # alpha_t (1 - exp(-h))
        if k == 0 or sigma[k + 1] == 0 or alpha[k - 1] == 0:
            return keep, gain, 0.0
        before, here, there = (math.log(alpha[j] / sigma[j]) for j in (k - 1, k, k + 1))
        further = 0.5 * gain * (there - here) / (here - before)
        return keep, gain + further, -further

    def step(self, k: int, sample: Tensor, denoised: Tensor, before: Tensor | None) -> Tensor:
        """The sample at level k + 1.

        Args:
            sample: that at level k.
            denoised: the clean sample predicted at level k; ``before``: at level k - 1.
        """
        keep, here, there = self.coefficients(k)
        moved = keep * sample + here * denoised
        return moved if there == 0 or before is None else moved + there * before
