"""Whether a configuration's schedule and transition make steps that can be trained on, tried in float32 on a few numbers.

Each of ``sample.steps``, ``shift``, ``noise_level`` and ``noise_decay`` may be sensible by itself and end in levels that
coincide, noise that is lost beside the sample, or samples that grow beyond all bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fastvideo_grpo.config.keys import Config, SampleConfig, make_transition
from fastvideo_grpo.sampling.schedules import Schedule
from fastvideo_grpo.sampling.transitions import Transition

NEAREST_TIMESTEPS = 0.01
"""Of 1000: what networks can tell apart, with room to spare."""
LEAST_NOISE = 1e-6
"""Standard deviation of a step beside samples of size 1, of which float32 has 1e-7."""
LARGEST_SAMPLE = 10.0
"""Root mean square of a sample, which is 1 or less on every schedule, where the network predicts perfectly."""
_KEYS = ("shift", "noise_level", "noise_decay", "steps")


def sampling_problem(config: Config, schedule_of: Callable[[SampleConfig], Schedule], defaults: SampleConfig) -> str | None:
    """What is wrong with the steps of a configuration, with the key and what would work; None: nothing is.

    Args:
        schedule_of: the schedule of the model; raises ValueError where there is none.
        defaults: the model's own settings.
    """

    def flaw_of(sample: SampleConfig) -> str | None:
        try:
            schedule = schedule_of(sample)
            made = make_transition(sample)
        except ValueError as error:
            return f"{str(error).partition('; got [')[0]} in float32"  # all levels would be a page
        return flaw(schedule, made)

    sample = config.sample
    found = flaw_of(sample)
    if found is None:
        return None
    for key in _KEYS:
        value, usual = getattr(sample, key), getattr(defaults, key)
        if value != usual and flaw_of(replace(sample, **{key: usual})) is None:
            holds = [step for step in _towards(value, usual) if flaw_of(replace(sample, **{key: step})) is None]
            bound = f", or anything {'down' if value < usual else 'up'} to {holds[-1]:.3g}" if holds else ""
            return f"sample.{key} is {value:g}: {found}; use {usual:g}{bound}"
    given = ", ".join(f"sample.{key}={getattr(sample, key):g}" for key in _KEYS)
    usual = ", ".join(f"{key} {getattr(defaults, key):g}" for key in _KEYS)
    return f"{given}: {found}; the model's own are {usual}"


def flaw(schedule: Schedule, transition: Transition) -> str | None:
    """What keeps the steps of a rollout from being trained on; None: nothing does."""
    steps = schedule.steps
    apart = schedule.timestep[:-1] - schedule.timestep[1:]
    if not bool(schedule.sigma.isfinite().all() and schedule.timestep.isfinite().all()):
        return f"the schedule's levels are not finite in float32 (sigma {_shown(schedule)})"
    if not bool((apart >= NEAREST_TIMESTEPS).all()):
        near = int(apart.argmin())
        return (
            f"levels {near + 1} and {near + 2} of {steps + 1} are {float(apart[near]):.2g} of 1000 timesteps apart, which no "
            f"network tells apart (sigma {_shown(schedule)})"
        )
    draws = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 256, generator=draws) * schedule.sigma[0]
    for i in range(steps):
        level, below = schedule.at(torch.tensor([i])), schedule.at(torch.tensor([i + 1]))
        # What a network predicts that knows the data, if they are as normal as noise.
        alpha, sigma = level.alpha, level.sigma
        weight = sigma - alpha if transition.prediction == "velocity" else sigma
        output = weight / (alpha**2 + sigma**2) * sample
        step = transition.step(output, sample, level, below, noise=torch.randn(1, 256, generator=draws))
        sample = step.next_sample
        std, size = float(step.std), float(sample.square().mean().sqrt())
        if not bool(sample.isfinite().all()):
            return f"after step {i + 1} of {steps} a sample is not finite"
        if i < steps - 1 and std < LEAST_NOISE:
            return f"step {i + 1} of {steps} adds noise of {std:.2g}, which float32 loses beside the sample"
        if size > LARGEST_SAMPLE:
            return f"after step {i + 1} of {steps} samples are {size:.2g} times as large as noise"
    return None


def _towards(value: float, usual: float) -> list[float]:
    """Values between ``usual`` and ``value``, each half or twice the one before."""
    if value < usual:
        return [usual / 2**k for k in range(1, 40) if usual / 2**k >= value]
    start = max(usual, 0.1)
    return [start * 2**k for k in range(1, 40) if start * 2**k <= value]


def _shown(schedule: Schedule) -> str:
    shown = [f"{float(sigma):.8g}" for sigma in schedule.sigma[:3]]
    return ", ".join([*shown, "..."])
