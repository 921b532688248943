"""Noise schedules: the levels a sample passes on its way from noise to data.

Both paradigms of the paper are paths ``z = alpha x + sigma eps``, equations (1) and (3). A schedule is the list of
``(alpha, sigma, timestep)`` triples of its ``steps + 1`` levels, from noise to data; transition ``i`` goes from level
``i`` to level ``i + 1``. Equation numbers are those of DanceGRPO (Xue et al. 2025, arXiv:2505.07818).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Level:
    """Where each sample of a batch stands on the path: ``alpha``, ``sigma`` and ``timestep``, each float32 ``[B]`` on the CPU,
    and the ``index`` of that level in its schedule, int64 ``[B]`` (-1: none of the schedule's).

    They stay on the CPU so that asking whether a level is the last one never waits for a device.
    """

    alpha: Tensor
    sigma: Tensor
    timestep: Tensor
    index: Tensor

    def row(self, i: int) -> Level:
        """That of one sample, as a batch of one."""
        return Level(*(part[i : i + 1] for part in self._parts))

    def twice(self) -> Level:
        """Of the batch and itself again."""
        return Level(*(torch.cat([part, part]) for part in self._parts))

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.alpha, self.sigma, self.timestep, self.index


@dataclass(frozen=True)
class Schedule:
    """Levels from noise to data: ``alpha``, ``sigma``, ``timestep``, each float32 ``[steps + 1]``.

    ``timestep`` is what the network is conditioned on, in diffusers' unit (0 to 1000). ``trained``: ``(alpha, sigma)`` of each
    timestep that the network was trained at, float32, from data to noise; None: at every level of a flow.

    Raises:
        ValueError: the levels do not strictly descend to data (a repeated level has no density), or a level that is
            stepped from has ``sigma`` 0 (the score is infinite there).
    """

    alpha: Tensor
    sigma: Tensor
    timestep: Tensor
    trained: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if not (self.alpha.shape == self.sigma.shape == self.timestep.shape) or self.sigma.ndim != 1:
            raise ValueError("a schedule needs alpha, sigma and timestep of one length")
        if len(self.sigma) < 2:
            raise ValueError(f"a schedule needs at least one step; got {len(self.sigma) - 1}")
        if not bool((self.sigma[:-1] > 0).all()):
            raise ValueError(f"sigma must be above 0 at every level but the last; got {self.sigma.tolist()}")
        if not bool((self.sigma[1:] < self.sigma[:-1]).all()):
            raise ValueError(f"sigma must descend strictly from noise to data; got {self.sigma.tolist()}")

    @property
    def steps(self) -> int:
        """Number of transitions, the paper's T."""
        return len(self.sigma) - 1

    def at(self, index: Tensor) -> Level:
        """The level of each sample: ``index`` int64 ``[B]``, samples of one batch may stand at different levels."""
        index = index.cpu()
        return Level(self.alpha[index], self.sigma[index], self.timestep[index], index)

    def between(self, time: Tensor) -> Level:
        """The levels at times in (0, 1], 1 noise: float32 ``[B]`` on the CPU. Of a flow ``sigma`` is the time; else it is the
        share of the trained timesteps, the nearest of which is taken."""
        nowhere = torch.full(time.shape, -1, dtype=torch.int64)
        if self.trained is None:
            return Level(1 - time, time, 1000 * time, nowhere)
        alpha, sigma = self.trained
        index = (time.double() * len(sigma)).ceil().long().clamp(1, len(sigma)) - 1
        return Level(alpha[index], sigma[index], index.float(), nowhere)


def flow(steps: int, shift: float) -> Schedule:
    """Rectified flow: ``t = linspace(1, 0, steps + 1)``, ``sigma = shift t / (1 + (shift - 1) t)``, ``alpha = 1 - sigma``.

    ``timestep = 1000 sigma``, unrounded: a rounded one would differ between rollout and replay implementations.
    With ``shift = exp(mu)`` this is diffusers' resolution-dependent schedule of FLUX.

    Raises:
        ValueError: ``steps`` below 1, or ``shift`` not above 0.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    if not shift > 0:
        raise ValueError(f"shift must be above 0; got {shift}")
    # In float32 from here on, as diffusers' FlowMatchEulerDiscreteScheduler: its levels to the bit, since the network reads
    # the last digit of a timestep, too, and guidance multiplies what it makes of it. (The first sigma may then be 1 +- 1e-7.)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64).float()
    sigma = shift * t / (1 + (shift - 1) * t)
    return Schedule(1 - sigma, sigma, 1000 * sigma)


def ddim(
    steps: int,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    beta_schedule: str = "scaled_linear",
    num_train_timesteps: int = 1000,
    steps_offset: int = 1,
    set_alpha_to_one: bool = False,
) -> Schedule:
    """Stable Diffusion's levels: diffusers' ``DDIMScheduler`` with "leading" spacing; the defaults are SD v1's.

    ``alpha = sqrt(alpha_cumprod)``, ``sigma = sqrt(1 - alpha_cumprod)``; the last level is diffusers'
    ``final_alpha_cumprod``: 1 with ``set_alpha_to_one``, else that of training step 0 (so ``sigma`` is not 0 there).

    Raises:
        ValueError: an unknown ``beta_schedule``, or more steps than there are training timesteps for.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"steps must be between 1 and {num_train_timesteps}; got {steps}")
    if beta_schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
    elif beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)
    else:
        raise ValueError(f"beta_schedule must be 'scaled_linear' or 'linear'; got {beta_schedule!r}")
    # float32 on purpose: the checkpoints' own scheduler multiplies in float32, and its rounding is part of the levels.
    alpha_cumprod = torch.cumprod(1.0 - betas, dim=0)
    ratio = num_train_timesteps // steps
    timestep = torch.arange(steps - 1, -1, -1) * ratio + steps_offset
    if not 0 <= timestep[-1] <= timestep[0] < num_train_timesteps:
        raise ValueError(
            f"{steps} steps with steps_offset {steps_offset} would begin at timestep {timestep[0]}, beyond the "
            f"{num_train_timesteps} that were trained; use fewer steps"
        )
    last = torch.ones(1) if set_alpha_to_one else alpha_cumprod[:1]
    levels = torch.cat([alpha_cumprod[timestep], last]).double()
    timesteps = torch.cat([timestep, torch.zeros(1, dtype=torch.int64)]).float()
    trained = alpha_cumprod.double()
    return Schedule(
        levels.sqrt().float(),
        (1 - levels).sqrt().float(),
        timesteps,
        (trained.sqrt().float(), (1 - trained).sqrt().float()),
    )


# Keys of a scheduler_config.json that set the levels.
_LEVELS = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "steps_offset", "set_alpha_to_one")
# Keys of a scheduler_config.json that would change the levels or the step, and the value with which they do not.
_UNCHANGED: dict[str, Any] = {
    "clip_sample": False,
    "num_train_timesteps": 1000,  # what times are measured in, here and in StochasticTransition
    "prediction_type": ("epsilon", "v_prediction"),
    "rescale_betas_zero_snr": False,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
}


def ddim_of(steps: int, scheduler: Mapping[str, Any]) -> Schedule:
    """The levels that diffusers' ``DDIMScheduler`` makes of a checkpoint's ``scheduler_config.json``.

    Raises:
        ValueError: the file asks for what changes the levels or the step in a way that is not here; names the key.
    """
    for key, allowed in _UNCHANGED.items():
        values = allowed if isinstance(allowed, tuple) else (allowed,)
        if scheduler.get(key, values[0]) not in values:
            raise ValueError(
                f"scheduler_config.json has {key}={scheduler[key]!r}; allowed: {', '.join(map(str, values))} (a checkpoint "
                "trained so needs a schedule of its own)"
            )
    missing = [name for name in (*_LEVELS, "clip_sample") if name not in scheduler]
    if missing:
        raise ValueError(
            f"scheduler_config.json lacks {', '.join(missing)}, for which schedulers have different values; take over those of "
            "the checkpoint's DDIMScheduler or PNDMScheduler"
        )
    return ddim(steps, **{name: scheduler[name] for name in _LEVELS})
