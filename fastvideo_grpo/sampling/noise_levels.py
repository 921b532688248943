"""How much noise a transition adds, as a function of where it stands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo_grpo.sampling.schedules import Level

NOISE_SCHEDULES = ("constant", "flow_grpo")


@dataclass(frozen=True)
class NoiseLevel:
    """The paper's epsilon_t, DDIM's eta, or what a transition takes it for.

    Attributes:
        scale: 0 is no noise.
        schedule: ``constant`` (the paper): ``scale``; ``flow_grpo``: ``scale sqrt(sigma / (1 - sigma))``, with the sigma of the
            second level in the root's denominator at the first, where 1 - sigma is 0 (Liu et al. 2025, arXiv:2505.05470).
        decay: the level is multiplied by ``t ** decay``, ``t = timestep / 1000`` from 1 (noise) to 0 (data); 0 leaves it, 1
            lets it fall linearly.

    Raises:
        ValueError: a negative number, an unknown schedule, or a decay of a schedule that has its own.
    """

    scale: float = 0.0
    schedule: str = "constant"
    decay: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("noise_level", self.scale), ("noise_decay", self.decay)):
            if value < 0:
                raise ValueError(f"{name} must not be negative; got {value}")
        if self.schedule not in NOISE_SCHEDULES:
            raise ValueError(f"unknown noise_schedule {self.schedule!r}; known: {', '.join(NOISE_SCHEDULES)}")
        if self.decay and self.schedule != "constant":
            raise ValueError(
                f"noise_decay is {self.decay:g}, but noise_schedule {self.schedule} falls by itself: set noise_decay=0, or "
                "noise_schedule=constant"
            )

    def at(self, level: Level, next_level: Level) -> float | Tensor:
        """Of each sample of a batch that steps from ``level`` to ``next_level``: float32 ``[B]`` on the CPU, or one for all."""
        if self.schedule == "flow_grpo":
            # By the index: the first sigma is 1 to rounding only, and its root would be anything.
            below = torch.where(level.index == 0, next_level.sigma, level.sigma)
            return self.scale * (level.sigma / (1 - below)).sqrt()
        if self.decay:
            return self.scale * (level.timestep / 1000) ** self.decay
        return self.scale
