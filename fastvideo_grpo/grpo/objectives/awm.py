"""Advantage weighted matching, the policy gradient of the pretraining loss (AWM, arXiv:2509.25050)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvideo_grpo.grpo.objectives import terms
from fastvideo_grpo.grpo.objectives.base import AdvantageRange, CleanReplay, SampleBatch
from fastvideo_grpo.grpo.objectives.checked import one_of, positive_number
from fastvideo_grpo.grpo.objectives.trust_regions import ClipRange

WEIGHTINGS = ("uniform", "t", "ghuber")
TINY = 1e-10


class AWM:
    """``max(-A rho, -A clip(rho, 1 - eps, 1 + eps))`` with ``rho = exp(d - d_old)``: d stands for the log-density of a clean
    sample, at one noise and level the negative of what pretraining minimises there,

        ``uniform``: ``-m``, ``t``: ``-t m``, ``ghuber``: ``-((m + 1e-10)^p - 1e-10^p) t / p``, ``m = mean((u - (e - x))^2)``.

    ``d_old`` is that of the weights that drew the samples, at the same noise. Plus ``kl_weight mean((u - u_ref)^2)`` and
    ``ema_kl_weight mean((u - u_ema)^2)``.

    Args:
        clip_range: eps.
        advantage_range: advantages are clamped to - the first and the second before use (None: the first); None leaves them.
        kl_weight, ema_kl_weight: 0 asks for no reference, or average.
        weighting: of the levels, as above.
        power: p of ghuber.

    Raises:
        ValueError: an unknown weighting, or p is not a finite number above 0.
    """

    clean = True
    needs_reward_gradients = False
    pairs = False
    defaults: ClassVar[dict[str, Any]] = {
        "sample": {"init_noise": "per_sample", "stochastic": {"steps": "none"}},
        "grpo": {
            "timesteps": {"strategy": "random", "fraction": 0.42, "within": 0.8},
            "clip_range": 1.0,
            "advantage_clip": 1.0,
            "ema_kl_weight": 0.1,
        },
        "optim": {"ema_decay": 0.3, "ema_ramp": 0.001},
    }

    def __init__(
        self,
        *,
        clip_range: float,
        advantage_range: AdvantageRange,
        kl_weight: float,
        ema_kl_weight: float,
        weighting: str = "uniform",
        power: float = 0.25,
    ) -> None:
        self.weighting = one_of("weighting", weighting, WEIGHTINGS)
        self.power = positive_number("power", power)
        self.clip_range = ClipRange(clip_range, clip_range)
        self.advantage_range = advantage_range
        self.penalty = terms.Penalty(kl_weight, ema_kl_weight)
        self.needs_reference, self.stored = self.penalty.needs_reference, ("old", *self.penalty.stored)

    def loss(self, replay: CleanReplay, samples: SampleBatch, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Objective`; statistics: ``ratio``, ``clipped`` and, where they have weights, ``kl``, ``ema_kl``."""
        noised, velocity = replay.noised(i), replay.velocity(i)
        time, target = noised.time.flatten(), noised.target
        density = self.log_density(velocity, target, time)
        ratio = torch.exp(density - self.log_density(replay.stored("old", i), target, time))
        loss, clipped = self.clip_range.surrogate(ratio, terms.within(samples.advantages, *self.advantage_range))
        penalty, statistics = self.penalty.of_velocity(velocity, replay, i)
        return loss + penalty, {"ratio": ratio.detach(), "clipped": clipped, **statistics}

    def log_density(self, velocity: Tensor, target: Tensor, time: Tensor) -> Tensor:
        """d ``[B]`` of velocities ``[B, ...]`` at times ``[B]``."""
        error = terms.error(velocity, target)
        if self.weighting == "uniform":
            return -error
        if self.weighting == "t":
            return -time * error
        return -((error + TINY) ** self.power - TINY**self.power) * time / self.power
