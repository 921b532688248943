"""PickScore: which picture people would pick for the prompt, by a CLIP trained on their choices.

Kirstain et al., arXiv 2305.01569.
"""

from __future__ import annotations

import torch

from fastvideo_grpo.rewards.base import RewardRequest, RewardResult
from fastvideo_grpo.rewards.media import frames as frame_choice
from fastvideo_grpo.rewards.models import sources
from fastvideo_grpo.rewards.models.clip import folder_backend
from fastvideo_grpo.rewards.models.clip_backend import ClipReward, Precision
from fastvideo_grpo.rewards.registry import register

_GET_CHECKPOINT = f"the weights are yuvalkirstain/PickScore_v1 on Hugging Face: {sources.PICKSCORE.advice()}"


@register("pickscore")
class PickScore(ClipReward):
    """The cosine of the picture's embedding and the prompt's, about 0.15 to 0.25; the mean over the frames.

    checkpoint: folder of PickScore_v1, a ViT-H-14 CLIP in transformers' layout. Where it has no preprocessor_config.json,
        pictures are prepared as by the processor that the paper's code names, that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K:
        shorter side to 224, bicubic, centre crop.
    logit_scale: multiply by exp(logit_scale), which is close to 100, as in the paper; False, the raw cosine, is what
        DanceGRPO trains on. Advantages divide by a group's spread, so that for training alone the two are the same.
    tokenizer: folder with CLIP's vocab.json and merges.txt; None is the checkpoint's own.
    batch_size: pictures, or prompts, that go through the network together, at least 1.
    precision: "bf16" keeps and applies the matrices in bfloat16 and everything else in float32: half the memory (2 GB
        instead of 4).
    frames: of a video, which frames are scored: "first", "middle", "uniform:N" or "all", see `Frames`.

    Raises FileNotFoundError for a path that is not there, before anything is loaded; ValueError for files that are not
    what they should be, a tokenizer of another vocabulary than the weights', and parameters out of range.
    """

    source = sources.PICKSCORE
    outputs: tuple[str, ...] = ("pickscore",)
    paths: tuple[str, ...] = ("tokenizer",)

    def __init__(
        self,
        *,
        checkpoint: str,
        tokenizer: str | None = None,
        logit_scale: bool = False,
        batch_size: int = 8,
        precision: Precision = "fp32",
        frames: str = frame_choice.DEFAULT,
    ) -> None:
        if not isinstance(logit_scale, bool):
            raise ValueError(f"pickscore: logit_scale is {logit_scale!r}; it must be true or false")
        self.frames = frame_choice.Frames(frames, "pickscore")
        self.clip = folder_backend(
            "pickscore", checkpoint, tokenizer, batch_size, precision, advice=_GET_CHECKPOINT, usual=True
        )
        self.factor = self.clip.scale if logit_scale else 1.0

    def score(self, request: RewardRequest) -> RewardResult:
        scores = self.factor * self.clip.cosines(request.prompts, self.frames.of(request.media)).mean(dim=1)
        return RewardResult({"pickscore": scores}, torch.ones(len(request), dtype=torch.bool))
