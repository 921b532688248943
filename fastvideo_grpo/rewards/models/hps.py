"""Human Preference Score v2.1: how well people would like the picture for the prompt, by a CLIP trained on their choices.

Wu et al., arXiv 2306.09341. A score is the cosine between picture and prompt, about 0.2 to 0.35 for real pictures; the
benchmark's numbers are 100 times that. Picture and prompt are prepared as the published code does it: the scores of one
group lie close together, so that a small difference in the preparation counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastvideo_grpo.model_files.torch_files import read_torch
from fastvideo_grpo.rewards.base import RewardRequest, RewardResult
from fastvideo_grpo.rewards.media import frames as frame_choice
from fastvideo_grpo.rewards.media.preprocessing import HPSPreprocessing
from fastvideo_grpo.rewards.models import sources
from fastvideo_grpo.rewards.models.clip_backend import (
    ClipBackend,
    ClipReward,
    Precision,
    check_batch_size,
    check_tokenizer,
    check_vocabulary,
    clean_prompt,
    matrix_dtype,
    read_tokenizer,
)
from fastvideo_grpo.rewards.models.open_clip_weights import clip_model
from fastvideo_grpo.rewards.models.weight_files import describe, holds_tensors, naming
from fastvideo_grpo.rewards.registry import register

_FILE = "HPS_v2.1_compressed.pt"
_GET_CHECKPOINT = f"the weights are {_FILE} of xswu/HPSv2 on Hugging Face: {sources.HPS_V2_1.advice()}"


@register("hps")
class HPS(ClipReward):
    """HPS-v2.1: the cosine of the picture's embedding and the prompt's, not multiplied by 100; the mean over the frames.

    checkpoint: HPS_v2.1_compressed.pt, a torch file whose `state_dict` is a whole open_clip ViT CLIP model (ViT-H-14).
    tokenizer: folder with CLIP's vocab.json and merges.txt.
    batch_size: pictures, or prompts, that go through the network together, at least 1.
    precision: "bf16" keeps and applies the matrices in bfloat16 and everything else in float32: half the memory (2 GB
        instead of 4 for ViT-H-14).
    frames: of a video, which frames are scored: "first", "middle", "uniform:N" or "all", see `Frames`.

    Raises FileNotFoundError for a path that is not there, before anything is loaded; ValueError for files that are not
    what they should be, a tokenizer of another vocabulary than the weights', and parameters out of range.
    """

    source = sources.HPS_V2_1
    outputs: tuple[str, ...] = ("hps",)
    paths: tuple[str, ...] = ("tokenizer",)

    def __init__(
        self,
        *,
        checkpoint: str,
        tokenizer: str,
        batch_size: int = 8,
        precision: Precision = "fp32",
        frames: str = frame_choice.DEFAULT,
    ) -> None:
        check_batch_size("hps", batch_size)
        dtype = matrix_dtype("hps", precision)
        self.frames = frame_choice.Frames(frames, "hps")
        _check_checkpoint(Path(checkpoint))
        check_tokenizer("hps", Path(tokenizer))
        reads = read_tokenizer("hps", Path(tokenizer))
        with naming("hps", Path(checkpoint), _GET_CHECKPOINT):
            model: Any = clip_model(_read_state_dict(Path(checkpoint)), matrix_dtype=dtype)
        check_vocabulary("hps", reads, tokenizer, model, checkpoint)
        size: int = model.config.vision_config.image_size
        self.clip = ClipBackend(
            model,
            HPSPreprocessing(size),
            tokenizer=reads,
            clean=clean_prompt,
            batch_size=batch_size,
        )

    def score(self, request: RewardRequest) -> RewardResult:
        cosines = self.clip.cosines(request.prompts, self.frames.of(request.media))
        return RewardResult({"hps": cosines.mean(dim=1)}, torch.ones(len(request), dtype=torch.bool))


def _check_checkpoint(path: Path) -> None:
    if path.is_dir():
        inside = path / _FILE
        raise FileNotFoundError(
            f"hps: the checkpoint {path} is a folder; "
            + (f"set it to {inside}" if inside.is_file() else f"it must be a file; {_GET_CHECKPOINT}")
        )
    if not path.is_file():
        raise FileNotFoundError(f"hps: there is no checkpoint {path}; {_GET_CHECKPOINT}")


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    content = read_torch(path)
    if isinstance(content, dict) and "visual.conv1.weight" in content:
        raise ValueError(
            "expected the weights under the key 'state_dict', found them without it, as in the plain CLIP that "
            "HPS was trained from: its scores would be another reward's"
        )
    weights: Any = content.get("state_dict") if isinstance(content, dict) else None
    if not holds_tensors(weights):
        raise ValueError(f"expected a dict with tensors under the key 'state_dict', found {describe(content)}")
    return weights
