"""Walking a sampler from noise to data, and writing down what an update may ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo_grpo.sampling.schedules import Level, Schedule
from fastvideo_grpo.sampling.solvers import DPMSolver
from fastvideo_grpo.sampling.transitions import Step, Transition, per_sample

Predict = Callable[[Tensor, Level], Tensor]


@dataclass(frozen=True)
class Span:
    """Transitions ``first`` to ``first + count - 1`` of each sample of a batch; ``first``: int64 ``[B]`` on the CPU."""

    first: Tensor
    count: int

    @classmethod
    def of(cls, batch: int, first: int, count: int) -> Span:
        """The same of all samples."""
        return cls(torch.full((batch,), first), count)

    def holds(self, i: int) -> Tensor:
        """Whether transition ``i`` is among them, bool ``[B]``."""
        return (self.first <= i) & (i < self.first + self.count)


@dataclass(frozen=True)
class Trajectory:
    """What is kept of a rollout of B samples: the n transitions of each from ``first`` on, float32 on the CPU.

    ``latents`` ``[B, n + 1, ...]``: states, from noise to data. ``log_probs`` ``[B, n]``, NaN where a transition has no
    density. ``means`` ``[B, n, ...]``: of the transitions, where they were asked for. ``first`` int64 ``[B]``.
    """

    latents: Tensor
    log_probs: Tensor
    means: Tensor | None
    first: Tensor

    def parts(self) -> dict[str, Tensor]:
        """What there is of each sample, by name."""
        parts = {"latents": self.latents, "log_probs": self.log_probs}
        return parts if self.means is None else {**parts, "means": self.means}


@dataclass(frozen=True)
class Start:
    """Where a rollout goes on from: a state ``[1, ...]`` that all its samples share, at level ``index``."""

    index: int
    state: Tensor


@dataclass(frozen=True)
class Walk:
    """How to get from noise to data along ``schedule``.

    Attributes:
        transition: of the stochastic steps; all others are those of its ODE.
        noise: transition index -> its noise ``[B, ...]``, in the shape of the states; not asked for at noise level 0.
        stochastic: which steps these are (default: all).
        kept: which transitions are written down; None: none.
        keep_means: their means, too.
        solver: goes on from its first level, which is behind the stochastic steps, in fewer steps.
        start: what the samples share is drawn already.
        stop: the level to stop at (default: the data).
    """

    schedule: Schedule
    transition: Transition
    noise: Callable[[int], Tensor] | None = None
    stochastic: Span | None = None
    kept: Span | None = None
    keep_means: bool = False
    solver: DPMSolver | None = None
    start: Start | None = None
    stop: int | None = None

    @property
    def single_steps(self) -> range:
        """Transitions that are made one by one, the solver's not."""
        end = self.schedule.steps if self.stop is None else self.stop
        return range(0 if self.start is None else self.start.index, end if self.solver is None else self.solver.levels[0])


def finite_rows(tensor: Tensor) -> Tensor:
    """Which samples of ``[B, ...]`` are finite throughout: bool ``[B]``, on the tensor's device."""
    finite = tensor.isfinite()
    return finite.flatten(1).all(1) if finite.ndim > 1 else finite


def rollout(predict: Predict, initial: Tensor, walk: Walk) -> tuple[Tensor, Trajectory | None]:
    """Draw samples, without gradients.

    Args:
        predict: the network, ``(sample [B, ...], level) -> output [B, ...]``.
        initial: initial noise ``[B, ...]``, float32, on the device to sample on; its shape alone counts where the walk has a
            start.

    Returns:
        The final latents (float32, on the device of ``initial``) and the trajectory, or None.
    """
    schedule, batch = walk.schedule, len(initial)
    sample = initial.float()
    if walk.start is not None:
        # Contiguous: a view of stride 0 takes other kernels than a real batch.
        sample = walk.start.state.to(sample).expand_as(sample).contiguous()
    record = None if walk.kept is None else _Record(walk.kept, sample, walk.keep_means)
    with torch.no_grad():
        for i in walk.single_steps:
            level, next_level = (schedule.at(torch.full((batch,), at)) for at in (i, i + 1))
            step = _step(predict(sample, level), sample, level, next_level, walk, i)
            if record is not None:
                record.add(i, sample, step)
            sample = step.next_sample
        if walk.solver is not None:
            sample = _solve(predict, sample, walk)
    return sample, None if record is None else record.trajectory()


def _step(output: Tensor, sample: Tensor, level: Level, next_level: Level, walk: Walk, i: int) -> Step:
    """Transition ``i``, with noise for the samples that have it there."""
    drawing = torch.ones(len(sample), dtype=torch.bool) if walk.stochastic is None else walk.stochastic.holds(i)
    if walk.transition.noise_level == 0 or not bool(drawing.any()):
        return walk.transition.deterministic().step(output, sample, level, next_level)
    assert walk.noise is not None
    drawn = walk.transition.step(output, sample, level, next_level, noise=walk.noise(i))
    if bool(drawing.all()):
        return drawn
    still = walk.transition.deterministic().step(output, sample, level, next_level)
    rows = per_sample(drawing, sample)
    density = None if drawn.log_prob is None else torch.where(drawing.to(drawn.log_prob.device), drawn.log_prob, torch.nan)
    return Step(
        torch.where(rows, drawn.next_sample, still.next_sample),
        torch.where(rows, drawn.mean, still.mean),
        torch.where(drawing.to(drawn.std.device), drawn.std, 0.0),
        drawn.denoised,
        density,
    )


def _solve(predict: Predict, sample: Tensor, walk: Walk) -> Tensor:
    solver, schedule = walk.solver, walk.schedule
    assert solver is not None
    ode, before = walk.transition.deterministic(), None
    for k, (here, there) in enumerate(zip(solver.levels, solver.levels[1:], strict=False)):
        level, next_level = (schedule.at(torch.full((len(sample),), at)) for at in (here, there))
        denoised = ode.step(predict(sample, level), sample, level, next_level).denoised
        sample, before = solver.step(k, sample, denoised, before), denoised
    return sample


class _Record:
    """A trajectory as it is written down."""

    def __init__(self, kept: Span, like: Tensor, means: bool) -> None:
        shape, count = tuple(like.shape[1:]), kept.count
        self.kept = kept
        self.latents = torch.zeros(len(like), count + 1, *shape)
        self.log_probs = torch.full((len(like), count), torch.nan)
        self.means = torch.zeros(len(like), count, *shape) if means else None

    def add(self, i: int, sample: Tensor, step: Step) -> None:
        """Transition ``i``, from ``sample``."""
        rows = self.kept.holds(i).nonzero()[:, 0]
        if len(rows) == 0:
            return
        at, of = i - self.kept.first[rows], rows.to(sample.device)
        self.latents[rows, at] = sample[of].cpu()
        self.latents[rows, at + 1] = step.next_sample[of].cpu()
        if step.log_prob is not None:
            self.log_probs[rows, at] = step.log_prob[of].cpu()
        if self.means is not None:
            self.means[rows, at] = step.mean[of].cpu()

    def trajectory(self) -> Trajectory:
        return Trajectory(self.latents, self.log_probs, self.means, self.kept.first)
