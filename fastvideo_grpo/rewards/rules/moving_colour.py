"""Does a thing of the named colour move the named way? For prompts like "a red circle moving left"."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch

from fastvideo_grpo.rewards.base import MediaKind, Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.registry import register
from fastvideo_grpo.rewards.rules.colour_match import NO_COLOUR, colour_of, squared_palette_distances

# (columns, rows) of the picture, whose first row is at the top.
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# Distances in RGB, 0..255: grey is at least 123 away from every palette colour, and two of those at least 140 from another.
_NEAR, _FAR = 50, 110
# A pixel that is nearer to another palette colour does not count; one that is nearer to its own by this counts in full.
_NEARER = 40
# A shape needs this fraction of a disc's compactness to count in full (a square has 0.95, a triangle 0.83).
_COMPACT = 0.6
# Net travel as a fraction of the path: worth nothing and everything.
_CROOKED, _STRAIGHT = 0.5, 0.9


def direction_of(prompt: str) -> str | None:
    """The one key of `DIRECTIONS` that `prompt` names as a whole word, or None if it names none or two."""
    named = set(re.findall(r"[a-z]+", prompt.lower())) & set(DIRECTIONS)
    return named.pop() if len(named) == 1 else None


@dataclass(frozen=True)
class _Track:
    """The pixels of one colour, frame by frame: area [F] as a fraction of the frame, centre [F, 2] (column, row) in pixels,
    compactness [F], 1 for a disc and less for whatever is long or scattered."""

    area: np.ndarray
    centre: np.ndarray
    compactness: np.ndarray


@register("moving_colour")
class MovingColour:
    """A compact thing of the prompt's colour, there in every frame, travelling evenly and straight in the prompt's direction.

    The prompt names one colour of `colour_match.PALETTE` and one of left, right, up, down, as whole words; up is towards
    the first row. Anything else makes its sample invalid. The score, 0 to 1, is the product of

    - presence: the smallest over the frames of three things. Area: the fraction of the pixels that have the colour, full
      from `min_area` to `max_area`, nothing at none and at twice `max_area`. Steadiness: at least half of the largest
      frame's area. Compactness: the pixels lie together, as in a disc or a square.
    - travel: steps of the centre of those pixels along the direction, summed, over `travel` times the frame's width (left,
      right) or height; at most 1. A step counts, either way, for at most `largest_step` times its even share, so that one
      jump is no motion.
    - straightness: net travel over the length of the path, nothing up to 0.5 and full from 0.9: motion to the side, detours
      and to and fro cost.

    All of it is continuous in the pixels: a pixel counts by how near it is to the colour. Static clips, the wrong
    direction, flicker, noise and a flood of colour score about 0. The defaults suit shapes of radius 4 to 7 in clips of 32
    by 32 pixels and 5 to 13 frames that travel 8 pixels or more. The frame rate is not looked at.

    It measures colour and the centre of mass, nothing else. It cannot tell a circle from a square; a plain blob on a plain
    background does as well as a good picture. A camera that pans past a still thing counts as motion, a short cross-fade
    between two places that overlap counts for about half, and more speed than `travel` asks for earns nothing. What it
    pushes a model to lose (detail, background, other objects) has to be watched by eye or held by another reward or a KL
    term.

    Raises ValueError for parameters out of range.
    """

    outputs: tuple[str, ...] = ("moving_colour",)
    media_kind: MediaKind = "video"

    def __init__(
        self, *, travel: float = 0.2, min_area: float = 0.02, max_area: float = 0.3, largest_step: float = 1.5
    ) -> None:
        given = {"travel": travel, "min_area": min_area, "max_area": max_area, "largest_step": largest_step}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"moving_colour: {name} is {value!r}; it must be a number")
        if not 0 < travel <= 1:
            raise ValueError(f"moving_colour: travel is {travel!r}; it is a fraction of the frame, above 0 and at most 1")
        if not 0 < min_area < max_area <= 1:
            raise ValueError(
                f"moving_colour: min_area is {min_area!r} and max_area {max_area!r}; they are fractions of the frame, "
                "above 0 and at most 1, and min_area must be the smaller one"
            )
        if not 1 <= largest_step < float("inf"):
            raise ValueError(f"moving_colour: largest_step is {largest_step!r}; it must be at least 1 (the even share)")
        self.travel = travel
        self.min_area = min_area
        self.max_area = max_area
        self.largest_step = largest_step

    def score(self, request: RewardRequest) -> RewardResult:
        """Raises ValueError when the media have one frame."""
        if request.media.shape[1] < 2:
            raise ValueError("moving_colour needs frames to see motion, but the samples have one; use a reward for images")
        asked = [(colour_of(prompt), direction_of(prompt)) for prompt in request.prompts]
        scores = torch.full((len(request),), float("nan"))
        for index, ((colour, direction), clip) in enumerate(zip(asked, request.media.cpu().numpy(), strict=True)):
            if colour is not None and direction is not None:
                track = _follow(clip, colour)
                scores[index] = self._presence(track) * self._motion(track, direction, clip.shape[1:3])
        valid = torch.tensor([None not in pair for pair in asked])
        because = f"{NO_COLOUR}, and exactly one of {', '.join(DIRECTIONS)}"
        return RewardResult({"moving_colour": scores}, valid, invalid_because=because)

    def to(self, device: torch.device | str) -> Reward:
        return self

    def close(self) -> None:
        pass

    def _presence(self, track: _Track) -> float:
        area = track.area
        enough = np.minimum(area / self.min_area, 2 - area / self.max_area).clip(0, 1)
        steady = (2 * area / max(area.max(), 1e-6)).clip(0, 1)
        compact = (track.compactness / _COMPACT).clip(0, 1)
        return float((enough * steady * compact).min())

    def _motion(self, track: _Track, direction: str, size: tuple[int, int]) -> float:
        steps = np.diff(track.centre, axis=0)
        along = steps @ np.array(DIRECTIONS[direction])
        needed = self.travel * (size[1] if direction in ("left", "right") else size[0])
        largest = self.largest_step * needed / len(steps)
        travelled = along.clip(-largest, largest).sum() / needed
        straight = along.sum() / max(np.linalg.norm(steps, axis=1).sum(), 1e-6)
        return float(np.clip(travelled, 0, 1) * np.clip((straight - _CROOKED) / (_STRAIGHT - _CROOKED), 0, 1))


def _follow(clip: np.ndarray, colour: int) -> _Track:
    """uint8 [F, H, W, 3] -> where the colour at that position of the palette is."""
    height, width = clip.shape[1:3]
    rows, columns = np.divmod(np.arange(height * width), width)
    places = np.stack([columns, rows], axis=1).astype(np.float64)
    area, centre, compactness = [], [], []
    for frame in clip:
        weight = _closeness(frame.reshape(-1, 3).astype(np.float32), colour).astype(np.float64)
        mass = max(weight.sum(), 1e-6)  # an empty frame has area 0, which makes the presence 0 wherever its centre is
        middle = weight @ places / mass
        spread = weight @ np.square(places - middle).sum(axis=1) / mass
        area.append(weight.mean())
        centre.append(middle)
        compactness.append(mass / (2 * np.pi) / max(spread, 1e-6))  # a disc of that area has the spread area / 2 pi
    return _Track(np.array(area), np.array(centre), np.array(compactness))


def _closeness(pixels: np.ndarray, colour: int) -> np.ndarray:
    """float32 [N, 3] -> float32 [N], 0 to 1: how much each pixel has the colour at that position of the palette."""
    distance = np.sqrt(squared_palette_distances(pixels))
    own = distance[:, colour]
    nearest_other = np.delete(distance, colour, axis=1).min(axis=1)
    return ((_FAR - own) / (_FAR - _NEAR)).clip(0, 1) * ((nearest_other - own) / _NEARER).clip(0, 1)
