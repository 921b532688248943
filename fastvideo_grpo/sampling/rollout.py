"""Walking a sampler from noise to data, and writing down what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo_grpo.sampling.schedules import Level, Schedule
from fastvideo_grpo.sampling.transitions import Transition

Predict = Callable[[Tensor, Level], Tensor]


@dataclass(frozen=True)
class Trajectory:
    """A rollout of B samples, float32 on the CPU.

    ``latents`` ``[B, T + 1, ...]`` from noise to data, ``log_probs`` ``[B, T]`` (NaN where the transition has no density).
    """

    latents: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Walk:
    """How to get from noise to data: by ``transition`` along ``schedule``.

    ``noise``: transition index -> its noise ``[B, ...]``, in the shape of the states; not asked for at noise level 0.
    ``record``: keep the trajectory.
    """

    schedule: Schedule
    transition: Transition
    noise: Callable[[int], Tensor]
    record: bool = True


def finite_rows(tensor: Tensor) -> Tensor:
    """Which samples of ``[B, ...]`` are finite throughout: bool ``[B]``, on the tensor's device."""
    finite = tensor.isfinite()
    return finite.flatten(1).all(1) if finite.ndim > 1 else finite


def rollout(predict: Predict, initial: Tensor, walk: Walk) -> tuple[Tensor, Trajectory | None]:
    """Draw samples, without gradients.

    Args:
        predict: the network, ``(sample [B, ...], level) -> output [B, ...]``.
        initial: initial noise ``[B, ...]``, float32, on the device to sample on.

    Returns:
        The final latents (float32, on the device of ``initial``) and the trajectory, or None.
    """
    schedule, transition = walk.schedule, walk.transition
    sample = initial.float()
    batch = len(sample)
    latents, log_probs = [sample.cpu()], []
    with torch.no_grad():
        for i in range(schedule.steps):
            level = schedule.at(torch.full((batch,), i))
            next_level = schedule.at(torch.full((batch,), i + 1))
            output = predict(sample, level)
            draw = walk.noise(i) if transition.noise_level > 0 else None
            step = transition.step(output, sample, level, next_level, noise=draw)
            sample = step.next_sample
            if walk.record:
                latents.append(sample.cpu())
                log_probs.append(torch.full((batch,), torch.nan) if step.log_prob is None else step.log_prob.cpu())
    if not walk.record:
        return sample, None
    return sample, Trajectory(torch.stack(latents, 1), torch.stack(log_probs, 1))
