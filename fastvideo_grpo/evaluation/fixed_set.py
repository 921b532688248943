"""Evaluation on fixed noise with the ODE sampler: the same pictures-to-be before and after, so that curves compare.

Training rewards are jumpy (the group shares one noise and prompts change); this set does not change over a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.sampling.noise import SampleKey

if TYPE_CHECKING:
    from fastvideo_grpo.trainers.base import GRPOTrainer


@dataclass(frozen=True)
class FixedSamples:
    """``media`` uint8 ``[prompts x samples, F, H, W, 3]``, prompt by prompt; ``scores`` name -> float32, NaN if invalid."""

    prompts: list[Prompt]
    samples: int
    media: Tensor
    scores: dict[str, Tensor]

    def summary(self) -> dict[str, float]:
        """``NAME/mean`` and ``NAME/stderr`` of each reward.

        The standard error is that of the mean over prompts (samples of one prompt are not independent).
        """
        result = {}
        for name, scores in self.scores.items():
            per_prompt = scores.view(len(self.prompts), self.samples).double().nanmean(1)
            per_prompt = per_prompt[per_prompt.isfinite()]
            result[f"{name}/mean"] = per_prompt.mean().item()
            result[f"{name}/stderr"] = (per_prompt.std() / len(per_prompt) ** 0.5).item() if len(per_prompt) > 1 else 0.0
        return result


def sample_fixed(trainer: GRPOTrainer, prompts: Sequence[Prompt], samples: int, stream: str) -> FixedSamples:
    """Draw ``samples`` of each prompt with the ODE sampler from noise keyed by (prompt, member), and score them.

    Not by the run's seed: runs of several seeds are judged on the same noise.

    All ranks call it and get the same result; each does a share of the prompts.
    """
    world, size = trainer.world, trainer.config.engine.micro_batch_size
    jobs = [(p, start) for p in range(len(prompts)) for start in range(0, samples, size)]
    rounds = -(-len(jobs) // world.data_size)
    parts: dict[tuple[int, int], tuple[Tensor, dict[str, Tensor]]] = {}
    for turn in range(rounds):
        # Every rank runs the same number of forwards (a sharded network needs all ranks): the last turn may repeat a job.
        p, start = jobs[min(turn * world.data_size + world.data_rank, len(jobs) - 1)]
        members = list(range(start, min(start + size, samples)))
        keys = [SampleKey(0, 0, 0, prompts[p].id, member, stream) for member in members]
        drawn = trainer.draw(prompts[p], keys, deterministic=True)
        if drawn.media is None:
            continue  # the leader of this sequence-parallel group has the same samples
        scores: dict[str, Tensor] = {}
        if trainer.config.rewards.models:
            scored = trainer.score(prompts[p], drawn.media)
            scores = {n: torch.where(scored.valid[n] & drawn.finite, scored.scores[n], torch.nan) for n in scored.scores}
        parts[p, start] = drawn.media, scores
    gathered: dict[tuple[int, int], tuple[Tensor, dict[str, Tensor]]] = {}
    for part in world.all_gather_object(parts):
        gathered.update(part)
    media = torch.cat([gathered[job][0] for job in jobs])
    names = list(gathered[jobs[0]][1])
    return FixedSamples(
        list(prompts), samples, media, {name: torch.cat([gathered[job][1][name] for job in jobs]) for name in names}
    )
