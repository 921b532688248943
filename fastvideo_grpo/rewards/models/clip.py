"""CLIP score: how well picture and prompt fit together, by any CLIP.

Radford et al., arXiv 2103.00020; the scale is that of the model's own cosine. DanceGRPO's HPS and CLIP runs are reported with
DFN5B ViT-H-14-378 (Fang et al., arXiv 2309.17425) and weights 0.7 for HPS, 1.4 for CLIP.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastvideo_grpo.rewards.base import RewardRequest, RewardResult
from fastvideo_grpo.rewards.media import frames as frame_choice
from fastvideo_grpo.rewards.models import sources
from fastvideo_grpo.rewards.models.clip_backend import (
    ClipBackend,
    ClipReward,
    Precision,
    check_batch_size,
    check_tokenizer,
    check_vocabulary,
    matrix_dtype,
    read_tokenizer,
)
from fastvideo_grpo.rewards.models.clip_folders import ClipFolder
from fastvideo_grpo.rewards.registry import register

_GET_CHECKPOINT = f"the paper's is apple/DFN5B-CLIP-ViT-H-14-378 on Hugging Face: {sources.DFN5B.advice()}"


@register("clip")
class Clip(ClipReward):
    """The cosine of the picture's embedding and the prompt's, about 0.1 to 0.5, not multiplied; the mean over the frames.

    checkpoint: folder of a ViT CLIP model as published, in open_clip's layout or transformers' (see `ClipFolder`). Pictures
        and prompts are prepared as its files say.
    tokenizer: folder with CLIP's vocab.json and merges.txt; None is the checkpoint's own.
    batch_size: pictures, or prompts, that go through the network together, at least 1.
    precision: "bf16" keeps and applies the matrices in bfloat16 and everything else in float32: half the memory (2 GB
        instead of 4 for ViT-H-14).
    frames: of a video, which frames are scored: "first", "middle", "uniform:N" or "all", see `Frames`.

    Raises FileNotFoundError for a path that is not there, before anything is loaded; ValueError for files that are not
    what they should be, a tokenizer of another vocabulary than the weights', and parameters out of range.
    """

    source = sources.DFN5B
    outputs: tuple[str, ...] = ("clip",)
    paths: tuple[str, ...] = ("tokenizer",)

    def __init__(
        self,
        *,
        checkpoint: str,
        tokenizer: str | None = None,
        batch_size: int = 8,
        precision: Precision = "fp32",
        frames: str = frame_choice.DEFAULT,
    ) -> None:
        self.frames = frame_choice.Frames(frames, "clip")
        self.clip = folder_backend("clip", checkpoint, tokenizer, batch_size, precision, advice=_GET_CHECKPOINT)

    def score(self, request: RewardRequest) -> RewardResult:
        cosines = self.clip.cosines(request.prompts, self.frames.of(request.media))
        return RewardResult({"clip": cosines.mean(dim=1)}, torch.ones(len(request), dtype=torch.bool))


def folder_backend(
    kind: str,
    checkpoint: str,
    tokenizer: str | None,
    batch_size: int,
    precision: Precision,
    *,
    advice: str,
    usual: bool = False,
) -> ClipBackend:
    """The backend of a reward of `kind` on a published folder. Raises what `Clip` raises.

    advice: where to get the folder. usual: see `ClipFolder.preprocessing`.
    """
    check_batch_size(kind, batch_size)
    dtype = matrix_dtype(kind, precision)
    folder = ClipFolder(kind, Path(checkpoint), advice)
    words = Path(tokenizer or checkpoint)
    check_tokenizer(kind, words)
    reads = read_tokenizer(kind, words)
    prepare = folder.preprocessing(usual=usual)
    model = folder.model(dtype)
    check_vocabulary(kind, reads, words, model, checkpoint)
    return ClipBackend(model, prepare, tokenizer=reads, clean=folder.clean, batch_size=batch_size)
