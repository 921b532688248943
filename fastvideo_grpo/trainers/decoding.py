"""Pixels out of a VAE, and whether they are numbers: decided before anything is clamped or rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo_grpo.sampling.rollout import finite_rows


class DecoderWatch:
    """Whether each of ``samples`` samples went through a VAE's decoder in finite numbers: ``finite``, bool ``[B]``.

    A VAE that clamps what its decoder gave (Wan's does) makes white of infinity, so the decoder itself is looked at: all that
    goes in and comes out while it is :meth:`attached <attached>`, tiles and single frames, too.
    """

    def __init__(self, samples: int, device: torch.device) -> None:
        self.finite = torch.ones(samples, dtype=torch.bool, device=device)

    @contextmanager
    def attached(self, vae: nn.Module) -> Iterator[None]:
        """Look at the VAE's ``decoder``, if it has one."""
        decoder = getattr(vae, "decoder", None)
        if not isinstance(decoder, nn.Module):
            yield
            return
        handle = decoder.register_forward_hook(self._look)
        try:
            yield
        finally:
            handle.remove()

    def _look(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for tensor in (*inputs, output):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim:
                rows = finite_rows(tensor.detach()).to(self.finite.device)
                # Fewer rows than samples: nobody says whose they are.
                self.finite &= rows if len(rows) == len(self.finite) else rows.all()


def as_rows(rows: Tensor, like: Tensor) -> Tensor:
    """``[B]`` in the shape ``[B, 1, ...]`` that ``torch.where`` spreads over ``like`` ``[B, ...]``."""
    return rows.view(-1, *([1] * (like.ndim - 1)))


def decode_checked(pixels_of: Callable[[Tensor], Tensor], vae: nn.Module, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Decode final latents ``[B, ...]``.

    Args:
        pixels_of: latents -> pixels ``[B, 3, F, H, W]`` as the VAE gives them, 0 black and 1 white, not clamped.

    Returns:
        The pixels clamped to [0, 1], float32, and which samples are finite all the way from latents to pixels: bool ``[B]``,
        on their device.
    """
    watch = DecoderWatch(len(latents), latents.device)
    with watch.attached(vae):
        pixels = pixels_of(latents)
    finite = watch.finite & finite_rows(latents.detach()) & finite_rows(pixels.detach()).to(latents.device)
    return pixels.float().clamp(0, 1), finite
