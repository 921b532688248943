"""DDPO, the policy gradient with importance weights (Black et al. 2023, arXiv:2305.13301)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastvideo_grpo.grpo.objectives import terms
from fastvideo_grpo.grpo.objectives.base import Replay, SampleBatch


class DDPO:
    """``max(-A rho, -A clip(rho, 1 - eps, 1 + eps))``: the paper's DDPO-IS with its clipping.

    That is GRPO's loss without KL. The methods differ in what surrounds it, which are keys of their own: DDPO normalises
    rewards with the running statistics of each prompt (``grpo.normalisation=prompt_history``) in place of those of the
    group, and every sample has initial noise of its own (``sample.init_noise=per_sample``).

    Args:
        clip_range: eps.
        advantage_clip: advantages are clamped to +- this before use; None leaves them.
    """

    needs_reference = False
    needs_reward_gradients = False
    pairs = False
    defaults: ClassVar[dict[str, Any]] = {"sample": {"init_noise": "per_sample"}, "grpo": {"normalisation": "prompt_history"}}

    def __init__(self, *, clip_range: float, advantage_clip: float | None) -> None:
        self.clip_range = clip_range
        self.advantage_clip = advantage_clip

    def loss(self, replay: Replay, samples: SampleBatch, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Objective`; statistics: ``ratio``, ``clipped``."""
        return terms.clipped_surrogate(
            replay.step(i), samples, i, clip_range=self.clip_range, advantage_clip=self.advantage_clip
        )
