"""Images that videos start from: how they are read, brought to size, checked and told apart."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.prompts.files import Prompt, PromptFileError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""What is read. Pillow knows more, some of which (EPS) other programs would be started for."""

MOST_PIXELS = 100_000_000
"""Of one image; a file of a few kilobytes can unfold to more than a machine's memory."""

MOST_ENLARGED = 4.0
"""An image that would be enlarged more says little of what the video should look like."""

_NAMED = 5  # bad files that an error names


def load_image(path: str | Path, height: int, width: int) -> Tensor:
    """Read an image and bring it to ``height`` x ``width``: uint8 ``[height, width, 3]`` on the CPU.

    The orientation in its EXIF data is applied, transparency is put on white, and all is converted to RGB (16-bit grey to 8
    bit; of an animation the first picture is taken; colour profiles are not applied). It is then scaled, aspect kept, so
    that it just covers ``height`` x ``width`` (Pillow's LANCZOS), and the centre is cut out. An image of the exact size
    comes back as it is.

    Raises:
        PromptFileError: it cannot be read; names the file and what is wrong with it.
    """
    try:
        image = _cover(_read(Path(path)), height, width)
    except Exception as error:  # of a damaged file, Pillow's readers raise nearly everything
        raise PromptFileError(f"the image {path} {_what_is_wrong(error)}") from error
    return torch.from_numpy(np.array(image))


_digests: dict[Path, str] = {}


def image_digest(path: str | Path) -> str:
    """The sha256 of the file's bytes, as it was when this process or :func:`check_images` first looked: what is done afterwards
    to a file whose image is encoded already does not concern a run.

    Raises:
        PromptFileError: the file cannot be read.
    """
    path = Path(path)
    if path not in _digests:
        try:
            _digests[path] = _digest(path)
        except (OSError, ValueError) as error:
            raise PromptFileError(f"the image {path} {_what_is_wrong(error)}") from error
    return _digests[path]


def check_images(
    prompts: Sequence[Prompt],
    height: int,
    width: int,
    world: World,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Read every image of the prompts once, before anything expensive starts. All ranks call it; each does a share, and all
    know every :func:`image_digest` afterwards.

    An image must be there, decode to its last pixel, and not be enlarged more than ``MOST_ENLARGED`` times to cover ``height``
    x ``width``.

    Args:
        prompts: the same on every rank.
        progress: is told (done, total) of this rank's share.

    Raises:
        PromptFileError: the same on every rank: how many images are bad, and of the first few path, prompt and reason.
    """
    prompt_of: dict[Path | None, Prompt] = {}  # prompts may share an image
    for prompt in prompts:
        prompt_of.setdefault(prompt.image, prompt)
    images = list(prompt_of)
    mine = range(world.rank, len(images), world.size)
    bad: dict[int, str] = {}
    digests: dict[Path, str] = {}
    for done, number in enumerate(mine, start=1):
        image = images[number]
        problem = "is missing: the prompt names none" if image is None else _problem(image, height, width)
        if problem is not None:
            bad[number] = problem
        elif image is not None:
            digests[image] = _digest(image)
        progress(done, len(mine))
    found: dict[int, str] = {}
    for problems, read in world.all_gather_object((bad, digests)):
        found.update(problems)
        _digests.update(read)
    if not found:
        return
    lines = [f"{images[n] or 'the image'} (prompt {prompt_of[images[n]].id!r}) {found[n]}" for n in sorted(found)[:_NAMED]]
    more = [f"and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
    raise PromptFileError(
        "\n  ".join(
            [f"{len(found)} of {len(images)} images cannot be used; repair them or take their prompts out:", *lines, *more]
        )
    )


def _problem(path: Path, height: int, width: int) -> str | None:
    """What is wrong with an image, or None."""
    try:
        image = _read(path)
    except Exception as error:  # see load_image
        return _what_is_wrong(error)
    scale = _scale(image, height, width)
    if scale <= MOST_ENLARGED:
        return None
    return (
        f"has {image.width}x{image.height} pixels and would be enlarged {scale:.1f} times to cover {width}x{height}; at most "
        f"{MOST_ENLARGED:g} times are sensible: take a larger one"
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Unusable(Exception):
    """Says what is wrong in words that follow the file's name."""


def _what_is_wrong(error: Exception) -> str:
    if isinstance(error, _Unusable):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, UnidentifiedImageError):
        return f"is no image of a kind that is read ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return _too_many_pixels(str(error))
    return f"cannot be read: {str(error) or type(error).__name__}"


def _too_many_pixels(found: str) -> str:
    return f"unfolds to too many pixels ({found}); at most {MOST_PIXELS:,} are read: make it smaller"


def _read(path: Path) -> Image.Image:
    """The whole image, upright, RGB."""
    if path.exists() and not path.is_file():
        raise _Unusable("is no file")  # a pipe would be waited for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is too large or damaged is an error here
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise _Unusable(_too_many_pixels(f"{image.width}x{image.height}"))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _to_8_bit(image)
    if image.mode == "F":
        raise _Unusable("has floating-point pixels, whose range nothing says; save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grey in 8 bits (Pillow's own conversion cuts off what is above 255)."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise _Unusable("has 32-bit pixels; save it with 8 or 16 bits")
    if "transparency" in image.info:  # one value is; on white
        values = np.where(values == image.info["transparency"], 65535, values)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _scale(image: Image.Image, height: int, width: int) -> float:
    """By what an image is multiplied to just cover ``height`` x ``width``."""
    return max(height / image.height, width / image.width)


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = _scale(image, height, width)
    if scale == 1:  # nothing is scaled: cut out whole pixels
        x, y = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((x, y, x + width, y + height))
    # The part that will be seen, in the image's own pixels: a long thin image is not scaled as a whole first.
    seen_width, seen_height = min(width / scale, image.width), min(height / scale, image.height)
    left, top = (image.width - seen_width) / 2, (image.height - seen_height) / 2
    box = (left, top, min(left + seen_width, image.width), min(top + seen_height, image.height))  # never a rounding beyond
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)
