"""Clips of one coloured shape that moves over a grey background, with captions: the world of the video demo's checkpoint."""

from __future__ import annotations

import numpy as np

from fastvideo_grpo.rewards.rules.colour_match import PALETTE
from fastvideo_grpo.rewards.rules.moving_colour import DIRECTIONS as STEPS
from fastvideo_grpo.tiny.shapes import SIZE

FRAMES = 9  # 4 k + 1, as HunyuanVideo's autoencoder wants them: here 3 latent frames
# Fewer than in the world of pictures: what a shape looks like is not what is to be learned here.
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square")
DIRECTIONS = tuple(STEPS)
# Prompt k shows colour k // 8, shape k // 4 % 2 and direction k % 4.
PROMPTS = tuple(f"a {colour} {shape} moving {direction}" for colour in COLOURS for shape in SHAPES for direction in DIRECTIONS)


def draw(rng: np.random.Generator, colour: int, shape: int, direction: int) -> np.ndarray:
    """One clip, uint8 [9, 32, 32, 3]: `SHAPES[shape]` in about `COLOURS[colour]` moves evenly in `DIRECTIONS[direction]`.

    Size, place, speed (10 to 13 pixels in all) and background vary; all of the shape stays in the picture.
    """
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    radius = rng.uniform(5, 6.5)
    distance = rng.uniform(10, 13)
    along = np.array(STEPS[DIRECTIONS[direction]])
    # The middle of the way is near the middle of the picture, so that no single frame gives the direction away.
    middle = (SIZE - 1) / 2 + np.where(along == 0, rng.uniform(-5, 5, 2), rng.uniform(-2, 2, 2))

    # The backgrounds are smooth and of much the same brightness: what varies more would take most of what so small a network
    # can learn.
    background = np.full((SIZE, SIZE, 3), rng.uniform(90, 140))
    background += ((x - 16) * rng.uniform(-2, 2) + (y - 16) * rng.uniform(-2, 2))[..., None]
    paint = np.array(PALETTE[COLOURS[colour]]) + rng.normal(0, 10, 3)

    clip = np.empty((FRAMES, SIZE, SIZE, 3))
    for frame, time in enumerate(np.linspace(-0.5, 0.5, FRAMES)):
        centre_x, centre_y = middle + time * distance * along
        if SHAPES[shape] == "circle":
            outside = np.hypot(x - centre_x, y - centre_y) - radius
        else:
            outside = np.maximum(abs(x - centre_x), abs(y - centre_y)) - 0.85 * radius
        # Edge pixels are partly covered: a shape moves by fractions of a pixel from frame to frame.
        covered = np.clip(0.5 - outside, 0, 1)[..., None]
        clip[frame] = covered * paint + (1 - covered) * background
    return clip.clip(0, 255).astype(np.uint8)


def dataset(count: int, *, caption_noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`count` clips, uint8 [count, 9, 32, 32, 3], and for each the position of its caption in `PROMPTS`, int64 [count].

    caption_noise: the probability, 0 to 1, that a caption names another direction than the clip shows. Raises ValueError
    outside of that.
    """
    if not 0 <= caption_noise <= 1:
        raise ValueError(f"caption_noise is {caption_noise!r}; it is a probability, 0 to 1")
    rng = np.random.default_rng(seed)
    clips = np.empty((count, FRAMES, SIZE, SIZE, 3), np.uint8)
    captions = np.empty(count, np.int64)
    for index in range(count):
        colour, shape, direction = (int(rng.integers(len(names))) for names in (COLOURS, SHAPES, DIRECTIONS))
        clips[index] = draw(rng, colour, shape, direction)
        if rng.random() < caption_noise:
            direction = (direction + int(rng.integers(1, len(DIRECTIONS)))) % len(DIRECTIONS)
        captions[index] = (colour * len(SHAPES) + shape) * len(DIRECTIONS) + direction
    return clips, captions
