"""DiffusionNFT, contrasting what good and bad samples say of the velocity (Zheng et al. 2025, arXiv:2509.16117)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvideo_grpo.grpo.objectives import terms
from fastvideo_grpo.grpo.objectives.base import CleanReplay, SampleBatch
from fastvideo_grpo.grpo.objectives.checked import positive_number
from fastvideo_grpo.sampling.noised import Noised

SMALLEST = 1e-5
"""That an error is divided by at least."""


class NFT:
    """``A_max (r l(v+) + (1 - r) l(v-)) / beta``, with the velocity u, that of the weights that drew the samples u_old, and

        ``v+ = beta u + (1 - beta) u_old``, ``v- = (1 + beta) u_old - beta u``,
        ``r = A / (2 A_max) + 1/2`` for advantages clamped to +- A_max,
        ``l(v) = mean((z - t v - x)^2) / max(mean |z - t v - x|, 1e-5)``, its denominator a constant,

    at clean samples x with noise, ``z = (1 - t) x + t e``. Plus ``kl_weight mean((u - u_ref)^2)`` and ``ema_kl_weight
    mean((u - u_ema)^2)``. The paper's old weights follow the trained ones (``grpo.old_weights``), and draw the samples.

    Args:
        advantage_clip: A_max.
        kl_weight, ema_kl_weight: 0 asks for no reference, or average.
        beta: how far v+ and v- lie from u_old.

    Raises:
        ValueError: beta is not a finite number above 0, or there is no A_max.
    """

    clean = True
    needs_reward_gradients = False
    pairs = False
    defaults: ClassVar[dict[str, Any]] = {
        "sample": {"init_noise": "per_sample", "stochastic": {"steps": "none"}},
        "grpo": {
            "timesteps": {"strategy": "first", "fraction": 0.9},
            "kl_weight": 1e-4,
            "old_weights": {"decay": 0.5, "ramp": 0.001},
        },
    }

    def __init__(self, *, advantage_clip: float | None, kl_weight: float, ema_kl_weight: float, beta: float = 1.0) -> None:
        if advantage_clip is None:
            raise ValueError(
                "grpo.advantage_clip is null, but objective nft divides advantages by it: set it, for example to 5"
            )
        self.beta = positive_number("beta", beta)
        self.advantage_clip = advantage_clip
        self.penalty = terms.Penalty(kl_weight, ema_kl_weight)
        self.needs_reference, self.stored = self.penalty.needs_reference, ("old", *self.penalty.stored)

    def loss(self, replay: CleanReplay, samples: SampleBatch, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Objective`; statistics: ``ratio`` as :class:`~fastvideo_grpo.grpo.objectives.awm.AWM` has it and, where
        they have weights, ``kl``, ``ema_kl``."""
        noised, velocity, old = replay.noised(i), replay.velocity(i), replay.stored("old", i)
        limit = self.advantage_clip
        share = samples.advantages.clamp(-limit, limit) / (2 * limit) + 0.5
        better = self.beta * velocity + (1 - self.beta) * old
        worse = (1 + self.beta) * old - self.beta * velocity
        loss = limit * (share * _error(noised, better) + (1 - share) * _error(noised, worse)) / self.beta
        penalty, statistics = self.penalty.of_velocity(velocity, replay, i)
        target = noised.target
        log_ratio = terms.error(old, target) - terms.error(velocity.detach(), target)
        return loss + penalty, {"ratio": torch.exp(log_ratio), **statistics}


def _error(noised: Noised, velocity: Tensor) -> Tensor:
    """l(v) ``[B]``."""
    off = noised.state - noised.time * velocity - noised.clean
    size = off.detach().abs().flatten(1).mean(1).clamp(min=SMALLEST)
    return (off**2).flatten(1).mean(1) / size
