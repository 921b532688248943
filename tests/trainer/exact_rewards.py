"""Rewards for comparisons "to rounding" (DESIGN, promise 3), one continuous up to the rounding of pixels, one exact; one
that hangs, and one that ends its process."""

import os
import time
from pathlib import Path

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


@register("test_position")
class Position:
    """Place in the micro-batch, whatever it looks like: the same advantages on both sides of a comparison of gradients."""

    outputs, media_kind = ("position",), "any"

    def score(self, request: RewardRequest) -> RewardResult:
        count = len(request)
        return RewardResult({"position": torch.arange(count).float()}, torch.ones(count, dtype=torch.bool))

    def to(self, device: object) -> "Position":
        return self

    def close(self) -> None:
        pass


@register("test_first_masked")
class FirstMasked(Brightness):
    """Like ``test_brightness``; the first sample of each micro-batch cannot be scored."""

    def score(self, request: RewardRequest) -> RewardResult:
        result = super().score(request)
        result.valid[0] = False
        return result


@register("test_hangs")
class Hangs(Brightness):
    """Answers a number of requests, then hangs; ``folder`` gets a file named after the rank it was made on."""

    def __init__(self, answers: int, folder: str) -> None:
        self.answers = answers
        (Path(folder) / f"made-{os.environ['RANK']}").touch()

    def score(self, request: RewardRequest) -> RewardResult:
        self.answers -= 1
        if self.answers < 0:
            time.sleep(3600)
        return super().score(request)


@register("test_ends_process")
class EndsProcess(Brightness):
    """Answers a number of requests, then ends the process of rank 0 with code 0, unless ``folder`` has a file ``mended``."""

    def __init__(self, answers: int, folder: str) -> None:
        self.answers, self.mended = answers, Path(folder) / "mended"

    def score(self, request: RewardRequest) -> RewardResult:
        self.answers -= 1
        if self.answers < 0 and os.environ.get("RANK", "0") == "0" and not self.mended.exists():
            os._exit(0)
        return super().score(request)


@register("test_smooth_brightness")
class SmoothBrightness(Brightness):
    """Like ``test_brightness``, with a gradient; what has the word ``unknown`` in its prompt cannot be judged."""

    def score_differentiably(
        self, pixels: torch.Tensor, prompts: list[str], metadata: list[dict[str, object]]
    ) -> dict[str, torch.Tensor]:
        mean = 255 * pixels.mean((1, 2, 3))
        known = torch.tensor(["unknown" not in prompt for prompt in prompts], device=pixels.device)
        return {"brightness": torch.where(known, mean[:, 0] - mean[:, 2], torch.nan)}
