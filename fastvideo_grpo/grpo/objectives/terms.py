"""Terms that objectives share. Log-probs are means over dimensions, as everywhere here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo_grpo.grpo.objectives.base import CleanReplay, Replay, SampleBatch
from fastvideo_grpo.sampling.transitions import Step


def log_prob(step: Step) -> Tensor:
    """``step.log_prob`` ``[B]``; ValueError for a transition without a density."""
    if step.log_prob is None:
        raise ValueError("this transition has no density: the objective needs a noise level above 0")
    return step.log_prob


def within(advantages: Tensor, lower: float | None, upper: float | None) -> Tensor:
    """Advantages clamped to ``[-lower, upper]``; without an upper bound of its own to +- lower; lower None leaves them."""
    if lower is None:
        return advantages if upper is None else advantages.clamp(max=upper)
    return advantages.clamp(-lower, lower if upper is None else upper)


def kl(step: Step, reference: Step) -> Tensor:
    """KL of policy to reference ``[B]``: the closed form between Gaussians of one std at the same state,
    ``(mean - mean_ref)^2 / (2 std^2)`` averaged over dimensions."""
    squared = ((step.mean - reference.mean.detach()) ** 2).flatten(1).mean(1)
    return squared / (2 * step.std**2)


@dataclass(frozen=True)
class Penalty:
    """``kl_weight`` KL to the starting weights + ``ema_kl_weight`` KL to the moving average, each asked for where its weight is
    above 0."""

    kl_weight: float
    ema_kl_weight: float

    @property
    def needs_reference(self) -> bool:
        """The starting weights are asked for."""
        return self.kl_weight > 0

    @property
    def stored(self) -> tuple[str, ...]:
        """The weights whose stored outputs are asked for."""
        return ("ema",) if self.ema_kl_weight > 0 else ()

    def of_step(self, step: Step, replay: Replay, i: int) -> tuple[Tensor | float, dict[str, Tensor]]:
        """That of a sampler's step ``[B]`` (:func:`kl`), and the statistics ``kl``, ``ema_kl``."""
        return self._sum(lambda: kl(step, replay.reference(i)), lambda: kl(step, replay.ema(i)))

    def of_velocity(self, velocity: Tensor, replay: CleanReplay, i: int) -> tuple[Tensor | float, dict[str, Tensor]]:
        """The same on clean samples, ``mean((u - u')^2)``: the KL between the Gaussians that velocities stand for, up to a
        factor of the level."""
        return self._sum(lambda: error(velocity, replay.reference(i)), lambda: error(velocity, replay.stored("ema", i)))

    def _sum(
        self, to_reference: Callable[[], Tensor], to_average: Callable[[], Tensor]
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        total: Tensor | float = 0.0
        statistics = {}
        for name, weight, distance in (("kl", self.kl_weight, to_reference), ("ema_kl", self.ema_kl_weight, to_average)):
            if weight > 0:
                value = distance()
                total = total + weight * value
                statistics[name] = value.detach()
        return total, statistics


def error(velocity: Tensor, other: Tensor) -> Tensor:
    """``(u - v)^2``, a mean over dimensions, ``[B]``."""
    return ((velocity - other) ** 2).flatten(1).mean(1)


def ratio(step: Step, samples: SampleBatch, i: int) -> dict[str, Tensor]:
    """The statistic ``ratio`` ``[B]`` of objectives that do without it, where there is a density: before the first optimiser
    step it shows whether the replay is the rollout."""
    if step.log_prob is None:
        return {}
    return {"ratio": torch.exp(step.log_prob.detach() - samples.log_probs[:, i])}
