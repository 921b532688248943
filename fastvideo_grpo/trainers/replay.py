"""Recomputing, with the current weights, what the rollout did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastvideo_grpo.config.keys import guidance_of
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.grpo import objectives
from fastvideo_grpo.grpo.advantages import Advantages
from fastvideo_grpo.grpo.dealing import Dealing
from fastvideo_grpo.grpo.selection import MicroBatch
from fastvideo_grpo.prompts.embeddings import Conditioning
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.rewards.reward_set import RewardSet
from fastvideo_grpo.sampling.noise import SampleKey, forward_noise
from fastvideo_grpo.sampling.noised import Noised
from fastvideo_grpo.sampling.rollout import Trajectory, finite_rows
from fastvideo_grpo.sampling.schedules import Level
from fastvideo_grpo.sampling.transitions import Step
from fastvideo_grpo.trainers.decoding import as_rows
from fastvideo_grpo.trainers.not_finite import DECODING, SAMPLING
from fastvideo_grpo.trainers.policy import Policy
from fastvideo_grpo.trainers.rollout import Rollout, Trajectories


class _Replay(ABC):
    """What is the same whether a trajectory is replayed or clean samples get noise.

    Args:
        conditioning: the network's, ``[B, ...]``.
        prompt: what the rewards are told.
        stored: ``(weights, i)`` -> the network's output under them at the rows' ``i``-th timesteps, ``[B, ...]`` on the CPU.
    """

    def __init__(
        self,
        policy: Policy,
        rewards: RewardSet,
        conditioning: Conditioning,
        prompt: Prompt,
        stored: Mapping[tuple[str, int], Tensor],
    ) -> None:
        self.policy = policy
        self.rewards = rewards
        self.conditioning = conditioning
        self.prompt = prompt
        self._stored = stored

    @abstractmethod
    def place(self, i: int) -> tuple[Tensor, Level]:
        """The states ``[B, ...]`` at the rows' ``i``-th timesteps, on the device, and their levels."""

    def output(self, i: int) -> Tensor:
        """The network's output there under the weights that are in it, with gradients when they are enabled."""
        sample, level = self.place(i)
        with self.policy.guided(guidance_of(self.policy.config).training):
            return self.policy.predict(sample, level, self.conditioning)

    def stored_output(self, weights: str, i: int) -> Tensor:
        """That under weights whose outputs were stored, on the device."""
        return self._stored[weights, i].to(self.policy.world.device)


class CleanSamplesReplay(_Replay):
    """The :class:`~fastvideo_grpo.grpo.objectives.CleanReplay` of a micro-batch of one prompt.

    Args:
        clean: final latents of the rows, float32 ``[B, ...]`` on the CPU.
        noise: of a level's number, ``[B, ...]`` on the CPU.
        levels: of each row, one after the other.
    """

    def __init__(
        self, *args: Any, clean: Tensor, noise: Callable[[int], Tensor], levels: Sequence[Level], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._clean, self._noise, self._levels = clean, noise, levels
        self._last: tuple[int, Noised] | None = None

    def noised(self, i: int) -> Noised:
        """Each row's clean sample with its noise at its ``i``-th level: drawn once, however often it is asked for in a row."""
        if self._last is None or self._last[0] != i:
            device = self.policy.world.device
            clean, noise = self._clean.to(device), self._noise(i).to(device)
            self._last = i, Noised(clean, noise, self._levels[i], self.policy.transition.prediction)
        return self._last[1]

    def place(self, i: int) -> tuple[Tensor, Level]:
        return self.noised(i).sample, self._levels[i]

    def velocity(self, i: int) -> Tensor:
        """What the current weights predict there, with gradients."""
        return self.noised(i).velocity(self.output(i))

    def reference(self, i: int) -> Tensor:
        """What the reference weights predict there, without gradients."""
        with torch.no_grad(), self.policy.reference_weights():
            return self.velocity(i)

    def stored(self, weights: str, i: int) -> Tensor:
        """What the weights of that name predicted there before the iteration's first update."""
        return self.noised(i).velocity(self.stored_output(weights, i))


class TrajectoryReplay(_Replay):
    """The :class:`~fastvideo_grpo.grpo.objectives.Replay` of a micro-batch of one prompt.

    Args:
        trajectory: of the rows; only the states of one timestep at a time go to the device.
        timesteps: int64 ``[B, n]`` on the CPU.
    """

    def __init__(self, *args: Any, trajectory: Trajectory, timesteps: Tensor, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trajectory = trajectory
        self.timesteps = timesteps

    def place(self, i: int) -> tuple[Tensor, Level]:
        state = self.trajectory.latents[self._at(i)].to(self.policy.world.device)
        return state, self.policy.schedule.at(self.timesteps[:, i])

    def step(self, i: int) -> Step:
        """The stored transition of each row at its ``i``-th timestep under the current weights, with gradients."""
        return self._step(self.output(i), i)

    def reference(self, i: int) -> Step:
        """The same under the reference weights, without gradients."""
        with torch.no_grad(), self.policy.reference_weights():
            return self.step(i)

    def ema(self, i: int) -> Step:
        """The same under the moving average of the weights as it was before the iteration's first update."""
        return self._step(self.stored_output("ema", i), i)

    def _step(self, output: Tensor, i: int) -> Step:
        sample, level = self.place(i)
        rows, at = self._at(i)
        next_sample = self.trajectory.latents[rows, at + 1].to(sample.device)
        next_level = self.policy.schedule.at(self.timesteps[:, i] + 1)
        return self.policy.transition.step(output, sample, level, next_level, next_sample=next_sample)

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


AnyReplay: TypeAlias = TrajectoryReplay | CleanSamplesReplay


def fetch_trajectories(
    update: int, rollout: Rollout, chosen: list[list[MicroBatch]], dealing: Dealing, world: World, kinds: Sequence[str]
) -> Trajectories:
    """The trajectories this rank trains on in an update, from who has them: the leader of its own sequence-parallel group, or
    another's, since best-of-N may put a sample with a group that did not draw it; ``kinds``: which parts. All ranks call it."""
    size = world.sequence_parallel
    owners = {key: data_rank * size for key, data_rank in dealing.owners().items()}
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
    objective: objectives.Objective,
    rewards: RewardSet,
    iteration: int,
    rollout: Rollout,
    trajectories: Trajectories,
    advantages: Advantages,
    group: int,
    batch: MicroBatch,
    stored: Mapping[tuple[str, int], Tensor],
) -> tuple[AnyReplay, objectives.SampleBatch]:
    """An update micro-batch of a group, as an objective is given it: what can be computed again, and what is known of it."""
    config, prompt, device, steps = policy.config, rollout.prompts[group], policy.world.device, policy.steps
    members = [row.member for row in batch]
    keys = [SampleKey(config.run.seed, iteration, group, prompt.id, member) for member in members]
    chosen = steps.chosen(keys)
    kept = {what: torch.stack([trajectories[what, group, member] for member in members]) for what in steps.parts}
    with policy.guided(guidance_of(config).training):
        conditioning = policy.conditioning(prompt, len(members))
    replay: AnyReplay
    if steps.clean:
        shape, levels = policy.latent_shape(), steps.levels(keys, chosen, policy.schedule)

        def noise(i: int) -> Tensor:
            return policy.pack(forward_noise(keys, shape, i, shared=objective.pairs))

        replay = CleanSamplesReplay(
            policy, rewards, conditioning, prompt, stored, clean=kept["clean"], noise=noise, levels=levels
        )
        log_probs = torch.full(chosen.shape, torch.nan)
    else:
        first = steps.kept_span(steps.stochastic.span(keys)).first
        trajectory = Trajectory(kept["latents"], kept["log_probs"], kept.get("means"), first)
        replay = TrajectoryReplay(policy, rewards, conditioning, prompt, stored, trajectory=trajectory, timesteps=chosen)
        log_probs = trajectory.log_probs.gather(1, chosen - first.unsqueeze(1))
    samples = objectives.SampleBatch(
        advantages=advantages.values[group, members].to(device),
        log_probs=log_probs.to(device),
        timesteps=chosen,
        weights=torch.tensor([row.weight for row in batch], device=device),
    )
    return replay, samples
