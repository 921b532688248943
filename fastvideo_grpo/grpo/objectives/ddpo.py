"""DDPO, the policy gradient with importance weights (Black et al. 2023, arXiv:2305.13301)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastvideo_grpo.grpo.objectives import terms
from fastvideo_grpo.grpo.objectives.base import AdvantageRange, Replay, SampleBatch
from fastvideo_grpo.grpo.objectives.trust_regions import TrustRegion


class DDPO:
    """``max(-A rho, -A clip(rho, 1 - eps, 1 + eps))``: the paper's DDPO-IS with its clipping.

    That is GRPO's loss without KL. The methods differ in what surrounds it, which are keys of their own: DDPO normalises
    rewards with the running statistics of each prompt (``grpo.normalisation=prompt_history``) in place of those of the
    group, and every sample has initial noise of its own (``sample.init_noise=per_sample``).

    Args:
        trust_region: what stands for the ratio and its clipping (:mod:`~fastvideo_grpo.grpo.objectives.trust_regions`).
        advantage_range: advantages are clamped to - the first and the second before use (None: the first); None leaves them.
    """

    needs_reference = False
    needs_reward_gradients = False
    pairs = False
    defaults: ClassVar[dict[str, Any]] = {"sample": {"init_noise": "per_sample"}, "grpo": {"normalisation": "prompt_history"}}

    def __init__(self, *, trust_region: TrustRegion, advantage_range: AdvantageRange) -> None:
        self.trust_region = trust_region
        self.needs_old_means = trust_region.needs_old_means
        self.advantage_range = advantage_range

    def loss(self, replay: Replay, samples: SampleBatch, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Objective`; statistics: ``ratio``, ``clipped``."""
        advantages = terms.within(samples.advantages, *self.advantage_range)
        return self.trust_region.surrogate(replay.step(i), replay, samples, i, advantages)
