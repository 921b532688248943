"""Recomputing, with the current weights, what the rollout did."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvideo_grpo.prompts.embeddings import Conditioning
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.sampling.transitions import Step

if TYPE_CHECKING:
    from fastvideo_grpo.trainers.base import GRPOTrainer


class TrajectoryReplay:
    """The :class:`~fastvideo_grpo.grpo.objectives.Replay` of a micro-batch of one prompt.

    Args:
        latents: float32 ``[B, T + 1, ...]`` on the CPU; only the states of one timestep at a time go to the device.
        timesteps: int64 ``[B, n]`` on the CPU.
        conditioning: the network's, ``[B, ...]``.
        prompt: what the rewards are told.
    """

    def __init__(
        self, trainer: GRPOTrainer, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, prompt: Prompt
    ) -> None:
        self.trainer = trainer
        self.latents = latents
        self.timesteps = timesteps
        self.conditioning = conditioning
        self.prompt = prompt

    def step(self, i: int) -> Step:
        """The stored transition of each row at its ``i``-th timestep under the current weights, with gradients."""
        index = self.timesteps[:, i]
        rows = torch.arange(len(index))
        device = self.trainer.world.device
        sample = self.latents[rows, index].to(device)
        next_sample = self.latents[rows, index + 1].to(device)
        level, next_level = self.trainer.schedule.at(index), self.trainer.schedule.at(index + 1)
        output = self.trainer.predict(sample, level, self.conditioning)
        return self.trainer.transition.step(output, sample, level, next_level, next_sample=next_sample)

    def reference(self, i: int) -> Step:
        """The same under the reference weights, without gradients."""
        with torch.no_grad(), self.trainer.reference_weights():
            return self.step(i)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels in [0, 1], with gradients."""
        return self.trainer.decode(latents, differentiable=True)

    def reward(self, pixels: Tensor) -> Tensor:
        """The weighted sum of the rewards of ``pixels`` ``[B, F, H, W, 3]``, ``[B]`` with gradients; not finite where one of
        them could not judge a row, which is counted and named as a failure of the rollout's scoring is."""
        rewards, count = self.trainer.rewards, len(pixels)
        scores = rewards.differentiable(pixels, [self.prompt.text] * count, [self.prompt.metadata] * count)
        total = torch.zeros(count, device=pixels.device)
        for name, weight in rewards.weights.items():
            if weight == 0:
                continue
            score = scores[name].to(total)
            unjudged = int((~score.isfinite()).sum())
            if unjudged:
                rewards.note([], f"reward {name}: no gradient: it could not judge a sample of an update", unjudged, count)
            total = total + weight * score
        return total
