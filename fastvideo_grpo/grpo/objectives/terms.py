"""Terms that objectives share. Log-probs are means over dimensions, as everywhere here."""

from __future__ import annotations

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


def penalty(
    step: Step, replay: Replay, i: int, kl_weight: float, ema_kl_weight: float
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """``kl_weight`` KL to the reference + ``ema_kl_weight`` KL to the moving average ``[B]``, each asked for where its weight
    is above 0; and the statistics ``kl``, ``ema_kl``."""
    terms = {}
    if kl_weight > 0:
        terms["kl"] = kl_weight, kl(step, replay.reference(i))
    if ema_kl_weight > 0:
        terms["ema_kl"] = ema_kl_weight, kl(step, replay.ema(i))
    return _weighted(terms)


def clean_penalty(
    velocity: Tensor, replay: CleanReplay, i: int, kl_weight: float, ema_kl_weight: float
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """The same on clean samples, ``mean((u - u')^2)`` of velocities: the KL between the Gaussians that they stand for, up to a
    factor of the level."""
    terms = {}
    if kl_weight > 0:
        terms["kl"] = kl_weight, error(velocity, replay.reference(i))
    if ema_kl_weight > 0:
        terms["ema_kl"] = ema_kl_weight, error(velocity, replay.stored("ema", i))
    return _weighted(terms)


def _weighted(terms: dict[str, tuple[float, Tensor]]) -> tuple[Tensor | float, dict[str, Tensor]]:
    total: Tensor | float = 0.0
    for weight, value in terms.values():
        total = total + weight * value
    return total, {name: value.detach() for name, (_, value) in terms.items()}


def error(velocity: Tensor, other: Tensor) -> Tensor:
    """``(u - v)^2``, a mean over dimensions, ``[B]``."""
    return ((velocity - other) ** 2).flatten(1).mean(1)


def ratio(step: Step, samples: SampleBatch, i: int) -> dict[str, Tensor]:
    """The statistic ``ratio`` ``[B]`` of objectives that do without it, where there is a density: before the first optimiser
    step it shows whether the replay is the rollout."""
    if step.log_prob is None:
        return {}
    return {"ratio": torch.exp(step.log_prob.detach() - samples.log_probs[:, i])}
