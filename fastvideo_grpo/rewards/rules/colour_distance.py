"""How far is the picture's coloured part from the colour that the prompt names? `colour_match`'s question, with a gradient."""

from __future__ import annotations

from typing import Any

import torch

from fastvideo_grpo.rewards.base import MediaKind, Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.registry import register
from fastvideo_grpo.rewards.rules.colour_match import NO_COLOUR, PALETTE, colour_of

# What a grey pixel counts for, beside the 1 of a coloured one: what a picture without any colour is judged by, and pulled by.
_GREY_WEIGHT = 0.02
# Of the distance, which would have a kink where it is 0; in units of 0..1.
_ROUNDED = 0.02


@register("colour_distance")
class ColourDistance:
    """Minus the mean distance between the coloured pixels and the prompt's palette colour; at most 0, about -1 at the worst.

    The distance is the root mean square over the channels, of RGB in 0..1. A pixel is weighted by how coloured it is: with
    c = sqrt(3/2 * the sum over the channels of (channel - mean)^2), which is the largest minus the smallest channel where
    two are equal, the weight is c^4 / (c^4 + saturation^4) + 0.02. So grey pixels count when there is little else, and a
    picture without colour has minus their distance, -0.27 to -0.51 for greys of 60 to 190. The coloured area (mean of
    c^4 / (c^4 + saturation^4), a fraction of the frame) beyond `max_area` is squared and taken off. Frames are averaged. A
    prompt that does not name exactly one colour of `colour_match.PALETTE` makes its sample invalid.

    saturation: c, of 255, at which a pixel counts half. max_area: fraction of the frame, 0 to 1; the default suits shapes
    that cover 0.05 to 0.3 of it.

    On 600 pictures of `tiny/shapes.py` it was -0.12 to -0.02 for the colour that is shown, mean -0.06, and -0.24 at the most,
    mean -0.47, for the others. It is continuously differentiable in the pixels: none is compared with a threshold.

    It measures colour and area, nothing else. A blob, stripes or scattered dots of the colour do as well as the shape that
    was asked for, on any grey. Larger is better up to `max_area`, since a smaller part leaves more to the grey: by 0.04 from
    a tenth of the frame to 0.4 of it. A flood has -0.32, about what a grey picture has. The grey is drawn to the colour's
    brightness; an evenly grey picture becomes an even tint. What it pushes a model to lose (form, detail, background) has to
    be watched by eye or held by another reward or a KL term.

    Raises ValueError for parameters out of range.
    """

    outputs: tuple[str, ...] = ("colour_distance",)
    media_kind: MediaKind = "any"

    def __init__(self, *, saturation: float = 70, max_area: float = 0.4) -> None:
        for name, value, high in (("saturation", saturation, 255), ("max_area", max_area, 1)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
                raise ValueError(f"colour_distance: {name} is {value!r}; it must be a number above 0 and at most {high}")
        self.saturation = saturation
        self.max_area = max_area

    def score(self, request: RewardRequest) -> RewardResult:
        with torch.no_grad():
            # One sample at a time: a video is large as float32.
            parts = [
                self._scores(sample[None].to(torch.float32) / 255, [prompt])
                for sample, prompt in zip(request.media, request.prompts, strict=True)
            ]
        scores = torch.cat([torch.empty(0), *(part.cpu() for part in parts)])
        return RewardResult({"colour_distance": scores}, ~scores.isnan(), invalid_because=NO_COLOUR)

    def score_differentiably(
        self, pixels: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """See `DifferentiableReward`; in the dtype of `pixels`."""
        return {"colour_distance": self._scores(pixels, prompts)}

    def _scores(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """float [B, F, H, W, 3] -> [B], NaN where the prompt names no colour."""
        colours = [colour_of(prompt) for prompt in prompts]
        palette = pixels.new_tensor(list(PALETTE.values())) / 255
        # The place of a colour that is not named is filled by any.
        wanted = palette[[colour or 0 for colour in colours]][:, None, None, None]
        squared = (pixels - wanted).square().mean(dim=-1)
        distances = (squared + _ROUNDED**2).sqrt() - _ROUNDED
        chroma_4 = (1.5 * (pixels - pixels.mean(dim=-1, keepdim=True)).square().sum(dim=-1)).square()
        coloured = chroma_4 / (chroma_4 + (self.saturation / 255) ** 4)
        weights = coloured + _GREY_WEIGHT
        mean_distances = (weights * distances).sum(dim=(-2, -1)) / weights.sum(dim=(-2, -1))
        flood = (coloured.mean(dim=(-2, -1)) - self.max_area).clamp(min=0).square()
        scores = -(mean_distances + flood).mean(dim=1)
        named = torch.tensor([colour is not None for colour in colours], device=pixels.device)
        return torch.where(named, scores, torch.nan)

    def to(self, device: torch.device | str) -> Reward:
        return self

    def close(self) -> None:
        pass
