"""Samples as files: pictures and clips with an index, contact sheets, and captioned grids."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastvideo_grpo.disk.durable_files import write_atomic

_MARGIN = 6
_MINIMUM_SIDE = 96  # pixels; smaller pictures are enlarged so that their captions can be read
_SHEET_SIDE = 256  # pixels of the longer side; larger frames are made smaller for contact sheets
_SHEET_FRAMES = 9  # all of a short clip, every 4th of 33 frames
_CLIP_SIDE = 256  # pixels of the longer side; smaller clips are enlarged: players show them so small, and codecs blur them
_TEXT_WIDTH = 240  # pixels beside a clip
_LINE = 14  # pixels from one line of a caption to the next
_CRF = 12  # x264's constant rate factor: 0 is lossless, 17 can hardly be told from the original, 23 is its default
_SAMPLE = re.compile(r"\d{4,}\.(png|mp4)")
_GRID, _INDEX = "grid.png", "index.json"
_BT709 = 1  # in H.264's tables of colour spaces, primaries and transfer curves


def to_image(media: Tensor) -> Image.Image:
    """uint8 ``[F, H, W, 3]`` -> the first frame."""
    return Image.fromarray(np.asarray(media[0].cpu()))


def placeholder(height: int, width: int) -> Image.Image:
    """Grey and crossed out: what stands where a sample is not finite, so that nobody takes it for a black picture."""
    image = Image.new("RGB", (width, height), (160, 160, 160))
    draw = ImageDraw.Draw(image)
    draw.line((0, 0, width, height), fill=(90, 90, 90), width=1 + min(height, width) // 64)
    draw.line((0, height, width, 0), fill=(90, 90, 90), width=1 + min(height, width) // 64)
    return image


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
    text_height = max((len(lines) for lines in wrapped), default=0) * _LINE
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
            draw.text((x, y + title_height + image.height + 2 + _LINE * number), line, fill="black", font=font)
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


def contact_sheet(clip: Tensor, frames: int = _SHEET_FRAMES) -> Image.Image:
    """uint8 ``[F, H, W, 3]`` -> up to ``frames`` of the frames in a row, evenly chosen, the first and the last always.

    Frames with a longer side below 96 pixels are enlarged by an integer (nearest neighbour), above 256 made smaller.
    """
    chosen = np.linspace(0, len(clip) - 1, min(frames, len(clip))).round().astype(int)
    shown = [_for_sheet(Image.fromarray(np.asarray(clip[i].cpu()))) for i in chosen]
    width, height = shown[0].size
    sheet = Image.new("RGB", (len(shown) * (width + _MARGIN) - _MARGIN, height), "white")
    for i, image in enumerate(shown):
        sheet.paste(image, (i * (width + _MARGIN), 0))
    return sheet


def _for_sheet(frame: Image.Image) -> Image.Image:
    longer = max(frame.size)
    if longer > _SHEET_SIDE:
        frame.thumbnail((_SHEET_SIDE, _SHEET_SIDE), Image.Resampling.LANCZOS)
        return frame
    factor = max(1, -(-_MINIMUM_SIDE // longer))
    return frame.resize((frame.width * factor, frame.height * factor), Image.Resampling.NEAREST)


def rows(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Images one below the other, each with its caption (``\\n`` breaks lines) on the right."""
    font = ImageFont.load_default(size=11)
    wrapped = [_wrap(caption, font, _TEXT_WIDTH) for caption in captions]
    heights = [max(image.height, len(lines) * _LINE) for image, lines in zip(images, wrapped, strict=True)]
    widest = max(image.width for image in images)
    sheet = Image.new("RGB", (widest + _TEXT_WIDTH + 3 * _MARGIN, sum(heights) + (len(heights) + 1) * _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    y = _MARGIN
    for image, lines, height in zip(images, wrapped, heights, strict=True):
        sheet.paste(image, (_MARGIN, y))
        for number, line in enumerate(lines):
            draw.text((widest + 2 * _MARGIN, y + _LINE * number), line, fill="black", font=font)
        y += height + _MARGIN
    return sheet


def enlargement(height: int, width: int) -> int:
    """Factor by which a clip is enlarged in its mp4: 1, or the smallest even one that makes its longer side 256 pixels.

    Even, because H.264 keeps colour at half the resolution: then every pixel of the clip has a colour of its own.
    """
    longer = max(height, width)
    return 1 if longer >= _CLIP_SIDE else 2 * -(-_CLIP_SIDE // (2 * longer))


def encode_mp4(clip: Tensor, fps: float) -> bytes:
    """uint8 ``[F, H, W, 3]`` -> an mp4, H.264 in yuv420p, BT.709, which every browser plays.

    Clips with a longer side below 256 pixels are enlarged by ``enlargement`` (nearest neighbour). H.264 wants even sizes:
    of an odd one the last row or column is there twice.

    Raises:
        ValueError: ``fps`` is not above 0.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    if not 0 < fps < float("inf"):
        raise ValueError(f"fps is {fps!r}; it must be a number above 0")
    frames = np.asarray(clip.cpu())
    factor = enlargement(*frames.shape[1:3])
    frames = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1001)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(_CRF)})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Untagged, a player guesses the colour space from the size of the picture.
        codec = stream.codec_context
        codec.colorspace, codec.color_primaries, codec.color_trc = _BT709, _BT709, _BT709
        codec.color_range = ColorRange.MPEG
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def save_samples(
    folder: Path,
    media: Tensor,
    prompts: Sequence[str],
    rewards: Sequence[dict[str, Any]],
    columns: int = 4,
    *,
    faults: Sequence[str | None] | None = None,
    fps: float | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write the samples, ``grid.png`` with all of them and ``index.json``; returns the samples' files.

    Samples that are in the folder already give way, all of them, whatever their number.

    Images are ``0000.png`` ..., ``columns`` to a row of the grid. Clips are ``0000.mp4`` ... (``encode_mp4``: small ones
    are enlarged), each with a contact sheet of some of its frames, ``0000.png`` ...; the grid has a row for each clip.
    The index says file, prompt and rewards; of clips also contact_sheet, fps, frames (of the file, as of the clip) and
    enlarged (the factor). A sample with a fault has no file: the index has null and says why (``invalid``), the grid a crossed
    out :func:`placeholder`.

    Args:
        media: uint8 ``[B, F, H, W, 3]``; F = 1: images.
        rewards: for each sample, reward name -> score (None where invalid).
        faults: for each sample, what of it is not finite, or None; left out where all are sound.
        fps: frames per second of clips; images need none.
        made_from: what else the index says of each sample, such as the model that drew it.

    Raises:
        ValueError: clips without ``fps``.
        OSError: the disk refused.
    """
    frames, height, width = media.shape[1:4]
    if frames > 1 and fps is None:
        raise ValueError(f"the samples have {frames} frames, but fps is not given; give the frames per second")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _INDEX).unlink(missing_ok=True)  # until all is there
    faults = [None] * len(media) if faults is None else faults
    captions = [caption(p, r, f) for p, r, f in zip(prompts, rewards, faults, strict=True)]
    index: list[dict[str, Any]] = [
        {"file": "", "prompt": p, "rewards": r, **(made_from or {})} for p, r in zip(prompts, rewards, strict=True)
    ]
    images = []
    for i, (sample, entry, fault) in enumerate(zip(media, index, faults, strict=True)):
        picture = f"{i:04d}.png"
        if fault is not None:
            images.append(placeholder(height, width))
            entry.update(file=None, invalid=fault)
            continue
        if frames == 1:
            images.append(to_image(sample))
            entry["file"] = picture
        else:
            assert fps is not None
            images.append(contact_sheet(sample))
            entry["file"] = f"{i:04d}.mp4"
            write_atomic(folder / entry["file"], encode_mp4(sample, fps))
            entry.update(contact_sheet=picture, fps=fps, frames=frames, enlarged=enlargement(height, width))
        _write_png(folder / picture, images[-1])
    sheet = grid(images, captions, min(columns, len(images))) if frames == 1 else rows(images, captions)
    _write_png(folder / _GRID, sheet)
    written = {entry[key] for entry in index for key in ("file", "contact_sheet") if key in entry}
    for path in folder.iterdir():
        if _SAMPLE.fullmatch(path.name) and path.name not in written:  # of a larger set, or of clips
            path.unlink()
    write_atomic(folder / _INDEX, json.dumps(index, indent=1, ensure_ascii=False).encode())
    return [folder / entry["file"] for entry in index if entry["file"] is not None]


def not_samples(folder: Path) -> list[str]:
    """Names in a folder of what :func:`save_samples` did not write."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if name not in (_GRID, _INDEX) and not _SAMPLE.fullmatch(name))


def _write_png(path: Path, image: Image.Image) -> None:
    content = io.BytesIO()
    image.save(content, format="png")
    write_atomic(path, content.getvalue())


def caption(prompt: str, rewards: dict[str, Any], fault: str | None = None) -> str:
    """The prompt, and a line per reward; of a sample with a fault that instead."""
    lines = [
        f"{name.rpartition('/')[2]} {score:.3f}" if score is not None else f"{name} invalid" for name, score in rewards.items()
    ]
    if fault is not None:
        lines = [f"invalid: {fault}"]
    return "\n".join([prompt if len(prompt) <= 80 else prompt[:77] + "...", *lines])
