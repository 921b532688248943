"""Exponential moving average of the weights, in float32, each rank holding the piece whose weights it holds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class ExponentialMovingAverage:
    """ema = decay * ema + (1 - decay) * weight after every update; no warm-up of the decay, and skipped updates do not
    move it.

    Under ZeRO every rank averages its own piece of the float32 weights: the memory is shared over ranks, and no update
    costs an exchange.

    Args:
        decay: between 0 (the weights themselves) and 1, exclusive.
        device: where the averages lie; "cpu" leaves the accelerator's memory to the model, at the price of one copy of
            the pieces per update.

    Raises:
        ValueError: decay out of range.
    """

    def __init__(self, decay: float, device: str | torch.device = "cpu") -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"optim.ema_decay is {decay}; it must be at least 0 and below 1 (0.999 is usual), or null for no EMA"
            )
        self.decay = decay
        self.device = torch.device(device)
        self._pieces: dict[str, Tensor] = {}

    def start(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Begin (again) at these flat float32 pieces, given as (name, piece)."""
        self._pieces = {name: weight.detach().to(self.device, torch.float32, copy=True) for name, weight in weights}

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Move towards the weights after one update; same names and pieces as at the start."""
        for name, weight in weights:
            self._pieces[name].mul_(self.decay).add_(weight.to(self.device), alpha=1 - self.decay)

    def piece(self, name: str) -> Tensor:
        """This rank's piece of one parameter's average, flat float32."""
        return self._pieces[name]
