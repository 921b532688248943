"""ReFL, the gradient of a reward through a late step (Xu et al. 2023, ImageReward, arXiv:2304.05977)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvideo_grpo.grpo.objectives import terms
from fastvideo_grpo.grpo.objectives.base import Replay, SampleBatch


class ReFL:
    """``-r(decode(x_hat))``: x_hat is the clean sample as the network predicts it at a stored state of the trajectory.

    The gradient goes through the reward, the VAE's decoder and one pass of the network; the states before are data, and
    advantages are not used. Which state: ``grpo.timesteps.strategy=late``.

    The paper's loss is ``relu(2 - r)`` of ImageReward's standardised score. It has the gradient of ``-r`` up to a reward of 2
    and none above; ``rewards.models.NAME.outputs.OUTPUT.clamp`` says where a reward of any other scale shall stop.
    """

    needs_reference = False
    needs_reward_gradients = True
    pairs = False
    needs_density = False
    defaults: ClassVar[dict[str, Any]] = {
        "sample": {"init_noise": "per_sample"},
        "grpo": {"timesteps": {"strategy": "late", "fraction": 0.25}},
    }

    def loss(self, replay: Replay, samples: SampleBatch, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Objective`; statistics: ``unjudged`` (1 for a row whose x_hat a reward could not judge, which has loss 0
        and no gradient) and, where there is a density, ``ratio``."""
        step = replay.step(i)
        pixels = replay.decode(step.denoised)
        reward = replay.reward(pixels)
        judged = reward.isfinite()
        if pixels.requires_grad:
            # Inside a reward, a gradient of 0 times NaN is NaN: what comes out for such a row is no gradient.
            rows = judged.view(-1, *([1] * (pixels.ndim - 1)))
            pixels.register_hook(lambda gradient: torch.where(rows, gradient, 0.0))
        # What has no reward is 0 times the pixels, so that a batch of nothing else goes backwards, too, as on other processes.
        nothing = 0.0 * torch.nan_to_num(pixels).flatten(1).sum(1)
        loss = torch.where(judged, -torch.where(judged, reward, 0.0), nothing)
        return loss, {"unjudged": (~judged).float(), **terms.ratio(step, samples, i)}
