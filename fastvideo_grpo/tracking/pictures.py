"""Pictures of samples: single files with an index, and captioned grids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastvideo_grpo.checkpoints.store import write_atomic

_MARGIN = 6
_MINIMUM_SIDE = 96  # pixels; smaller pictures are enlarged so that their captions can be read


def to_image(media: Tensor) -> Image.Image:
    """uint8 ``[F, H, W, 3]`` -> the first frame."""
    return Image.fromarray(np.asarray(media[0].cpu()))


def grid(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    columns: int,
    *,
    row_titles: Sequence[str] = (),
) -> Image.Image:
    """Images row by row with a caption (``\\n`` breaks lines) under each and, optionally, a title above each row."""
    font = ImageFont.load_default(size=11)
    side = max(max(image.size) for image in images)
    factor = max(1, -(-_MINIMUM_SIDE // side))
    shown = [image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in images]
    cell_width = max(image.width for image in shown)
    wrapped = [_wrap(caption, font, cell_width) for caption in captions]
    text_height = max((len(lines) for lines in wrapped), default=0) * 14
    title_height = 20 if row_titles else 0
    cell_height = max(image.height for image in shown) + text_height + 2 * _MARGIN
    rows = -(-len(shown) // columns)
    sheet = Image.new(
        "RGB", (columns * (cell_width + _MARGIN) + _MARGIN, rows * (cell_height + title_height) + _MARGIN), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(shown):
        row, column = divmod(i, columns)
        x, y = _MARGIN + column * (cell_width + _MARGIN), _MARGIN + row * (cell_height + title_height)
        if column == 0 and row < len(row_titles):
            draw.text((x, y), row_titles[row], fill="black", font=ImageFont.load_default(size=13))
        sheet.paste(image, (x, y + title_height))
        for number, line in enumerate(wrapped[i]):
            draw.text((x, y + title_height + image.height + 2 + 14 * number), line, fill="black", font=font)
    return sheet


def _wrap(text: str, font: Any, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return lines


def save_samples(
    folder: Path, media: Tensor, prompts: Sequence[str], rewards: Sequence[dict[str, Any]], columns: int = 4
) -> Image.Image:
    """Write ``0000.png`` ..., ``grid.png`` and ``index.json`` (file, prompt, rewards); returns the grid.

    Args:
        media: uint8 ``[B, F, H, W, 3]``.
        rewards: for each sample, reward name -> score (None where invalid).
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = [to_image(sample) for sample in media]
    index = []
    for i, (image, prompt, scores) in enumerate(zip(images, prompts, rewards, strict=True)):
        name = f"{i:04d}.png"
        image.save(folder / name)
        index.append({"file": name, "prompt": prompt, "rewards": scores})
    sheet = grid(images, [caption(p, r) for p, r in zip(prompts, rewards, strict=True)], min(columns, len(images)))
    sheet.save(folder / "grid.png")
    write_atomic(folder / "index.json", json.dumps(index, indent=1, ensure_ascii=False).encode())
    return sheet


def caption(prompt: str, rewards: dict[str, Any]) -> str:
    """The prompt, and a line per reward."""
    lines = [
        f"{name.rpartition('/')[2]} {score:.3f}" if score is not None else f"{name} invalid" for name, score in rewards.items()
    ]
    return "\n".join([prompt if len(prompt) <= 80 else prompt[:77] + "...", *lines])
