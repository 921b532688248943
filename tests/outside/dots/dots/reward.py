import torch

from fastvideo_grpo.rewards.base import RewardResult


class Contrast:
    """Standard deviation of the brightness."""

    outputs, media_kind = ("contrast",), "any"

    def __init__(self, scale=1.0):
        self.scale = scale

    def score(self, request):
        brightness = request.media.float().mean(-1).flatten(1)
        return RewardResult({"contrast": self.scale * brightness.std(1)}, torch.ones(len(brightness), dtype=torch.bool))

    def to(self, device):
        return self

    def close(self):
        pass
