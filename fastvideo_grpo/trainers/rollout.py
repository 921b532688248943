"""What the rollout of an iteration leaves to its update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastvideo_grpo.prompts.files import Prompt

Trajectories = dict[Any, Tensor]
"""``(what, group, member)`` -> that part of a sample's trajectory, on the CPU."""


@dataclass
class Rollout:
    """What this rank drew in an iteration, and what everybody's rewards say of it.

    ``trajectories``: ``(what, group, member)`` -> what was kept of this rank's samples on the CPU, none where the leader of its
    sequence-parallel group has them: ``latents`` ``[n + 1, ...]``, ``log_probs`` ``[n]`` and, where they are asked for,
    ``means`` ``[n, ...]`` of n transitions; or ``clean``, the final latents, where the objective needs no more.
    ``scores``, ``valid``: reward name -> ``[P, G]``, all samples. ``raw``: the scores before the outputs' transforms.
    ``faults``: of each of ``FAULTS``, the samples that have it, bool ``[P, G]``.
    ``prompts``: of each group. ``retried``: requests to rewards that were made again.
    """

    prompts: list[Prompt]
    trajectories: Trajectories
    scores: dict[str, Tensor]
    raw: dict[str, Tensor]
    valid: dict[str, Tensor]
    faults: dict[str, Tensor]
    retried: int
