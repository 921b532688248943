"""How much successive frames differ: the plainest measure of motion, and won by flicker."""

from __future__ import annotations

import torch

from fastvideo_grpo.rewards.base import MediaKind, Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.registry import register


@register("frame_difference")
class FrameDifference:
    """Mean absolute difference of successive frames over all pixels and channels, as a fraction of 255; 0 to 1.

    Any change counts, not motion only: flicker and noise score far above anything that moves, black and white in turn
    score 1. Trained on alone it makes a model flicker. It is a baseline, a check that a video reward is wired up, and
    with a negative weight a penalty on restless clips. The frame rate is not looked at.
    """

    outputs: tuple[str, ...] = ("frame_difference",)
    media_kind: MediaKind = "video"

    def score(self, request: RewardRequest) -> RewardResult:
        """Raises ValueError when the media have one frame."""
        frames = request.media.shape[1]
        if frames < 2:
            raise ValueError("frame_difference compares frames, but the samples have one; use a reward for images")
        # One sample at a time: the floats of a batch of real clips would be large.
        scores = [sample.cpu().float().diff(dim=0).abs().mean() / 255 for sample in request.media]
        return RewardResult({"frame_difference": torch.stack(scores)}, torch.ones(len(request), dtype=torch.bool))

    def to(self, device: torch.device | str) -> Reward:
        return self

    def close(self) -> None:
        pass
