"""Pictures of one coloured shape on a grey background, with captions: the world of the demo's tiny checkpoint."""

from __future__ import annotations

import numpy as np

from fastvideo_grpo.rewards.rules.colour_match import PALETTE

SIZE = 32  # pixels a side
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle")
# Prompt k shows colour k // 3 and shape k % 3.
PROMPTS = tuple(f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES)


def draw(rng: np.random.Generator, colour: int, shape: int) -> np.ndarray:
    """One picture, uint8 [32, 32, 3]: `SHAPES[shape]` in about `COLOURS[colour]`, place, size and background varied."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    centre_x, centre_y = rng.uniform(11, 21, 2)
    radius = rng.uniform(6, 10)
    if SHAPES[shape] == "circle":
        inside = (x - centre_x)**2 + (y - centre_y)**2 < radius**2
    elif SHAPES[shape] == "square":
        inside = np.maximum(abs(x - centre_x), abs(y - centre_y)) < 0.85 * radius
    else:
        below_top = y - centre_y + radius
        inside = (y - centre_y < 0.8 * radius) & (below_top > 0) & (abs(x - centre_x) < 0.62 * below_top)

    # The backgrounds are smooth: what is finer would take most of what so small a network can learn.
    picture = np.full((SIZE, SIZE, 3), rng.uniform(60, 190))
    picture += ((x - 16) * rng.uniform(-3, 3) + (y - 16) * rng.uniform(-3, 3))[..., None]
    if rng.random() < 0.5:
        picture += (rng.uniform(10, 30) * np.sin(x * rng.uniform(-0.5, 0.5) + y * rng.uniform(-0.5, 0.5)))[..., None]
    picture[inside] = np.array(PALETTE[COLOURS[colour]]) + rng.normal(0, 12, 3)
    picture += rng.normal(0, 2, (SIZE, SIZE, 1))
    return picture.clip(0, 255).astype(np.uint8)


def dataset(count: int, *, caption_noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`count` pictures, uint8 [count, 32, 32, 3], and for each the position of its caption in `PROMPTS`, int64 [count].

    caption_noise: the probability, 0 to 1, that a caption names another colour than the picture shows. Raises
    ValueError outside of that.
    """
    if not 0 <= caption_noise <= 1:
        raise ValueError(f"caption_noise is {caption_noise!r}; it is a probability, 0 to 1")
    rng = np.random.default_rng(seed)
    pictures = np.empty((count, SIZE, SIZE, 3), np.uint8)
    captions = np.empty(count, np.int64)
    for index in range(count):
        colour, shape = int(rng.integers(len(COLOURS))), int(rng.integers(len(SHAPES)))
        pictures[index] = draw(rng, colour, shape)
        if rng.random() < caption_noise:
            colour = (colour + int(rng.integers(1, len(COLOURS)))) % len(COLOURS)
        captions[index] = colour * len(SHAPES) + shape
    return pictures, captions
