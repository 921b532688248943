"""Objectives: what an update minimises, per sample and trained timestep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastvideo_grpo.sampling.transitions import Step


@dataclass(frozen=True)
class SampleBatch:
    """The rows of an update micro-batch, on the device.

    ``advantages`` float32 ``[B]``, ``log_probs`` float32 ``[B, n]`` of the rollout at the chosen timesteps, ``timesteps``
    int64 ``[B, n]`` (CPU), ``weights`` float32 ``[B]`` (0 for rows that only fill the micro-batch).
    """

    advantages: Tensor
    log_probs: Tensor
    timesteps: Tensor
    weights: Tensor


class Replay(Protocol):
    """Recomputes, for a micro-batch, what the current weights say of the stored trajectory."""

    def step(self, i: int) -> Step:
        """The transition of each row at its ``i``-th chosen timestep, with gradients."""
        ...

    def reference(self, i: int) -> Step:
        """The same under the reference weights, without gradients."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels in [0, 1], with gradients."""
        ...


class Objective(Protocol):
    """``loss`` returns the loss of each row ``[B]`` for draw ``i``, and per-row statistics ``{name: [B]}``.

    One draw at a time, so that only one forward's activations are alive. The caller multiplies by the rows' weights and
    divides by the number of valid (sample, timestep) pairs of the whole update, over all ranks.
    """

    def loss(self, replay: Replay, samples: SampleBatch, i: int) -> tuple[Tensor, dict[str, Tensor]]: ...


class GRPO:
    """``max(-A rho, -A clip(rho, 1 - eps, 1 + eps))``, the negative of step 6 of Algorithm 1, plus ``kl_weight`` KL.

    ``rho = exp(log_prob - log_prob_old)``, both means over dimensions. KL is the closed form between the Gaussians of
    policy and reference at the same state, ``(mean - mean_ref)^2 / (2 std^2)`` averaged over dimensions.

    Args:
        clip_range: eps.
        advantage_clip: advantages are clamped to +- this before use; None leaves them.
        kl_weight: 0 asks for no reference.
    """

    def __init__(self, *, clip_range: float, advantage_clip: float | None, kl_weight: float) -> None:
        self.clip_range = clip_range
        self.advantage_clip = advantage_clip
        self.kl_weight = kl_weight

    def loss(self, replay: Replay, samples: SampleBatch, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Objective`; statistics: ``ratio``, ``clipped`` and, with a KL weight, ``kl``."""
        step = replay.step(i)
        if step.log_prob is None:
            raise ValueError("this transition has no density: GRPO needs a noise level above 0")
        advantage = samples.advantages
        if self.advantage_clip is not None:
            advantage = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        ratio = torch.exp(step.log_prob - samples.log_probs[:, i])
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        loss = torch.maximum(-advantage * ratio, -advantage * clipped)
        stats = {"ratio": ratio.detach(), "clipped": ((ratio.detach() - 1).abs() > self.clip_range).float()}
        if self.kl_weight > 0:
            reference = replay.reference(i)
            squared = ((step.mean - reference.mean.detach()) ** 2).flatten(1).mean(1)
            kl = squared / (2 * step.std**2)
            loss = loss + self.kl_weight * kl
            stats["kl"] = kl.detach()
        return loss, stats


_OBJECTIVES: dict[str, Callable[..., Objective]] = {}


def register(name: str, make: Callable[..., Objective]) -> None:
    """Make ``get(name, **settings)`` return ``make(**settings)``; a taken name raises ValueError."""
    if name in _OBJECTIVES:
        raise ValueError(f"objective {name!r} is registered already")
    _OBJECTIVES[name] = make


def names() -> list[str]:
    """The registered objectives."""
    return sorted(_OBJECTIVES)


def get(name: str, *, clip_range: float, advantage_clip: float | None, kl_weight: float) -> Objective:
    """The objective called ``name``.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; known: {', '.join(names())}")
    return _OBJECTIVES[name](clip_range=clip_range, advantage_clip=advantage_clip, kl_weight=kl_weight)


register("grpo", GRPO)
