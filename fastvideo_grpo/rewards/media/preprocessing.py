"""How published models want their pictures: each as its own code prepares them, since scores of one group lie close together.

HPS-v2.1: `prepare_for_hps`. Floats, longer side to 224, black bars.
open_clip's models: `open_clip_preprocessing`, from open_clip_config.json. PIL on uint8; DFN5B squashes to 378x378, OpenAI's and
    LAION's bring the shorter side to 224 and crop.
transformers' models, PickScore among them: `transformers_preprocessing`, from preprocessor_config.json. PIL on uint8; the crop
    lies half a pixel beside torchvision's where the margin is odd.
LAION's aesthetic predictor and ImageReward: `openai_preprocessing`, the transform of OpenAI's CLIP package.

PIL and torch differ: PIL's resampling rounds to uint8, so what overshoots 0..255 at sharp edges is cut off.

Each is there twice, for uint8 pictures, as published, and as a differentiable function of pictures in floating point, for
gradients of a reward. For PIL's the second is the same resampling and the same cutting off, but does not round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

# Of CLIP's training pictures, RGB in 0..1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Preparation(Protocol):
    """Pictures as a network takes them."""

    def __call__(self, pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
        """uint8 [B, H, W, 3], RGB -> float32 [B, 3, size, size] on `device`."""
        ...

    def differentiable(self, pixels: torch.Tensor) -> torch.Tensor:
        """float [B, H, W, 3], RGB in 0..1 -> float32 [B, 3, size, size] on the same device, with gradients."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """A published preparation on uint8 pictures, by PIL: resize, crop or pad to a square, normalise.

    size: side of the square in pixels. resize: "shortest" brings the shorter side to `resize_to` and crops the centre,
    "squash" brings both sides to it and crops the centre, "longest" brings the longer side to `size` and pads to a square
    with grey level `fill`. resize_to: at least `size`; None is `size`.
    crop: where the centre is when the margin is odd: "torchvision" rounds half to even, "transformers" down.
    """

    size: int
    resize: Literal["shortest", "squash", "longest"] = "shortest"
    resize_to: int | None = None
    filter: Image.Resampling = Image.Resampling.BICUBIC
    crop: Literal["torchvision", "transformers"] = "torchvision"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    fill: int = 0

    def __call__(self, pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
        """uint8 [B, H, W, 3], RGB -> float32 [B, 3, size, size] on `device`."""
        squares = np.stack([np.asarray(self._square(Image.fromarray(picture))) for picture in pictures.cpu().numpy()])
        pixels = torch.from_numpy(squares).to(device).permute(0, 3, 1, 2).contiguous().to(torch.float32) / 255
        return normalised(pixels, self.mean, self.std)

    def differentiable(self, pixels: torch.Tensor) -> torch.Tensor:
        """float [B, H, W, 3], RGB in 0..1 -> float32 [B, 3, size, size] on the same device, with gradients.

        On what bytes / 255 give, it differs from the published preparation by PIL's rounding alone: 1.1 levels of 255 at
        most, 0.4 in the mean (root mean square), before the normalisation. What PIL cuts off has gradient 0.
        """
        pictures = pixels.to(torch.float32).permute(0, 3, 1, 2)
        across, down = pictures.shape[-1], pictures.shape[-2]
        width, height = self._resized(across, down)
        with torch.autocast(pixels.device.type, enabled=False):
            # PIL's order; it rounds, and so cuts off, after each.
            pictures = (pictures @ _resampling(across, width, self.filter).to(pixels.device).T).clamp(0, 1)
            pictures = (_resampling(down, height, self.filter).to(pixels.device) @ pictures).clamp(0, 1)
        left, top = self._corner(width, height)
        if self.resize == "longest":
            right, bottom = self.size - width + left, self.size - height + top
            pictures = functional.pad(pictures, (-left, right, -top, bottom), value=self.fill / 255)
        else:
            pictures = pictures[..., top : top + self.size, left : left + self.size]
        return normalised(pictures, self.mean, self.std)

    def _square(self, picture: Image.Image) -> Image.Image:
        sides = self._resized(*picture.size)
        left, top = self._corner(*sides)
        picture = picture.resize(sides, self.filter)
        if self.resize == "longest":
            square = Image.new("RGB", (self.size, self.size), (self.fill,) * 3)
            square.paste(picture, (-left, -top))
            return square
        return picture.crop((left, top, left + self.size, top + self.size))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing, before the crop or the bars."""
        if self.resize == "longest":
            ratio = max(width, height) / self.size
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        target, short = self.resize_to or self.size, min(width, height)
        if self.resize == "squash":
            return target, target
        return int(target * width / short), int(target * height / short)

    def _corner(self, width: int, height: int) -> tuple[int, int]:
        """Where the square begins in the resized picture, (left, top); not above 0 where bars are added."""
        if self.resize == "longest":
            return -((self.size - width) // 2), -((self.size - height) // 2)
        return self._margin(width - self.size), self._margin(height - self.size)

    def _margin(self, both: int) -> int:
        return both // 2 if self.crop == "transformers" else round(both / 2)


@lru_cache(maxsize=32)
def _resampling(before: int, after: int, chosen: Image.Resampling) -> torch.Tensor:
    """float32 [after, before]: PIL's resampling of a line of `before` pixels, which is linear, as a matrix: what PIL makes of
    the identity. torch's antialiased interpolation knows two of PIL's filters, and cuts nothing off between the axes."""
    identity = Image.fromarray(np.eye(before, dtype=np.float32))
    return torch.from_numpy(np.array(identity.resize((after, before), chosen))).T.contiguous()


def openai_preprocessing(size: int) -> Preprocessing:
    """Of OpenAI's CLIP package: shorter side to `size`, bicubic, centre crop."""
    return Preprocessing(size)


def open_clip_preprocessing(config: Mapping[str, Any], size: int) -> Preprocessing:
    """From `preprocess_cfg` of an open_clip_config.json, for a network that takes `size` pixels. What it leaves out is as
    open_clip has it: shortest, bicubic, CLIP's mean and standard deviation.

    Raises ValueError for a value that open_clip does not have either.
    """
    resize: Any = config.get("resize_mode") or "shortest"
    if resize not in ("shortest", "squash", "longest"):
        raise ValueError(f"preprocess_cfg.resize_mode is {resize!r}; open_clip has shortest, squash and longest")
    interpolation = config.get("interpolation") or "bicubic"
    if interpolation not in ("bicubic", "bilinear", "random"):
        raise ValueError(f"preprocess_cfg.interpolation is {interpolation!r}; open_clip has bicubic and bilinear")
    # "random" is for training; open_clip evaluates such models bicubic.
    chosen = Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC
    mean, std = (_three(config.get(name) or default, name) for name, default in (("mean", MEAN), ("std", STD)))
    return Preprocessing(size, resize, filter=chosen, mean=mean, std=std, fill=int(config.get("fill_color") or 0))


def transformers_preprocessing(config: Mapping[str, Any], size: int) -> Preprocessing:
    """From a preprocessor_config.json of transformers' CLIPImageProcessor, for a network that takes `size` pixels. What it
    leaves out is as transformers has it: shorter side to 224, bicubic, centre crop to 224, CLIP's mean and deviation.

    Raises ValueError for steps that are switched off or that do not end in `size` pixels.
    """
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(step, True):
            raise ValueError(f"{step} is false; CLIP's pictures are resized, rescaled and normalised")
    factor = config.get("rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"rescale_factor is {factor}; it must be 1/255")
    asked = config.get("size", {"shortest_edge": 224})
    asked = {"shortest_edge": asked} if isinstance(asked, int) else asked
    crop = config.get("crop_size", 224)
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    squash = set(asked) == {"height", "width"} and asked["height"] == asked["width"]
    if not squash and set(asked) != {"shortest_edge"}:
        raise ValueError(f"size is {asked}; it must be a shortest_edge, or a height and a width that are equal")
    resize_to = asked["height"] if squash else asked["shortest_edge"]
    if config.get("do_center_crop", True):
        square = crop["height"] if crop["height"] == crop["width"] else None
    else:
        square = resize_to if squash else None
    if square != size or resize_to < size:
        cropped = f"crop_size {crop}" if config.get("do_center_crop", True) else "no crop"
        raise ValueError(f"size {asked} and {cropped} do not give the {size}x{size} pixels that the network takes")
    return Preprocessing(
        size,
        "squash" if squash else "shortest",
        resize_to,
        Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)),
        "transformers",
        _three(config.get("image_mean", MEAN), "image_mean"),
        _three(config.get("image_std", STD), "image_std"),
    )


@dataclass(frozen=True)
class HPSPreprocessing:
    """HPS's preparation for a network that takes `size` pixels: see `prepare_for_hps`."""

    size: int

    def __call__(self, pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
        """uint8 [B, H, W, 3], RGB -> float32 [B, 3, size, size] on `device`."""
        return prepare_for_hps(pictures.to(device), self.size)

    def differentiable(self, pixels: torch.Tensor) -> torch.Tensor:
        """float [B, H, W, 3], RGB in 0..1 -> float32 [B, 3, size, size] on the same device, with gradients: the same."""
        return prepare_for_hps(pixels, self.size)


def prepare_for_hps(media: torch.Tensor, size: int) -> torch.Tensor:
    """Pictures as HPS sees them: the longer side brought to `size`, then black bars to a square, then normalised.

    media: [B, H, W, 3], RGB, uint8 or in floating point in 0..1. Returns float32 [B, 3, size, size] on the same device, with
    gradients of floating-point pictures.

    The published code resizes floating-point pictures by antialiased bicubic interpolation, so what overshoots 0..1 at
    sharp edges stays, unlike in PIL's.
    """
    pictures = media.permute(0, 3, 1, 2).contiguous().to(torch.float32)
    if not media.is_floating_point():
        pictures = pictures / 255
    height, width = pictures.shape[-2:]
    scale = size / max(height, width)
    resized = max(1, round(height * scale)), max(1, round(width * scale))
    if resized != (height, width):
        pictures = functional.interpolate(pictures, resized, mode="bicubic", align_corners=False, antialias=True)
    rows, columns = size - resized[0], size - resized[1]
    top, left = rows // 2, columns // 2
    pictures = functional.pad(pictures, (left, columns - left, top, rows - top))
    return normalised(pictures, MEAN, STD)


def normalised(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """float32 [B, 3, H, W]: minus `mean`, divided by `std`, channel by channel."""
    centre, spread = (pixels.new_tensor(values)[:, None, None] for values in (mean, std))
    return (pixels - centre) / spread


def _three(values: Any, name: str) -> tuple[float, ...]:
    values = [values] * 3 if isinstance(values, int | float) else values
    if not isinstance(values, list | tuple) or len(values) != 3 or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"{name} is {values!r}; it must be three numbers, one a channel")
    return tuple(map(float, values))
