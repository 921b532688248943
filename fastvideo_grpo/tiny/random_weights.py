"""Random weights under published names, for models that no library here makes as they were published."""

from __future__ import annotations

import torch


class RandomWeights:
    """Draws tensors by name into `weights`, float32, one after the other: norms near one, all else small, so that a mapping
    that mixes up ones and zeros shows."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.weights: dict[str, torch.Tensor] = {}

    def add(self, name: str, *shape: int, mean: float = 0.0, std: float = 0.1) -> None:
        self.weights[name] = mean + std * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, rows: int, columns: int) -> None:
        self.add(f"{name}.weight", rows, columns)
        self.add(f"{name}.bias", rows)

    def norm(self, name: str, width: int) -> None:
        self.add(f"{name}.weight", width, mean=1.0)
        self.add(f"{name}.bias", width)
