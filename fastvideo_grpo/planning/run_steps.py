"""What a run does with each step of its samples: drawn once for a group, stochastic, kept, trained, or solved in fewer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastvideo_grpo.config.keys import Config, make_objective, stochastic_steps, trainable_steps
from fastvideo_grpo.engines.make import uses_zero3
from fastvideo_grpo.grpo import timesteps
from fastvideo_grpo.grpo.dealing import Dealing
from fastvideo_grpo.sampling.noise import SampleKey
from fastvideo_grpo.sampling.rollout import Span
from fastvideo_grpo.sampling.schedules import Level, Schedule
from fastvideo_grpo.sampling.solvers import fewer_levels


class RunSteps:
    """The steps of a configuration's samples.

    Attributes:
        steps: of a sample.
        stochastic: which draw noise.
        clean: the objective trains on clean samples with noise, and needs no trajectory.
        trained: transitions of a sample that an update trains, or levels of its noise.
        keeps_means: their means are kept for the update.
        stored: the weights whose outputs are stored before an iteration's first update.

    Raises:
        ValueError: there is no such window, or more steps would be trained than are stochastic.
    """

    def __init__(self, config: Config) -> None:
        sample, when, objective = config.sample, config.grpo.timesteps, make_objective(config)
        self.steps = sample.steps
        self.stochastic = stochastic_steps(config)
        self.clean: bool = getattr(objective, "clean", False)
        self.keeps_means: bool = getattr(objective, "needs_old_means", False)
        self.stored: tuple[str, ...] = getattr(objective, "stored", ())
        self.trainable = trainable_steps(config, objective)
        self.trained = timesteps.count(self.steps, when.strategy, when.fraction, self.trainable)
        self._when = when
        self._offset, self._kept = timesteps.kept(self.steps, when.strategy, when.fraction, self.trainable)
        self._tail = sample.stochastic.tail
        self._solver = sample.solver
        self._shares = sample.init_noise == "shared"
        self._group_size = config.grpo.group_size

    @property
    def kept(self) -> int:
        """Transitions of a sample that are kept for the update."""
        return 0 if self.clean else self._kept

    @property
    def parts(self) -> tuple[str, ...]:
        """What is kept of a sample, by name (:class:`~fastvideo_grpo.trainers.rollout.Rollout`)."""
        if self.clean:
            return ("clean",)
        return ("latents", "log_probs", *(("means",) if self.keeps_means else ()))

    @property
    def states(self) -> int:
        """Tensors of the size of a sample that are kept of it."""
        return self.kept + 1 + self.kept * self.keeps_means

    def kept_span(self, stochastic: Span) -> Span:
        """Which transitions are kept of samples with these stochastic ones."""
        return Span(stochastic.first + self._offset, self._kept)

    def chosen(self, keys: Sequence[SampleKey]) -> Tensor:
        """The trained transitions of each sample, int64 ``[B, trained]``; of drawn levels their numbers."""
        when, span = self._when, self.stochastic.span(keys)
        if self.draws_levels:
            return torch.arange(self.trained).repeat(len(keys), 1)
        trainable = Span(torch.zeros_like(span.first) if self.clean else span.first, self.trainable)
        return timesteps.choose(list(keys), self.steps, when.strategy, when.fraction, when.per, trainable)

    @property
    def draws_levels(self) -> bool:
        """Clean samples get noise at drawn levels, not at those of the sampler."""
        return self.clean and self._when.levels != "sampler"

    def levels(self, keys: Sequence[SampleKey], chosen: Tensor, schedule: Schedule) -> list[Level]:
        """The levels at which noise is added to each clean sample, ``trained`` of them; ``chosen``: of :meth:`chosen`."""
        when = self._when
        if not self.draws_levels:
            return [schedule.at(column) for column in chosen.T]
        drawn = timesteps.times(
            list(keys),
            self.trained,
            when.levels,
            when.per,
            within=when.within,
            mean=when.level_mean,
            std=when.level_std,
            shift=when.level_shift,
        )
        return [schedule.between(column) for column in drawn.T]

    def shared_prefix(self, key: SampleKey) -> int:
        """Steps before the first stochastic one of the group of ``key``, which are drawn once: 0 where initial noise is not
        shared."""
        if not self._shares or self.stochastic.choice in ("all", "none"):
            return 0
        if self.stochastic.choice == "one" and self.stochastic.per == "sample":
            return min(self.stochastic.first(replace(key, member=member)) for member in range(self._group_size))
        return self.stochastic.first(key)

    def solved_levels(self, first: int) -> tuple[int, ...] | None:
        """The levels that a solver takes behind stochastic steps from ``first`` on; None: each step is made by itself."""
        begin = first + self.stochastic.count
        if self.stochastic.choice == "none":
            return tuple(range(self.steps + 1)) if self._solver == "dpm_solver" else None
        if self._tail == 1 or begin >= self.steps:
            return None
        return fewer_levels(begin, self.steps, self._tail)

    def predictions(self, first: int) -> int:
        """Evaluations of the network for a micro-batch, from its first stochastic step on."""
        levels = self.solved_levels(first)
        return self.steps - first if levels is None else levels[0] - first + len(levels) - 1

    def predictions_of(self, jobs: Iterable[tuple[int, SampleKey]]) -> int:
        """Evaluations of the network in a process that draws these micro-batches, by the key of a sample of each and its group.

        What a group shares is drawn by each process for itself, once.
        """
        total, drawn = 0, None
        for group, key in jobs:
            shared = self.shared_prefix(key)
            total += self._behind(shared, key) + (shared if group != drawn else 0)
            drawn = group
        return total

    def _behind(self, shared: int, key: SampleKey) -> int:
        if self.stochastic.choice == "one" and self.stochastic.per == "sample":
            return self.steps - shared  # the rows' own places lie anywhere behind it
        first = self.stochastic.first(key)
        return first - shared + self.predictions(first)


@dataclass(frozen=True)
class Drawing:
    """What a process does in the rollout of an iteration, on average over where the stochastic steps are.

    Attributes:
        predictions: evaluations of the network, of a micro-batch each or of what a group shares.
        samples: the same in samples.
    """

    predictions: float
    samples: float


def drawing_of(config: Config, dealt: Dealing, rank: int) -> Drawing:
    """What the process of rank ``rank`` (of those that share no sample) does in a rollout, on average."""
    steps = RunSteps(config)
    jobs = dealt.rollout_batches(rank)
    groups = len({group for group, _ in jobs})
    predictions = samples = 0.0
    for first, often in steps.stochastic.places(config.grpo.group_size, config.run.iterations):
        shared = first if config.sample.init_noise == "shared" else 0  # where all or none are stochastic, first is 0
        rest = first - shared + steps.predictions(first)
        predictions += often * (shared * groups + rest * len(jobs))
        samples += often * (shared * groups + rest * sum(len(members) for _, members in jobs))
    return Drawing(predictions, samples)


SIMULATED = 16
"""Iterations, spread over a run, whose processes are asked what they make most."""


def idle_of(config: Config, dealt: Dealing, rank: int) -> float:
    """Evaluations that this process makes for nothing, so that every process makes as many (ZeRO-3), on average over iterations
    whose prompts are made up."""
    steps = RunSteps(config)
    if not uses_zero3(config) or steps.stochastic.choice in ("all", "none"):
        return 0.0
    count = min(SIMULATED, config.run.iterations)
    idle = 0
    for iteration in (config.run.iterations * k // count for k in range(count)):
        made = [
            steps.predictions_of(
                (group, SampleKey(config.run.seed, iteration, group, str(group), members[0]))
                for group, members in dealt.rollout_batches(each)
            )
            for each in range(dealt.ranks)
        ]
        idle += max(made) - made[rank]
    return idle / count


def evaluations_per_sample(config: Config, dealt: Dealing) -> tuple[float, int]:
    """(rollout, update): what an iteration costs a sample in evaluations of the network, on average; an update's forward and
    backward count 3, an output that is stored before it 1. Guidance and best-of-N are left out: they multiply every method's
    alike."""
    steps = RunSteps(config)
    drawn = sum(drawing_of(config, dealt, rank).samples for rank in range(dealt.ranks))
    return drawn / (dealt.prompts * dealt.group_size), (3 + len(steps.stored)) * steps.trained
