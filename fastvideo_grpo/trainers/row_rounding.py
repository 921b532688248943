"""Whether what the network says of a sample depends on the row that the sample has in a micro-batch.

It may, by rounding: a kernel computes the last elements of a tensor, or of a thread's part of it, one by one where it computes
the others in vectors (SiLU on AVX-512), and threads share the rows of a matrix product unevenly. That follows from sizes,
threads and the machine; no rule says when, so it is tried.
"""

from __future__ import annotations

import torch

from fastvideo_grpo.grpo.dealing import Dealing
from fastvideo_grpo.grpo.objectives.base import Objective
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.sampling import noise
from fastvideo_grpo.sampling.noise import SampleKey
from fastvideo_grpo.tracking.console import Console
from fastvideo_grpo.trainers.policy import Policy

_LEVELS = 4
"""States that are tried: a few elements that are rounded differently may agree by chance in one of them."""


def keep_rows_apart(policy: Policy, prompt: Prompt, dealing: Dealing, objective: Objective, console: Console) -> None:
    """Decide on ``policy.rows_apart``, and say so: only where samples may be trained on in other rows of a micro-batch than
    they were drawn in (best-of-N, pairs), and where the network's roundings depend on the row. All processes call it."""
    size = dealing.micro_batch_size
    moves = objective.pairs or dealing.moves_rows
    # A resumed run goes on as it began: with other weights the trial may end otherwise.
    policy.rows_apart = policy.rows_apart or (moves and size > 1 and row_matters(policy, prompt, size))
    if policy.rows_apart:
        console.say(
            f"the network rounds differently in different rows of a micro-batch of {size} (engine.micro_batch_size) here, "
            f"and {'pairs' if objective.pairs else 'best-of-N'} put samples into other rows than they were drawn in: "
            "each sample passes through the network by itself, so that ratios stay exactly 1"
        )


def row_matters(policy: Policy, prompt: Prompt, count: int) -> bool:
    """Whether ``count`` equal rows come out of the network unequal, on any process. All processes call it."""
    conditioning = policy.conditioning(prompt, count)
    unequal = False
    for i in range(_LEVELS):
        key = SampleKey(policy.config.run.seed, 0, 0, prompt.id, i, stream="rows")
        initial = noise.initial_noise([key], policy.latent_shape(), shared=False).repeat_interleave(count, dim=0)
        sample = policy.pack(initial).to(policy.world.device).contiguous()
        level = policy.schedule.at(torch.full((count,), i * policy.schedule.steps // _LEVELS))
        with torch.no_grad(), policy.pass_context(conditioning):
            output = policy.predict(sample, level, conditioning)
        unequal = unequal or not torch.equal(output, output[:1].expand_as(output))
    return policy.world.all_reduce_sum(torch.tensor([float(unequal)], dtype=torch.float64)).item() > 0
