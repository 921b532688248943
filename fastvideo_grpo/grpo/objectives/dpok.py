"""DPOK, the policy gradient regularised by the KL to the pretrained model (Fan et al. 2023, arXiv:2305.16381)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastvideo_grpo.grpo.objectives import terms
from fastvideo_grpo.grpo.objectives.base import AdvantageRange, Replay, SampleBatch
from fastvideo_grpo.grpo.objectives.trust_regions import TrustRegion


class DPOK:
    """``max(-A rho, -A clip(rho)) + kl_weight KL(policy || pretrained)``, the KL of each transition in closed form.

    The paper subtracts a baseline from the reward, a value network that learns the mean reward of a state. Here rewards are
    normalised over the iteration (``grpo.normalisation=global``): a baseline that is the same for all states, and no
    network to learn. Several updates of one rollout take importance weights, clipped as DDPO's.

    Args:
        trust_region: what stands for the ratio and its clipping (:mod:`~fastvideo_grpo.grpo.objectives.trust_regions`).
        advantage_range: advantages are clamped to - the first and the second before use (None: the first); None leaves them.
        kl_weight: above 0.
        ema_kl_weight: of the KL to the moving average; 0 asks for none.

    Raises:
        ValueError: without a KL it is DDPO.
    """

    needs_reference = True
    needs_reward_gradients = False
    pairs = False
    defaults: ClassVar[dict[str, Any]] = {
        "sample": {"init_noise": "per_sample"},
        "grpo": {"normalisation": "global", "kl_weight": 0.01},
    }

    def __init__(
        self, *, trust_region: TrustRegion, advantage_range: AdvantageRange, kl_weight: float, ema_kl_weight: float
    ) -> None:
        if kl_weight <= 0:
            raise ValueError(
                f"grpo.kl_weight is {kl_weight:g}, but objective dpok is regularised by it: set it above 0, for example 0.01, "
                "or take grpo.objective=ddpo"
            )
        self.trust_region = trust_region
        self.needs_old_means = trust_region.needs_old_means
        self.advantage_range = advantage_range
        self.penalty = terms.Penalty(kl_weight, ema_kl_weight)
        self.stored = self.penalty.stored

    def loss(self, replay: Replay, samples: SampleBatch, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Objective`; statistics: ``ratio``, ``clipped``, ``kl`` and, where it has a weight,
        ``ema_kl``."""
        step = replay.step(i)
        advantages = terms.within(samples.advantages, *self.advantage_range)
        surrogate, statistics = self.trust_region.surrogate(step, replay, samples, i, advantages)
        penalty, of_penalty = self.penalty.of_step(step, replay, i)
        return surrogate + penalty, {**statistics, **of_penalty}
