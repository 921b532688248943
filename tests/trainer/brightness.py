"""A reward that is continuous up to the rounding of pixels: what comparisons "to rounding" need (DESIGN, promise 3)."""

import torch

from fastvideo_grpo.rewards.base import RewardRequest, RewardResult
from fastvideo_grpo.rewards.registry import register


@register("test_brightness")
class Brightness:
    """Mean red minus mean blue, in 0 to 255."""

    outputs, media_kind = ("brightness",), "any"

    def score(self, request: RewardRequest) -> RewardResult:
        mean = request.media.double().mean((1, 2, 3))
        return RewardResult({"brightness": (mean[:, 0] - mean[:, 2]).float()}, torch.ones(len(mean), dtype=torch.bool))

    def to(self, device: object) -> "Brightness":
        return self

    def close(self) -> None:
        pass
