"""What an objective is given, and what it must say of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastvideo_grpo.sampling.transitions import Step

AdvantageRange = tuple[float | None, float | None]
"""How far advantages may be below 0 and above (None: as below); without the first they are left as they are."""


@dataclass(frozen=True)
class SampleBatch:
    """The rows of an update micro-batch, on the device.

    ``advantages`` float32 ``[B]``; ``log_probs`` float32 ``[B, n]`` of the rollout at the chosen timesteps; ``timesteps``
    int64 ``[B, n]`` (CPU): indices of the chosen transitions, 0 the noisiest; not the network's timestep; ``weights`` float32
    ``[B]`` (0 for rows that only fill the micro-batch).
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

    def old_mean(self, i: int) -> Tensor:
        """The mean of that transition in the rollout, ``[B, ...]``: kept for objectives that say ``needs_old_means``."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels ``[B, F, H, W, 3]`` in [0, 1], with gradients."""
        ...

    def reward(self, pixels: Tensor) -> Tensor:
        """The weighted sum of the rewards of such pixels, ``[B]``, with gradients; not finite where one could not judge."""
        ...


class Objective(Protocol):
    """What an update minimises.

    Attributes:
        needs_reference: ``replay.reference`` is called: the starting weights must stay there.
        needs_reward_gradients: ``replay.decode`` and ``replay.reward`` are called: VAE and rewards must be differentiable, in
            this process and on the device.
        pairs: rows come in twos, the better (even) before the worse (odd) sample of a prompt, at the same timesteps.

    It may have two attributes more: ``needs_old_means`` (default: false), ``replay.old_mean`` is called; and ``needs_density``
    (default: true), false where steps without noise can be trained, too.

    What is registered may have an attribute ``defaults``, by section of the configuration: what the method's paper does around
    the loss, in place of keys' own defaults where a run leaves them out (a model's come before these).
    """

    needs_reference: bool
    needs_reward_gradients: bool
    pairs: bool

    def loss(self, replay: Replay, samples: SampleBatch, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each row ``[B]`` for its ``i``-th chosen timestep, and per-row statistics ``{name: [B]}``.

        One timestep at a time, so that only one forward's activations are alive. The caller multiplies by the rows' weights and
        divides by the number of valid (sample, timestep) pairs of the whole update, over all ranks.
        """
        ...
