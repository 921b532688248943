"""Terms that objectives share. Log-probs are means over dimensions, as everywhere here."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo_grpo.grpo.objectives.base import SampleBatch
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


def ratio(step: Step, samples: SampleBatch, i: int) -> dict[str, Tensor]:
    """The statistic ``ratio`` ``[B]`` of objectives that do without it, where there is a density: before the first optimiser
    step it shows whether the replay is the rollout."""
    if step.log_prob is None:
        return {}
    return {"ratio": torch.exp(step.log_prob.detach() - samples.log_probs[:, i])}
