"""Recomputing, with the current weights, what the rollout did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.grpo import objectives
from fastvideo_grpo.grpo.advantages import Advantages
from fastvideo_grpo.grpo.dealing import Dealing
from fastvideo_grpo.grpo.selection import MicroBatch
from fastvideo_grpo.prompts.embeddings import Conditioning
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.rewards.reward_set import RewardSet
from fastvideo_grpo.sampling.noise import SampleKey
from fastvideo_grpo.sampling.rollout import Trajectory, finite_rows
from fastvideo_grpo.sampling.transitions import Step
from fastvideo_grpo.trainers.decoding import as_rows
from fastvideo_grpo.trainers.not_finite import DECODING, SAMPLING
from fastvideo_grpo.trainers.policy import Policy
from fastvideo_grpo.trainers.rollout import Rollout, Trajectories


class TrajectoryReplay:
    """The :class:`~fastvideo_grpo.grpo.objectives.Replay` of a micro-batch of one prompt.

    Args:
        trajectory: of the rows; only the states of one timestep at a time go to the device.
        timesteps: int64 ``[B, n]`` on the CPU.
        conditioning: the network's, ``[B, ...]``.
        prompt: what the rewards are told.
    """

    def __init__(
        self,
        policy: Policy,
        rewards: RewardSet,
        trajectory: Trajectory,
        timesteps: Tensor,
        conditioning: Conditioning,
        prompt: Prompt,
    ) -> None:
        self.policy = policy
        self.rewards = rewards
        self.trajectory = trajectory
        self.timesteps = timesteps
        self.conditioning = conditioning
        self.prompt = prompt

    def step(self, i: int) -> Step:
        """The stored transition of each row at its ``i``-th timestep under the current weights, with gradients."""
        index, kept = self.timesteps[:, i], self.trajectory.latents
        rows, at = self._at(i)
        device = self.policy.world.device
        sample, next_sample = kept[rows, at].to(device), kept[rows, at + 1].to(device)
        level, next_level = self.policy.schedule.at(index), self.policy.schedule.at(index + 1)
        output = self.policy.predict(sample, level, self.conditioning)
        return self.policy.transition.step(output, sample, level, next_level, next_sample=next_sample)

    def reference(self, i: int) -> Step:
        """The same under the reference weights, without gradients."""
        with torch.no_grad(), self.policy.reference_weights():
            return self.step(i)

    def old_mean(self, i: int) -> Tensor:
        """The mean of that transition in the rollout."""
        assert self.trajectory.means is not None
        return self.trajectory.means[self._at(i)].to(self.policy.world.device)

    def _at(self, i: int) -> tuple[Tensor, Tensor]:
        """(row, place in the trajectory) of each row's ``i``-th timestep."""
        return torch.arange(len(self.timesteps)), self.timesteps[:, i] - self.trajectory.first

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels in [0, 1], with gradients; samples that are not finite are NaN, and counted."""
        pixels = self.policy.decode(latents, differentiable=True)
        sampled, decoded = finite_rows(latents.detach()).tolist(), finite_rows(pixels.detach()).tolist()
        self.policy.note_faults(
            [SAMPLING if not drawn else DECODING if not shown else None for drawn, shown in zip(sampled, decoded, strict=True)]
        )
        return pixels

    def reward(self, pixels: Tensor) -> Tensor:
        """The weighted sum of the rewards of ``pixels`` ``[B, F, H, W, 3]``, ``[B]`` with gradients; not finite where the
        pixels are not, which no reward is shown, or where one of them could not judge a row, which is counted and named as a
        failure of the rollout's scoring is."""
        rewards, count = self.rewards, len(pixels)
        finite = finite_rows(pixels.detach())
        shown = torch.where(as_rows(finite, pixels), pixels, 0.0)
        scores = rewards.differentiable(shown, [self.prompt.text] * count, [self.prompt.metadata] * count)
        total = torch.zeros(count, device=pixels.device)
        for name, weight in rewards.weights.items():
            if weight == 0:
                continue
            score = scores[name].to(total)
            unjudged = int((~score.isfinite() & finite).sum())
            if unjudged:
                rewards.note(f"reward {name}: no gradient: it could not judge a sample of an update", unjudged, count)
            total = total + weight * score
        return torch.where(finite, total, torch.nan)


def fetch_trajectories(
    update: int, rollout: Rollout, chosen: list[list[MicroBatch]], dealing: Dealing, world: World, *, means: bool
) -> Trajectories:
    """The trajectories this rank trains on in an update, from who has them: the leader of its own sequence-parallel group, or
    another's, since best-of-N may put a sample with a group that did not draw it; ``means``: with those of the transitions. All
    ranks call it."""
    size = world.sequence_parallel
    owners = {key: data_rank * size for key, data_rank in dealing.owners().items()}
    kinds = ("latents", "log_probs", *(("means",) if means else ()))
    wanted: list[list[Any]] = []
    for rank in range(world.size):
        keys = [
            (what, group, row.member)
            for group, k in dealing.update_batches(update, rank // size)
            for row in chosen[group][k]
            for what in kinds
        ]
        wanted.append(list(dict.fromkeys(keys)))
    owner: dict[Any, int] = {(what, *key): rank for key, rank in owners.items() for what in kinds}
    return world.exchange(rollout.trajectories, wanted, owner)


def replay_batch(
    policy: Policy,
    rewards: RewardSet,
    iteration: int,
    rollout: Rollout,
    trajectories: Trajectories,
    advantages: Advantages,
    group: int,
    batch: MicroBatch,
) -> tuple[TrajectoryReplay, objectives.SampleBatch]:
    """An update micro-batch of a group, as an objective is given it: what can be computed again, and what is known of it."""
    config, prompt, device = policy.config, rollout.prompts[group], policy.world.device
    members = [row.member for row in batch]
    keys = [SampleKey(config.run.seed, iteration, group, prompt.id, member) for member in members]
    steps, chosen = policy.steps, policy.steps.chosen(keys)
    kept = {
        what: torch.stack([trajectories[what, group, member] for member in members])
        for what in ("latents", "log_probs", *(("means",) if steps.keeps_means else ()))
    }
    first = steps.kept_span(steps.stochastic.span(keys)).first
    trajectory = Trajectory(kept["latents"], kept["log_probs"], kept.get("means"), first)
    samples = objectives.SampleBatch(
        advantages=advantages.values[group, members].to(device),
        log_probs=trajectory.log_probs.gather(1, chosen - first.unsqueeze(1)).to(device),
        timesteps=chosen,
        weights=torch.tensor([row.weight for row in batch], device=device),
    )
    conditioning = policy.conditioning(prompt, len(members))
    return TrajectoryReplay(policy, rewards, trajectory, chosen, conditioning, prompt), samples
