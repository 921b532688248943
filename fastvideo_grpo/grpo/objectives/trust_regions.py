"""What keeps an update near the policy of its rollout: the clipped surrogate, and what came after it.

Log-probs are means over dimensions. ``mu``, ``s``: mean and standard deviation of the transition; ``delta = mu - mu_old``;
``rho = exp(log_prob - log_prob_old)``; ``A``: advantage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastvideo_grpo.grpo.objectives import terms
from fastvideo_grpo.grpo.objectives.base import Replay, SampleBatch
from fastvideo_grpo.sampling.transitions import Step

TRUST_REGIONS = ("clip", "guard", "dppo")


class TrustRegion(Protocol):
    """A surrogate of ``-A rho`` that does not lead away from the rollout's policy.

    Attributes:
        needs_old_means: it asks for ``replay.old_mean``, which the rollout must have kept.
        normalises: its log-ratio is ``s`` times that of the densities, and with it its gradient.
    """

    needs_old_means: bool
    normalises: bool

    def surrogate(
        self, step: Step, replay: Replay, samples: SampleBatch, i: int, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss ``[B]`` of the ``i``-th timesteps at ``advantages`` ``[B]``, and the statistics ``ratio``, ``clipped`` or
        ``masked``, and ``kl_rollout``."""
        ...


@dataclass(frozen=True)
class ClipRange:
    """A ratio's range ``[1 - lower, 1 + upper]``."""

    lower: float
    upper: float

    def surrogate(self, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """``max(-A rho, -A clip(rho))`` ``[B]`` (Schulman et al. 2017, arXiv:1707.06347), and where rho is outside, 0 or 1."""
        clipped = ratio.clamp(1 - self.lower, 1 + self.upper)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped)
        moved = ratio.detach() - 1
        return loss, ((moved > self.upper) | (-moved > self.lower)).float()


class Clip:
    """``max(-A rho, -A clip(rho))``, that of PPO and of the paper; where rho is 1 its gradient is that of ``-A log_prob``.

    ``kl_rollout`` is ``log_prob_old - log_prob``, the KL to the rollout's policy on average over samples.
    """

    needs_old_means = False
    normalises = False

    def __init__(self, clip_range: ClipRange) -> None:
        self.clip_range = clip_range

    def surrogate(
        self, step: Step, replay: Replay, samples: SampleBatch, i: int, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`TrustRegion`."""
        log_ratio = _log_ratio(step, samples, i)
        ratio = torch.exp(log_ratio)
        loss, clipped = self.clip_range.surrogate(ratio, advantages)
        return loss, {"ratio": ratio.detach(), "clipped": clipped, "kl_rollout": -log_ratio.detach()}


class Guard:
    """GRPO-Guard's normalised ratio (arXiv:2510.22319), clipped:
    ``log rho' = s (log_prob - log_prob_old) + mean(delta^2) / (2 s)``.

    The second term takes away what sinks rho below 1 whatever the update did; the factor s takes 1 / s out of the gradient.
    Both together are ``mean(noise delta)`` with the noise that the rollout drew, ``(z - mu_old) / s``, which is what is
    computed.
    """

    needs_old_means = True
    normalises = True

    def __init__(self, clip_range: ClipRange) -> None:
        self.clip_range = clip_range

    def surrogate(
        self, step: Step, replay: Replay, samples: SampleBatch, i: int, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`TrustRegion`."""
        _log_ratio(step, samples, i)  # there is a density
        old = replay.old_mean(i)
        delta, s = step.mean - old, step.std
        log_ratio = ((step.next_sample - old) * delta).flatten(1).mean(1) / s
        ratio = torch.exp(log_ratio)
        loss, clipped = self.clip_range.surrogate(ratio, advantages)
        return loss, {"ratio": ratio.detach(), "clipped": clipped, "kl_rollout": _kl(delta, s)}


class DPPO:
    """Flow-DPPO's mask (arXiv:2606.11025): ``-A rho``, and 0 without a gradient where the KL to the rollout's policy,
    ``mean(delta^2) / (2 s^2)``, has reached ``threshold`` and the update would go further (A above 0 and rho above 1, or both
    below). Rows that are left out stay in the mean.
    """

    needs_old_means = True
    normalises = False

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def surrogate(
        self, step: Step, replay: Replay, samples: SampleBatch, i: int, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`TrustRegion`."""
        ratio = torch.exp(_log_ratio(step, samples, i))
        kl = _kl(step.mean - replay.old_mean(i), step.std)
        further = ((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1))
        masked = further & (kl >= self.threshold)
        # Times 0, so that a batch of nothing else goes backwards, too, as on other processes.
        loss = -advantages * ratio * (~masked).float()
        return loss, {"ratio": ratio.detach(), "masked": masked.float(), "kl_rollout": kl}


def get(name: str, clip_range: float, clip_range_upper: float | None, threshold: float) -> TrustRegion:
    """The trust region called ``name``; ``clip_range_upper``: default as below.

    Raises:
        ValueError: an unknown name.
    """
    span = ClipRange(clip_range, clip_range if clip_range_upper is None else clip_range_upper)
    if name == "clip":
        return Clip(span)
    if name == "guard":
        return Guard(span)
    if name == "dppo":
        return DPPO(threshold)
    raise ValueError(f"unknown trust region {name!r}; known: {', '.join(TRUST_REGIONS)}")


def _log_ratio(step: Step, samples: SampleBatch, i: int) -> Tensor:
    return terms.log_prob(step) - samples.log_probs[:, i]


def _kl(delta: Tensor, std: Tensor) -> Tensor:
    """KL between Gaussians of one std, a mean over dimensions, ``[B]``, without a gradient."""
    return (delta.detach() ** 2).flatten(1).mean(1) / (2 * std**2)
