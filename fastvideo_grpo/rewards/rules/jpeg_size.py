"""Size of the picture as a JPEG: needs no weights, and is won by destroying the picture, as real rewards can be."""

from __future__ import annotations

import io

import torch
from PIL import Image

from fastvideo_grpo.rewards.base import MediaKind, Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.media.frames import Frames
from fastvideo_grpo.rewards.registry import register


@register("jpeg_size")
class JpegSize:
    """`sign` times the JPEG size in kilobytes (1000 bytes), the mean over the frames.

    quality: JPEG quality, 1 to 100. sign: -1 rewards small files, +1 large ones. frames: of a video, which frames are
    looked at: "all", "first", "middle" or "uniform:N", see `Frames`. Raises ValueError otherwise.
    """

    outputs: tuple[str, ...] = ("jpeg_size", )
    media_kind: MediaKind = "any"

    def __init__(self, *, quality: int = 95, sign: int = -1, frames: str = "all") -> None:
        if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
            raise ValueError(f"jpeg_size: quality is {quality!r}; it must be a whole number from 1 to 100")
        if sign not in (-1, 1):
            raise ValueError(f"jpeg_size: sign is {sign!r}; it must be -1 (small files are better) or 1 (large ones)")
        self.frames = Frames(frames, "jpeg_size")
        self.quality = quality
        self.sign = int(sign)

    def score(self, request: RewardRequest) -> RewardResult:
        sizes = [[self._kilobytes(frame) for frame in sample] for sample in self.frames.of(request.media).cpu().numpy()]
        scores = self.sign * torch.tensor(sizes, dtype=torch.float32).mean(dim=1)
        return RewardResult({"jpeg_size": scores}, torch.ones(len(request), dtype=torch.bool))

    def _kilobytes(self, frame) -> float:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=self.quality)
        return buffer.tell() / 1000

    def to(self, device: torch.device | str) -> Reward:
        return self

    def close(self) -> None:
        pass
