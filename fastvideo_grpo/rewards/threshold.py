"""A score made binary, for methods and users that want right or wrong."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastvideo_grpo.rewards.base import Reward, RewardRequest, RewardResult


def above(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """1.0 where `scores` is above `threshold`, 0.0 elsewhere, float32; NaN stays NaN, since it is neither."""
    return torch.where(scores.isnan(), scores, (scores > threshold).to(scores.dtype)).float()


class Threshold:
    """`reward` with one of its outputs made binary by `above`; validity and the other outputs stay.

    In a run configuration this is the key `threshold` of an output. Raises ValueError for an output it does not have.
    """

    def __init__(self, reward: Reward, output: str, threshold: float) -> None:
        if output not in reward.outputs:
            raise ValueError(f"threshold: the reward has no output '{output}'; it has {', '.join(reward.outputs)}")
        self.reward = reward
        self.output = output
        self.threshold = threshold
        self.outputs = reward.outputs
        self.media_kind = reward.media_kind

    def score(self, request: RewardRequest) -> RewardResult:
        result = self.reward.score(request)
        return replace(result, scores={**result.scores, self.output: above(result.scores[self.output], self.threshold)})

    def to(self, device: torch.device | str) -> Threshold:
        self.reward.to(device)
        return self

    def close(self) -> None:
        self.reward.close()
