"""What rewards on networks for pictures have in common: of a video they score the chosen frames, and the score is the mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from fastvideo_grpo.rewards.base import MediaKind, RewardRequest, RewardResult
from fastvideo_grpo.rewards.media.frames import Frames
from fastvideo_grpo.rewards.models.network_parameters import check_batch_size


class PictureReward(ABC):
    """Base of rewards with one output, the mean of what the chosen frames are given, which has a gradient.

    outputs: the name of the one output, which is the reward's kind. factor: what the mean is multiplied by. batch_size: frames
    that go through the network together. frames: see `Frames`.

    Raises ValueError for a batch size that is no whole number above 0, and for an unknown choice of frames.
    """

    media_kind: MediaKind = "any"
    outputs: tuple[str, ...]
    factor: float = 1.0

    def __init__(self, batch_size: int, frames: str) -> None:
        (kind,) = self.outputs
        check_batch_size(kind, batch_size)
        self.batch_size = batch_size
        self.frames = Frames(frames, kind)

    @torch.no_grad()
    def score(self, request: RewardRequest) -> RewardResult:
        """See `Reward`."""
        scores = self.factor * self.frame_scores(request.prompts, self.frames.of(request.media)).mean(dim=1)
        return RewardResult({self.outputs[0]: scores.cpu()}, torch.ones(len(request), dtype=torch.bool))

    def score_differentiably(
        self, pixels: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """See `DifferentiableReward`."""
        scores = self.differentiable_frame_scores(prompts, self.frames.of(pixels))
        return {self.outputs[0]: self.factor * scores.mean(dim=1)}

    @abstractmethod
    def frame_scores(self, prompts: list[str], media: torch.Tensor) -> torch.Tensor:
        """B prompts, uint8 [B, F, H, W, 3] -> float32 [B, F], of each frame for its sample's prompt."""

    @abstractmethod
    def differentiable_frame_scores(self, prompts: list[str], pixels: torch.Tensor) -> torch.Tensor:
        """B prompts, float [B, F, H, W, 3] in 0..1 -> float32 [B, F] on the same device, with gradients."""


def in_batches(
    judge: Callable[[slice, torch.Tensor], torch.Tensor], media: torch.Tensor, batch_size: int, device: torch.device
) -> torch.Tensor:
    """The frames of `media` [B, F, H, W, 3], `batch_size` of them at a time, as `judge` scores them: float32 [B, F].

    judge: which frames of all B F, and them [N, H, W, 3] -> their scores, float32 [N], on `device`.
    """
    pictures = media.flatten(0, 1)
    scores = [torch.empty(0, device=device)]
    for start in range(0, len(pictures), batch_size):
        batch = slice(start, start + batch_size)
        scores.append(judge(batch, pictures[batch]))
    return torch.cat(scores).view(media.shape[:2])
