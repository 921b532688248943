"""GRPO on a sampler's transitions, step 6 of Algorithm 1."""

from __future__ import annotations

from torch import Tensor

from fastvideo_grpo.grpo.objectives import terms
from fastvideo_grpo.grpo.objectives.base import AdvantageRange, Replay, SampleBatch
from fastvideo_grpo.grpo.objectives.trust_regions import TrustRegion


class GRPO:
    """``max(-A rho, -A clip(rho, 1 - eps, 1 + eps))``, the negative of step 6 of Algorithm 1, plus ``kl_weight`` KL to the
    starting weights and ``ema_kl_weight`` KL to the moving average.

    Args:
        trust_region: what stands for the ratio and its clipping (:mod:`~fastvideo_grpo.grpo.objectives.trust_regions`).
        advantage_range: advantages are clamped to - the first and the second before use (None: the first); None leaves them.
        kl_weight, ema_kl_weight: 0 asks for no reference, or average.
    """

    needs_reward_gradients = False
    pairs = False

    def __init__(
        self, *, trust_region: TrustRegion, advantage_range: AdvantageRange, kl_weight: float, ema_kl_weight: float
    ) -> None:
        self.trust_region = trust_region
        self.needs_old_means = trust_region.needs_old_means
        self.advantage_range = advantage_range
        self.penalty = terms.Penalty(kl_weight, ema_kl_weight)
        self.needs_reference, self.stored = self.penalty.needs_reference, self.penalty.stored

    def loss(self, replay: Replay, samples: SampleBatch, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Objective`; statistics: ``ratio``, ``clipped`` and, where they have weights, ``kl``, ``ema_kl``."""
        step = replay.step(i)
        advantages = terms.within(samples.advantages, *self.advantage_range)
        loss, statistics = self.trust_region.surrogate(step, replay, samples, i, advantages)
        penalty, of_penalty = self.penalty.of_step(step, replay, i)
        return loss + penalty, {**statistics, **of_penalty}
