"""LAION's aesthetic predictor: how well people would rate the picture, whatever the prompt.

Schuhmann et al., arXiv 2210.08402: a head on the picture's embedding by OpenAI's CLIP ViT-L/14, trained on ratings of 1 to 10.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastvideo_grpo.rewards.base import RewardRequest, RewardResult
from fastvideo_grpo.rewards.media import frames as frame_choice
from fastvideo_grpo.rewards.media.preprocessing import openai_preprocessing
from fastvideo_grpo.rewards.models import sources
from fastvideo_grpo.rewards.models.clip_backend import ClipBackend, ClipReward, Precision, check_batch_size, matrix_dtype
from fastvideo_grpo.rewards.models.clip_folders import ClipFolder
from fastvideo_grpo.rewards.models.score_head import linear_head
from fastvideo_grpo.rewards.models.weight_files import naming, read_weights
from fastvideo_grpo.rewards.registry import register

_GET_HEAD = (
    "the head is sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor "
    "(or the older sa_0_4_vit_l_14_linear.pth of github.com/LAION-AI/aesthetic-predictor)"
)
_GET_CLIP = f"the CLIP is openai/clip-vit-large-patch14 on Hugging Face: {sources.CLIP_VIT_L.advice()}"


@register("aesthetic")
class Aesthetic(ClipReward):
    """The predicted rating, about 1 to 10; the mean over the frames. The prompt is not looked at.

    checkpoint: the head, sac+logos+ava1-l14-linearMSE.pth ("improved aesthetic predictor", five linear layers) or
        sa_0_4_vit_l_14_linear.pth (the older one, a single layer). It is given the embedding at length 1.
    clip: folder of OpenAI's CLIP ViT-L/14, in transformers' layout or open_clip's (see `ClipFolder`); its text tower is not
        kept. Another CLIP gives numbers without meaning: the head is for this one.
    batch_size: pictures that go through the network together, at least 1.
    precision: "bf16" keeps and applies the CLIP's matrices in bfloat16 and everything else in float32: half the memory
        (0.6 GB instead of 1.2).
    frames: of a video, which frames are scored: "first", "middle", "uniform:N" or "all", see `Frames`.

    Pictures are prepared as by OpenAI's package: shorter side to the network's size, bicubic, centre crop.

    Raises FileNotFoundError for a path that is not there, before anything is loaded; ValueError for files that are not
    what they should be, a head for another width than the CLIP's, and parameters out of range.
    """

    outputs: tuple[str, ...] = ("aesthetic",)
    paths: tuple[str, ...] = ("clip",)

    def __init__(
        self,
        *,
        checkpoint: str,
        clip: str,
        batch_size: int = 8,
        precision: Precision = "fp32",
        frames: str = frame_choice.DEFAULT,
    ) -> None:
        check_batch_size("aesthetic", batch_size)
        dtype = matrix_dtype("aesthetic", precision)
        self.frames = frame_choice.Frames(frames, "aesthetic")
        file = Path(checkpoint)
        if not file.is_file():
            found = f"the checkpoint {file} is a folder, it must be a file" if file.is_dir() else f"there is no file {file}"
            raise FileNotFoundError(f"aesthetic: {found}; {_GET_HEAD}")
        folder = ClipFolder("aesthetic", Path(clip), _GET_CLIP)
        with naming("aesthetic", file, _GET_HEAD):
            weights = read_weights(file)
        model: Any = folder.model(dtype)
        with naming("aesthetic", file, _GET_HEAD):
            self.head = linear_head(weights, model.config.projection_dim)
        del model.text_model, model.text_projection
        self.clip = ClipBackend(model, openai_preprocessing(folder.image_size), batch_size=batch_size)

    @torch.no_grad()
    def score(self, request: RewardRequest) -> RewardResult:
        media = self.frames.of(request.media)
        ratings = self._ratings(self.clip.pictures(media.flatten(0, 1))).view(media.shape[:2])
        return RewardResult({"aesthetic": ratings.mean(dim=1).cpu()}, torch.ones(len(request), dtype=torch.bool))

    def score_differentiably(
        self, pixels: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """See `DifferentiableReward`."""
        chosen = self.frames.of(pixels)
        ratings = self._ratings(self.clip.differentiable_pictures(chosen.flatten(0, 1))).view(chosen.shape[:2])
        return {"aesthetic": ratings.mean(dim=1)}

    def _ratings(self, embeddings: torch.Tensor) -> torch.Tensor:
        """float32 [N, E] -> float32 [N, 1]."""
        with torch.autocast(self.clip.device.type, enabled=False):
            return self.head(embeddings)

    def to(self, device: torch.device | str) -> Aesthetic:
        super().to(device)
        self.head.to(device)
        return self
