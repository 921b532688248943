"""GRPO on a sampler's transitions, step 6 of Algorithm 1."""

from __future__ import annotations

from torch import Tensor

from fastvideo_grpo.grpo.objectives import terms
from fastvideo_grpo.grpo.objectives.base import Replay, SampleBatch


class GRPO:
    """``max(-A rho, -A clip(rho, 1 - eps, 1 + eps))``, the negative of step 6 of Algorithm 1, plus ``kl_weight`` KL.

    Args:
        clip_range: eps.
        advantage_clip: advantages are clamped to +- this before use; None leaves them.
        kl_weight: of the KL to the starting weights; 0 asks for no reference.
    """

    needs_reward_gradients = False
    pairs = False

    def __init__(self, *, clip_range: float, advantage_clip: float | None, kl_weight: float) -> None:
        self.clip_range = clip_range
        self.advantage_clip = advantage_clip
        self.kl_weight = kl_weight
        self.needs_reference = kl_weight > 0

    def loss(self, replay: Replay, samples: SampleBatch, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Objective`; statistics: ``ratio``, ``clipped`` and, with a KL weight, ``kl``."""
        step = replay.step(i)
        loss, statistics = terms.clipped_surrogate(
            step, samples, i, clip_range=self.clip_range, advantage_clip=self.advantage_clip
        )
        if self.needs_reference:
            kl = terms.kl(step, replay.reference(i))
            loss = loss + self.kl_weight * kl
            statistics["kl"] = kl.detach()
        return loss, statistics
