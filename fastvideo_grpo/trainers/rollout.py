"""What the rollout of an iteration leaves to its update."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastvideo_grpo.prompts.files import Prompt


@dataclass
class Rollout:
    """What this rank drew in an iteration, and what everybody's rewards say of it.

    ``latents`` ``(group, member) -> [T + 1, ...]``, ``log_probs`` ``(group, member) -> [T]``: this rank's samples, none where
    the leader of its sequence-parallel group has them.
    ``scores``, ``valid``: reward name -> ``[P, G]``, all samples. ``raw``: the scores before the outputs' transforms.
    ``faults``: of each of ``FAULTS``, the samples that have it, bool ``[P, G]``.
    ``prompts``: of each group. ``retried``: requests to rewards that were made again.
    """

    prompts: list[Prompt]
    latents: dict[tuple[int, int], Tensor]
    log_probs: dict[tuple[int, int], Tensor]
    scores: dict[str, Tensor]
    raw: dict[str, Tensor]
    valid: dict[str, Tensor]
    faults: dict[str, Tensor]
    retried: int
