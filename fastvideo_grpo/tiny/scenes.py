"""Still pictures of a coloured shape in a landscape, and prompts that set it moving: examples for image to video.

    python -m fastvideo_grpo.tiny.scenes data/prompts/image_to_video

writes `prompts.jsonl` and the images beside it, 640x400 pixels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from fastvideo_grpo.rewards.rules.colour_match import PALETTE

WIDTH, HEIGHT = 640, 400
HORIZON = 250
# Name of a landscape -> colours of sky and ground.
LANDSCAPES = {"meadow": ((150, 195, 235), (95, 140, 70)), "desert": ((240, 205, 160), (205, 165, 105))}
# Colour, shape, landscape, what happens.
SCENES = (
    ("red", "ball", "meadow", "rolls to the right"),
    ("blue", "ball", "desert", "bounces high"),
    ("yellow", "box", "meadow", "slides slowly to the left"),
    ("green", "box", "desert", "tips over"),
    ("magenta", "tent", "meadow", "sways in the wind"),
    ("cyan", "tent", "desert", "is blown away to the left"),
)


def prompt(colour: str, shape: str, landscape: str, motion: str) -> str:
    """The text of a scene."""
    return f"a {colour} {shape} {motion} in a {landscape}, the camera stands still"


def draw(colour: str, shape: str, landscape: str) -> Image.Image:
    """A scene before anything moves, 640x400."""
    sky, ground = LANDSCAPES[landscape]
    picture = Image.new("RGB", (WIDTH, HEIGHT), sky)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, HORIZON, WIDTH, HEIGHT), fill=ground)
    pen.ellipse((480, 40, 550, 110), fill=(250, 240, 200))
    pen.ellipse((225, 318, 415, 348), fill=tuple(int(0.6 * part) for part in ground))  # its shadow
    fill = PALETTE[colour]
    if shape == "ball":
        pen.ellipse((245, 185, 395, 335), fill=fill)
    elif shape == "box":
        pen.rectangle((250, 195, 390, 335), fill=fill)
    else:
        pen.polygon(((320, 160), (225, 335), (415, 335)), fill=fill)
    return picture


def write_scenes(folder: str | Path) -> Path:
    """Write the images and, last, `prompts.jsonl` that names them; returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for colour, shape, landscape, motion in SCENES:
        name = f"{colour}-{shape}.png"
        draw(colour, shape, landscape).save(folder / name, optimize=True)
        lines.append(json.dumps({"prompt": prompt(colour, shape, landscape, motion), "image": name}))
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


if __name__ == "__main__":
    print(f"wrote {write_scenes(sys.argv[1])}")
