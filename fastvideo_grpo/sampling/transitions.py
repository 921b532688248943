"""One sampling step and its log-probability: what makes a sampler a policy.

A transition takes the network's ``output`` at ``sample`` and the levels it goes between, and returns the Gaussian
``N(mean, std^2)`` of the next sample together with a draw from it, or the density of a given next sample (replay).
Everything is float32, whatever the network ran in: a trajectory kept in bf16 changes log-probs by 3e-3 (the clip range is
1e-4). How much noise a step adds is its :class:`~fastvideo_grpo.sampling.noise_levels.NoiseLevel`, ``e`` in the equations here.
Equation numbers are those of DanceGRPO (Xue et al. 2025, arXiv:2505.07818).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from fastvideo_grpo.extensions import Registry, not_callable
from fastvideo_grpo.sampling.noise_levels import NoiseLevel
from fastvideo_grpo.sampling.schedules import Level

Prediction = Literal["velocity", "noise"]
"""What a network's output is: the velocity of a flow, or the noise."""


@dataclass(frozen=True)
class Step:
    """What one transition did.

    ``next_sample``, ``mean``, ``denoised``: float32 ``[B, ...]``; ``std``: float32 ``[B]``; ``log_prob``: float32
    ``[B]``, the mean over all but the batch dimension of the log density of ``next_sample`` under ``N(mean, std^2)``, NaN
    for samples with ``std`` 0, and None when no sample of the batch has a density.
    """

    next_sample: Tensor
    mean: Tensor
    std: Tensor
    denoised: Tensor
    log_prob: Tensor | None


class Transition(Protocol):
    """A sampler's step. Made with a :class:`~fastvideo_grpo.sampling.noise_levels.NoiseLevel`.

    ``prediction``: what ``step`` takes the network's output for. ``noise_level``: 0 where the step draws nothing.
    """

    prediction: ClassVar[Prediction]

    @property
    def noise_level(self) -> float: ...

    def step(
        self,
        output: Tensor,
        sample: Tensor,
        level: Level,
        next_level: Level,
        *,
        noise: Tensor | None = None,
        next_sample: Tensor | None = None,
    ) -> Step:
        """Go from ``level`` to ``next_level``; ``output`` and ``sample`` are ``[B, ...]``.

        ``noise`` given: draw; ``next_sample`` given: replay; neither: the mean. See :func:`draw_or_replay`.
        """
        ...

    def deterministic(self) -> Transition:
        """The ODE sampler of the same model: what evaluation and pictures use."""
        ...


class Gaussian(NamedTuple):
    """What the next sample is drawn from, ``N(mean, std^2)``: ``mean`` and ``denoised`` float32 ``[B, ...]``, ``std`` float32
    ``[B]`` on the CPU."""

    mean: Tensor
    std: Tensor
    denoised: Tensor

    def ending_at(self, next_level: Level) -> Gaussian:
        """The same, but a sample that steps to sigma 0 gets no noise and its mean is ``denoised``."""
        last = next_level.sigma == 0
        mean = torch.where(per_sample(last, self.mean), self.denoised, self.mean)
        return Gaussian(mean, torch.where(last, 0.0, self.std), self.denoised)


class StochasticTransition:
    """Base of transitions: what is the same in all of them. One of its own has :meth:`gaussian`.

    Raises:
        ValueError: a noise level that the step cannot have.
    """

    prediction: ClassVar[Prediction]

    def __init__(self, noise: NoiseLevel) -> None:
        if noise.schedule == "flow_grpo" and self.prediction != "velocity":
            raise ValueError(
                "noise_schedule flow_grpo is made for networks that predict a velocity, and this transition is one of those "
                "that predict noise: use noise_schedule=constant"
            )
        self.noise = noise

    @property
    def noise_level(self) -> float:
        """0 where the step draws nothing."""
        return self.noise.scale

    def noise_at(self, level: Level, next_level: Level) -> float | Tensor:
        """The noise level of each sample of a batch that steps from ``level`` to ``next_level``: float32 ``[B]`` on the CPU, or
        one for all."""
        return self.noise.at(level, next_level)

    def deterministic(self) -> Transition:
        """The same step without noise."""
        return type(self)(NoiseLevel())

    def step(
        self,
        output: Tensor,
        sample: Tensor,
        level: Level,
        next_level: Level,
        *,
        noise: Tensor | None = None,
        next_sample: Tensor | None = None,
    ) -> Step:
        """See :class:`Transition`."""
        mean, std, denoised = self.gaussian(output.float(), sample.float(), level, next_level)
        return draw_or_replay(mean, std, denoised, noise, next_sample)

    def gaussian(self, output: Tensor, sample: Tensor, level: Level, next_level: Level) -> Gaussian:
        """The step's equation; ``output`` and ``sample`` are float32 ``[B, ...]``. (Or one has a :meth:`step` of its own.)"""
        raise NotImplementedError(f"{type(self).__name__} has neither `gaussian` nor a `step` of its own")


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """``[B]`` on the CPU -> ``[B, 1, ...]`` on the device of ``like``, to be broadcast over it."""
    return value.to(like.device).view(-1, *([1] * (like.ndim - 1)))


def draw_or_replay(mean: Tensor, std: Tensor, denoised: Tensor, noise: Tensor | None, next_sample: Tensor | None) -> Step:
    """The step under ``N(mean, std^2)``: draws with ``noise``, replays ``next_sample``, else takes the mean; the log-prob as
    :class:`Step` says. ``std`` ``[B]`` on the CPU. Raises ValueError when both are given."""
    if noise is not None and next_sample is not None:
        raise ValueError("give noise (to draw) or next_sample (to replay), not both")
    has_density = std > 0
    if next_sample is not None:
        next_sample = next_sample.to(mean).detach()
    elif noise is not None:
        next_sample = mean + per_sample(std, mean) * noise.to(mean)
    else:
        next_sample = mean
    log_prob = None
    if bool(has_density.any()):
        # Where std is 0 the NaN is written on purpose: a density that does not exist must not be read as a number.
        safe = torch.where(has_density, std, torch.nan)
        scale = per_sample(safe, mean)
        # The drawn sample counts as data: gradients flow through the mean only.
        squared = (next_sample.detach() - mean) ** 2
        log_prob = (-squared / (2 * scale**2)).flatten(1).mean(1) - (safe.log() + 0.5 * math.log(2 * math.pi)).to(mean.device)
    return Step(next_sample, mean, std.to(mean.device), denoised, log_prob)


class FlowSDE(StochasticTransition):
    """The reverse SDE of rectified flow, equation (8), in one Euler-Maruyama step.

    With ``D = sigma - sigma_next``, ``u`` the velocity, ``e`` the noise level:
    ``denoised = z - sigma u``, ``score = -(z + alpha u) / sigma``, ``mean = z - D u + e^2/2 D score``,
    ``std = e sqrt(D)``. The step to sigma 0 adds no noise and returns ``denoised``; without noise every step is Euler's.
    """

    prediction: ClassVar[Prediction] = "velocity"

    def gaussian(self, velocity: Tensor, sample: Tensor, level: Level, next_level: Level) -> Gaussian:
        """See :class:`StochasticTransition`; ``velocity`` is ``eps - x``."""
        sigma = per_sample(level.sigma, sample)
        distance = level.sigma - next_level.sigma
        denoised = sample - sigma * velocity
        mean = sample - per_sample(distance, sample) * velocity
        if self.noise_level == 0:
            return Gaussian(mean, torch.zeros_like(distance), denoised)
        noise_level = self.noise_at(level, next_level)
        score = -(sample + per_sample(level.alpha, sample) * velocity) / sigma
        mean = mean + per_sample(0.5 * noise_level**2 * distance, sample) * score
        return Gaussian(mean, noise_level * distance.sqrt(), denoised).ending_at(next_level)


class ODE(FlowSDE):
    """The Euler step of rectified flow by a name of its own: it takes no noise.

    Raises:
        ValueError: a noise level other than 0.
    """

    def __init__(self, noise: NoiseLevel) -> None:
        if noise.scale != 0:
            raise ValueError(f"transition 'ode' takes no noise: noise_level must be 0; got {noise.scale:g}")
        super().__init__(NoiseLevel())


class CPS(StochasticTransition):
    """Coefficients that preserve the noise (Flow-CPS, arXiv:2509.05952): the state has at every level the noise that the
    schedule says, however much of it is new, so that the last pictures of a rollout are clean.

    With ``x = z - sigma u``, ``eps = z + alpha u`` and the noise level ``a`` as a part of a right angle:
    ``std = sigma_next sin(a pi / 2)``, ``mean = alpha_next x + sigma_next cos(a pi / 2) eps``. Without noise it is Euler's
    step.

    Raises:
        ValueError: a noise level of 1 or above, which leaves nothing of the state's own noise (or less), or one that does not
            stay below 1.
    """

    prediction: ClassVar[Prediction] = "velocity"

    def __init__(self, noise: NoiseLevel) -> None:
        if not noise.scale < 1:
            raise ValueError(
                f"noise_level is {noise.scale:g}, but transition 'cps' takes it as a part of a right angle: set it above 0 and "
                "below 1, for example 0.7"
            )
        if noise.schedule != "constant":
            raise ValueError(
                f"noise_schedule {noise.schedule} grows beyond 1, which transition 'cps' cannot have: use noise_schedule="
                "constant, or transition=flow_sde"
            )
        super().__init__(noise)

    def deterministic(self) -> Transition:
        """Euler's step."""
        return ODE(NoiseLevel())

    def gaussian(self, velocity: Tensor, sample: Tensor, level: Level, next_level: Level) -> Gaussian:
        """See :class:`StochasticTransition`; ``velocity`` is ``eps - x``."""
        angle = torch.as_tensor(self.noise_at(level, next_level), dtype=torch.float64) * (math.pi / 2)
        denoised = sample - per_sample(level.sigma, sample) * velocity
        epsilon = sample + per_sample(level.alpha, sample) * velocity
        kept = (next_level.sigma * angle.cos()).float()
        mean = per_sample(next_level.alpha, sample) * denoised + per_sample(kept, sample) * epsilon
        return Gaussian(mean, (next_level.sigma * angle.sin()).float(), denoised)


def _denoised(epsilon: Tensor, sample: Tensor, level: Level) -> Tensor:
    """``x`` of ``z = alpha x + sigma eps``, equation (1)."""
    return (sample - per_sample(level.sigma, sample) * epsilon) / per_sample(level.alpha, sample)


class DDIM(StochasticTransition):
    """The diffusion step with noise, equations (2) and (7): diffusers' ``DDIMScheduler`` with ``eta`` = noise level.

    ``denoised = (z - sigma eps) / alpha``;
    ``std = e sqrt(sigma_next^2 / sigma^2 (1 - alpha^2 / alpha_next^2))``;
    ``mean = alpha_next denoised + sqrt(sigma_next^2 - std^2) eps``.

    Raises:
        ValueError: a noise level above 1.
    """

    prediction: ClassVar[Prediction] = "noise"

    def __init__(self, noise: NoiseLevel) -> None:
        if noise.scale > 1:
            raise ValueError(
                f"noise_level is {noise.scale:g}, which is the eta of ddim and at most 1 (a level has no room for more noise): "
                "use 1, or transition=diffusion_sde"
            )
        super().__init__(noise)

    def gaussian(self, epsilon: Tensor, sample: Tensor, level: Level, next_level: Level) -> Gaussian:
        """See :class:`StochasticTransition`; ``epsilon`` is the predicted noise."""
        # Variances in float64: 1 - alpha^2 / alpha_next^2 cancels towards the end of the path.
        alpha, alpha_next = level.alpha.double(), next_level.alpha.double()
        sigma, sigma_next = level.sigma.double(), next_level.sigma.double()
        variance = self.noise_at(level, next_level) ** 2 * (sigma_next / sigma) ** 2 * (1 - (alpha / alpha_next) ** 2)
        direction = (sigma_next**2 - variance).clamp(min=0).sqrt().float()
        denoised = _denoised(epsilon, sample, level)
        mean = per_sample(next_level.alpha, sample) * denoised + per_sample(direction, sample) * epsilon
        return Gaussian(mean, variance.sqrt().float(), denoised)


class DiffusionSDE(StochasticTransition):
    """The reverse SDE of diffusion, equation (7), in one step.

    With ``f dt = d log alpha`` and ``g^2 dt = 2 alpha sigma d(sigma / alpha)`` (the paper's section 7.2), the score
    ``-eps / sigma`` and ``ratio = sigma / alpha`` (the paper's eta, equation (5), not DDIM's) it reads, in ``z / alpha``,

        ``d(z / alpha) = (1 + e^2) eps d ratio + e sqrt(2 ratio d ratio) dw``,

    where no time is left: ``d ratio < 0`` from noise to data. Deterministic (e = 0) it is equation (5), DDIM's step. One
    Euler-Maruyama step of it, so ``std = e alpha_next sqrt(2 ratio (ratio - ratio_next))``. The step to sigma 0 adds no noise
    and returns ``denoised``.
    """

    prediction: ClassVar[Prediction] = "noise"

    def gaussian(self, epsilon: Tensor, sample: Tensor, level: Level, next_level: Level) -> Gaussian:
        """See :class:`StochasticTransition`; ``epsilon`` is the predicted noise."""
        noise_level = self.noise_at(level, next_level)
        # In float64: both ratios are large near noise, and their difference is what counts.
        alpha, alpha_next = level.alpha.double(), next_level.alpha.double()
        ratio, ratio_next = level.sigma.double() / alpha, next_level.sigma.double() / alpha_next
        denoised = _denoised(epsilon, sample, level)
        drift = (1 + noise_level**2) * (ratio - ratio_next) * alpha_next
        scale = (alpha_next / alpha).float()
        mean = per_sample(scale, sample) * sample - per_sample(drift.float(), sample) * epsilon
        std = noise_level * alpha_next * (2 * ratio * (ratio - ratio_next)).sqrt()
        return Gaussian(mean, std.float(), denoised).ending_at(next_level)


def sensitivity(transition: Transition, level: Level, next_level: Level) -> Tensor:
    """How much the mean of the next sample moves with the network's output, ``|d mean / d output|``: float32 ``[B]``.

    The mean of every transition here is linear in the output, element by element, with a factor of the levels alone. One for
    which that is not so has a method of this name and these arguments itself.
    """
    own = getattr(transition, "sensitivity", None)
    if own is not None:
        return own(level, next_level)
    zeros = torch.zeros(len(level.sigma), 1)
    moved, still = (transition.step(output, zeros, level, next_level).mean for output in (zeros + 1, zeros))
    return (moved - still).abs()[:, 0]


def deviation(transition: Transition, level: Level, next_level: Level) -> Tensor:
    """The standard deviation of the step from ``level`` to ``next_level``: float32 ``[B]``."""
    zeros = torch.zeros(len(level.sigma), 1)
    return transition.step(zeros, zeros, level, next_level).std


Make = Callable[[NoiseLevel], Transition]


def _problem(name: str, offered: Any) -> str | None:
    known, found = get_args(Prediction), getattr(offered, "prediction", None)
    if found in known or not callable(offered):
        return not_callable(name, offered)
    return f"whose attribute `prediction` is {found!r}; allowed: {', '.join(known)}"


TRANSITIONS: Registry[Make] = Registry("transition", "fastvideo_grpo.transitions", problem=_problem)


def names() -> list[str]:
    """The known transitions, those of other packages included."""
    return TRANSITIONS.names()


def predicting(prediction: Prediction) -> list[str]:
    """The transitions that take the network's output for ``prediction``."""
    return [name for name, make in TRANSITIONS.usable().items() if _prediction(make) == prediction]


def prediction(name: str) -> Prediction:
    """What the transition called ``name`` takes the network's output for; an unknown name raises ValueError."""
    return _prediction(TRANSITIONS[name])


def get(name: str, *, noise_level: float = 0.0, noise_schedule: str = "constant", noise_decay: float = 0.0) -> Transition:
    """The transition called ``name`` with the :class:`~fastvideo_grpo.sampling.noise_levels.NoiseLevel` of these.

    Raises:
        ValueError: an unknown name, or a noise level that there is not, or not with this transition.
    """
    return TRANSITIONS[name](NoiseLevel(float(noise_level), noise_schedule, float(noise_decay)))


def _prediction(make: Any) -> Prediction:
    found: Prediction = make.prediction
    return found


TRANSITIONS.register("flow_sde", FlowSDE)
TRANSITIONS.register("cps", CPS)
TRANSITIONS.register("ddim", DDIM)
TRANSITIONS.register("diffusion_sde", DiffusionSDE)
TRANSITIONS.register("ode", ODE)
