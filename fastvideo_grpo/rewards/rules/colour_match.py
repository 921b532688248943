"""Does the picture show the colour that the prompt names? The demo's reward: its pictures and prompts are known."""

from __future__ import annotations

import re

import numpy as np
import torch

from fastvideo_grpo.rewards.base import MediaKind, Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.registry import register

# RGB, 0..255. The demo's pictures and clips are drawn in these colours (tiny/shapes.py).
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 70, 220),
    "yellow": (230, 220, 40),
    "magenta": (210, 50, 210),
    "cyan": (40, 210, 210),
}

NO_COLOUR = f"the prompt must name exactly one of {', '.join(PALETTE)}"

_COLOURS = list(PALETTE)
_POINTS = np.array(list(PALETTE.values()), dtype=np.float32)


def colour_of(prompt: str) -> int | None:
    """Position in `PALETTE` of the one colour that `prompt` names as a whole word, or None if it names none or two."""
    words = set(re.findall(r"[a-z]+", prompt.lower()))
    named = [index for index, name in enumerate(_COLOURS) if name in words]
    return named[0] if len(named) == 1 else None


def squared_palette_distances(pixels: np.ndarray) -> np.ndarray:
    """float32 [N, 3], RGB in 0..255 -> float32 [N, 6], squared Euclidean distance to each colour of `PALETTE`."""
    # One palette colour at a time: [pixels, 6, 3] of a real picture would be large.
    return np.stack([np.square(pixels - point).sum(axis=1) for point in _POINTS], axis=1)


@register("colour_match")
class ColourMatch:
    """Among the saturated pixels, the fraction whose nearest palette colour is the prompt's; 0 to 1.

    A pixel is saturated when its largest and smallest channel differ by more than `saturation` (of 255). A frame where
    fewer than `min_saturated` of all pixels are (a fraction) scores 0: it shows no coloured thing. Frames are averaged.
    A prompt that does not name exactly one palette colour makes its sample invalid. Raises ValueError for parameters
    out of range.
    """

    outputs: tuple[str, ...] = ("colour_match",)
    media_kind: MediaKind = "any"

    def __init__(self, *, saturation: float = 70, min_saturated: float = 0.03) -> None:
        if not 0 <= saturation < 255:
            raise ValueError(f"colour_match: saturation is {saturation!r}; it must be at least 0 and below 255")
        if not 0 < min_saturated <= 1:
            raise ValueError(f"colour_match: min_saturated is {min_saturated!r}; it must be above 0 and at most 1")
        self.saturation = saturation
        self.min_saturated = min_saturated

    def score(self, request: RewardRequest) -> RewardResult:
        colours = [colour_of(prompt) for prompt in request.prompts]
        scores = torch.full((len(request),), float("nan"))
        for index, (colour, sample) in enumerate(zip(colours, request.media.cpu().numpy(), strict=True)):
            if colour is not None:
                scores[index] = float(np.mean([self._match(frame, colour) for frame in sample]))
        valid = torch.tensor([colour is not None for colour in colours])
        return RewardResult({"colour_match": scores}, valid, invalid_because=NO_COLOUR)

    def _match(self, frame: np.ndarray, colour: int) -> float:
        pixels = frame.reshape(-1, 3).astype(np.float32)
        saturated = pixels[pixels.max(axis=1) - pixels.min(axis=1) > self.saturation]
        if len(saturated) < self.min_saturated * len(pixels):
            return 0.0
        return float((squared_palette_distances(saturated).argmin(axis=1) == colour).mean())

    def to(self, device: torch.device | str) -> Reward:
        return self

    def close(self) -> None:
        pass
