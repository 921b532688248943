"""Evaluation on fixed noise with the ODE sampler: the same pictures-to-be before and after, so that curves compare.

Training rewards are jumpy (the group shares one noise and prompts change); this set does not change over a run.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.sampling.noise import SampleKey
from fastvideo_grpo.trainers.policy import Policy
from fastvideo_grpo.trainers.scoring import Scoring


@dataclass(frozen=True)
class FixedSamples:
    """``scores`` name -> float32 ``[prompts x samples]``, prompt by prompt, NaN if invalid; ``media`` uint8 ``[prompts x
    samples, F, H, W, 3]``, on rank 0 alone and where they were asked for; ``faults``: of each sample what of it is not finite
    (it is black, and has no scores), or None.
    """

    prompts: list[Prompt]
    samples: int
    media: Tensor | None
    scores: dict[str, Tensor]
    faults: list[str | None]

    def by_sample(self) -> list[dict[str, float | None]]:
        """Of each sample: name -> score, None if invalid (JSON knows no NaN)."""
        return [
            {name: None if math.isnan(score := scores[i].item()) else score for name, scores in self.scores.items()}
            for i in range(len(self.prompts) * self.samples)
        ]

    def summary(self) -> dict[str, float]:
        """``NAME/mean`` and ``NAME/stderr`` of each reward, and ``not_finite``, the samples that are left out of them.

        The standard error is that of the mean over prompts (samples of one prompt are not independent).
        """
        result: dict[str, float] = {"not_finite": sum(fault is not None for fault in self.faults)}
        for name, scores in self.scores.items():
            per_prompt = scores.view(len(self.prompts), self.samples).double().nanmean(1)
            per_prompt = per_prompt[per_prompt.isfinite()]
            result[f"{name}/mean"] = per_prompt.mean().item()
            result[f"{name}/stderr"] = (per_prompt.std() / len(per_prompt) ** 0.5).item() if len(per_prompt) > 1 else 0.0
        return result


def sample_fixed(
    policy: Policy,
    scoring: Scoring | None,
    prompts: Sequence[Prompt],
    samples: int,
    stream: str,
    *,
    keep_media: bool = True,
) -> FixedSamples:
    """Draw ``samples`` of each prompt with the ODE sampler from noise keyed by (prompt, member), and score them (without
    ``scoring`` they have no scores).

    Not by the run's seed: runs of several seeds are judged on the same noise.

    All ranks call it and get the same scores; each does a share of the prompts. Media that nobody will look at
    (``keep_media``: false) are dropped as soon as they are scored: a set of clips is gigabytes.
    """
    world, size = policy.world, policy.config.engine.micro_batch_size
    jobs = [(p, start) for p in range(len(prompts)) for start in range(0, samples, size)]
    rounds = -(-len(jobs) // world.data_size)
    parts: dict[tuple[int, int], tuple[dict[str, Tensor], list[str | None]]] = {}
    media: dict[Hashable, Tensor] = {}
    if scoring is not None:
        scoring.begin()
    before: int | None = None
    for turn in range(rounds):
        # Every rank runs the same number of forwards (a sharded network needs all ranks): the last turn may repeat a job.
        p, start = jobs[min(turn * world.data_size + world.data_rank, len(jobs) - 1)]
        if before is not None and p != before:
            policy.forget_conditioning(prompts[before])  # it will not be asked for again
        before = p
        members = list(range(start, min(start + size, samples)))
        keys = [SampleKey(0, 0, 0, prompts[p].id, member, stream) for member in members]
        drawn = policy.draw_fixed(prompts[p], keys)
        if drawn.media is None:
            continue  # the leader of this sequence-parallel group has the same samples
        scores, faults = {}, drawn.faults()
        if scoring is not None:
            scored = scoring.score(prompts[p], drawn.media)
            sound = torch.tensor([fault is None for fault in faults])
            scores = {n: torch.where(scored.valid[n] & sound, scored.scores[n], torch.nan) for n in scored.scores}
        if (p, start) not in parts:
            policy.note_faults(faults)
        parts[p, start] = scores, faults
        if keep_media:
            media[p, start] = drawn.media
    gathered: dict[tuple[int, int], tuple[dict[str, Tensor], list[str | None]]] = {}
    for part in world.all_gather_object(parts):
        gathered.update(part)
    scores = {name: torch.cat([gathered[job][0][name] for job in jobs]) for name in gathered[jobs[0]][0]}
    faults = [fault for job in jobs for fault in gathered[job][1]]
    if keep_media:
        leaders: dict[Hashable, int] = {job: turn % world.data_size * world.sequence_parallel for turn, job in enumerate(jobs)}
        media = world.exchange(media, [jobs if rank == 0 else [] for rank in range(world.size)], leaders)
    whole = torch.cat([media[job] for job in jobs]) if keep_media and world.rank == 0 else None
    return FixedSamples(list(prompts), samples, whole, scores, faults)
