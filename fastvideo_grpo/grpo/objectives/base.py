"""What an objective is given, and what it must say of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fastvideo_grpo.sampling.noised import Noised
from fastvideo_grpo.sampling.transitions import Step

STORED = ("old", "ema")
"""Weights whose outputs are stored before an iteration's first update: those that drew its samples, and the moving average."""

AdvantageRange = tuple[float | None, float | None]
"""How far advantages may be below 0 and above (None: as below); without the first they are left as they are."""


@dataclass(frozen=True)
class SampleBatch:
    """The rows of an update micro-batch, on the device.

    ``advantages`` float32 ``[B]``; ``log_probs`` float32 ``[B, n]`` of the rollout at the chosen timesteps, NaN where nothing
    has a density; ``timesteps`` int64 ``[B, n]`` (CPU): indices of the chosen transitions, 0 the noisiest; not the network's
    timestep; ``weights`` float32 ``[B]`` (0 for rows that only fill the micro-batch).
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

    def ema(self, i: int) -> Step:
        """The same under the moving average of the weights as it was before the iteration's first update."""
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


class CleanReplay(Protocol):
    """Recomputes, for a micro-batch, what weights say of its clean samples with noise, in the coordinates of a flow
    (:mod:`fastvideo_grpo.sampling.noised`)."""

    def noised(self, i: int) -> Noised:
        """Each row's clean sample at its ``i``-th level, with a noise of its own (or its group's, where ``pairs``)."""
        ...

    def velocity(self, i: int) -> Tensor:
        """What the current weights predict there, float32 ``[B, ...]``, with gradients."""
        ...

    def reference(self, i: int) -> Tensor:
        """What the reference weights predict there, without gradients."""
        ...

    def stored(self, weights: str, i: int) -> Tensor:
        """What the weights of that name in :data:`STORED` predicted there before the iteration's first update."""
        ...


class Objective(Protocol):
    """What an update minimises.

    Attributes:
        needs_reference: ``replay.reference`` is called: the starting weights must stay there.
        needs_reward_gradients: ``replay.decode`` and ``replay.reward`` are called: VAE and rewards must be differentiable, in
            this process and on the device.
        pairs: rows come in twos, the better (even) before the worse (odd) sample of a prompt, at the same timesteps.

    It may have more attributes: ``clean`` (default: false), it is given a :class:`CleanReplay` and needs no trajectory, so that
    any sampler may draw; ``stored`` (default: none), of :data:`STORED` the weights whose outputs it asks for;
    ``needs_old_means`` (default: false), ``replay.old_mean`` is called; and ``needs_density`` (default: true; not asked where
    ``clean``), false where steps without noise can be trained, too.

    What is registered may have an attribute ``defaults``, by section of the configuration: what the method's paper does around
    the loss, in place of keys' own defaults where a run leaves them out (a model's come before these).
    """

    needs_reference: bool
    needs_reward_gradients: bool
    pairs: bool

    def loss(self, replay: Any, samples: SampleBatch, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each row ``[B]`` for its ``i``-th chosen timestep, and per-row statistics ``{name: [B]}``; ``replay``: a
        :class:`Replay`, or where ``clean`` a :class:`CleanReplay`.

        One timestep at a time, so that only one forward's activations are alive. The caller multiplies by the rows' weights and
        divides by the number of valid (sample, timestep) pairs of the whole update, over all ranks.
        """
        ...
