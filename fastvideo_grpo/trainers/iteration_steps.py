"""What an iteration does at each step of its samples, as far as that is not the same for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo_grpo.engines.make import uses_zero3
from fastvideo_grpo.grpo import timestep_weights
from fastvideo_grpo.grpo.dealing import Dealing
from fastvideo_grpo.grpo.objectives import Objective
from fastvideo_grpo.grpo.selection import MicroBatch
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.sampling.noise import SampleKey
from fastvideo_grpo.trainers.policy import Policy


def idle_predictions(policy: Policy, dealing: Dealing, iteration: int, prompts: list[Prompt]) -> int:
    """How many evaluations of the network this process's rollout lacks to the most that one makes.

    Groups differ in them where their stochastic steps lie elsewhere, and processes in how many groups they draw from. With its
    weights in partitions (ZeRO-3) every process takes part in every evaluation, so that all must make as many; else it is 0.
    """
    if not uses_zero3(policy.config):
        return 0
    seed = policy.config.run.seed
    made = [
        policy.steps.predictions_of(
            (group, SampleKey(seed, iteration, group, prompts[group].id, members[0]))
            for group, members in dealing.rollout_batches(rank)
        )
        for rank in range(policy.world.data_size)
    ]
    return max(made) - made[policy.world.data_rank]


def trained_timestep_weights(
    policy: Policy, objective: Objective, iteration: int, prompts: list[Prompt], chosen: list[list[MicroBatch]]
) -> Tensor:
    """What each transition but the last counts (``grpo.timesteps.weight``): float32 ``[T - 1]`` on the CPU, 1 on average over
    all that the iteration trains, over all processes. On clean samples each level counts as much."""
    config, steps = policy.config, policy.steps
    if steps.clean:
        return torch.ones(max(steps.steps, steps.trained))
    region = getattr(objective, "trust_region", None)
    table = timestep_weights.table(
        config.grpo.timesteps.weight,
        policy.transition,
        policy.schedule,
        normalised=region is not None and region.normalises,
    )
    if config.grpo.timesteps.weight == "none":
        return table
    keys = [
        SampleKey(config.run.seed, iteration, group, prompts[group].id, row.member)
        for group, batches in enumerate(chosen)
        for batch in batches
        for row in batch
        if row.weight > 0
    ]
    if not keys:
        return table
    mean = table.double()[steps.chosen(keys)].mean()
    return (table / mean).float()
