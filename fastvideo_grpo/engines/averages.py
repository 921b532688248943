"""Weights that follow the trained ones, in float32, each rank holding the piece whose weights it holds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastvideo_grpo.grpo.decay import Decay

CALLED = {"ema": "EMA weights", "old": "old weights"}
"""The averages that a run may have: what a person calls them."""


class AveragedWeights:
    """``average = decay * average + (1 - decay) * weight``, whenever it is told to move.

    Under ZeRO every rank averages its own piece of the float32 weights: the memory is shared over ranks, and no move costs an
    exchange.

    Args:
        decay: of each move.
        device: where the averages lie; "cpu" leaves the accelerator's memory to the model, at the price of one copy of
            the pieces per move.

    Attributes:
        moves: made so far.
    """

    def __init__(self, decay: Decay, device: str | torch.device = "cpu") -> None:
        self.decay = decay
        self.device = torch.device(device)
        self.moves = 0
        self._pieces: dict[str, Tensor] = {}

    def start(self, weights: Iterable[tuple[str, Tensor]], moves: int = 0) -> None:
        """Begin (again) at these flat float32 pieces, given as (name, piece), after so many moves."""
        self._pieces = {name: weight.detach().to(self.device, torch.float32, copy=True) for name, weight in weights}
        self.moves = moves

    @torch.no_grad()
    def move(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Move towards the weights; same names and pieces as at the start."""
        decay = self.decay.at(self.moves)
        for name, weight in weights:
            self._pieces[name].mul_(decay).add_(weight.to(self.device), alpha=1 - decay)
        self.moves += 1

    def piece(self, name: str) -> Tensor:
        """This rank's piece of one parameter's average, flat float32."""
        return self._pieces[name]
