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


def clipped_surrogate(
    step: Step, samples: SampleBatch, i: int, *, clip_range: float, advantage_clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """``max(-A rho, -A clip(rho, 1 - eps, 1 + eps))`` ``[B]`` with ``rho = exp(log_prob - log_prob_old)``; where rho is 1 its
    gradient is that of ``-A log_prob``, the policy gradient (Schulman et al. 2017, arXiv:1707.06347).

    Args:
        clip_range: eps.
        advantage_clip: advantages are clamped to +- this before use; None leaves them.

    Returns:
        the loss, and the statistics ``ratio`` and ``clipped`` (whether rho is outside the range).
    """
    advantage = samples.advantages
    if advantage_clip is not None:
        advantage = advantage.clamp(-advantage_clip, advantage_clip)
    ratio = torch.exp(log_prob(step) - samples.log_probs[:, i])
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    return loss, {"ratio": ratio.detach(), "clipped": ((ratio.detach() - 1).abs() > clip_range).float()}


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
