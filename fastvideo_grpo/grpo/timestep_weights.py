"""How much a timestep counts in an update (``grpo.timesteps.weight``), from what its transition says of itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo_grpo.sampling.schedules import Schedule
from fastvideo_grpo.sampling.transitions import Transition, deviation, sensitivity

WEIGHTS = ("none", "rectified", "guard", "noise")


def table(name: str, transition: Transition, schedule: Schedule, *, normalised: bool) -> Tensor:
    """The weight of each transition but the last, float32 ``[steps - 1]`` on the CPU, not yet divided by its mean.

    With the standard deviation s of a transition and the sensitivity ``m = |d mean / d output|`` of its mean, the gradient of a
    log-prob with respect to the network's output has the scale ``lambda = m / s``, that of a normalised log-ratio ``lambda s``.

    - ``rectified``: ``1 / lambda`` of the log-ratio in use (Flash-GRPO, arXiv:2605.15980).
    - ``guard``: 1 / the step, which is the sensitivity of the ODE's step: ``sigma - sigma_next`` of a flow (GRPO-Guard,
      arXiv:2510.22319).
    - ``noise``: s (TempFlow-GRPO, arXiv:2508.04324).

    Args:
        normalised: the log-ratio in use is s times that of the densities.

    Raises:
        ValueError: an unknown name.
    """
    if name not in WEIGHTS:
        raise ValueError(f"unknown timestep weight {name!r}; known: {', '.join(WEIGHTS)}")
    index = torch.arange(schedule.steps - 1)
    level, next_level = schedule.at(index), schedule.at(index + 1)
    if name == "none":
        return torch.ones(len(index))
    if name == "guard":
        return 1 / sensitivity(transition.deterministic(), level, next_level)
    std = deviation(transition, level, next_level)
    if name == "noise":
        return std
    moved = sensitivity(transition, level, next_level)
    return 1 / moved if normalised else std / moved
