"""The sampling steps: golden numbers, the sign of the score, the ODE limit, replay."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvideo_grpo.sampling import schedules, transitions
from fastvideo_grpo.sampling.noise_levels import NoiseLevel
from fastvideo_grpo.sampling.rollout import Walk, rollout

GOLDEN = Path(__file__).parent.parent.parent / "shared" / "golden" / "transitions.json"
golden = pytest.mark.skipif(not GOLDEN.exists(), reason="the golden numbers (../shared/golden) are not beside the project")


def _close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@golden
@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text())["flow"] if GOLDEN.exists() else [])
def test_flow_sde_meets_golden_numbers(case):
    schedule = schedules.flow(case["num_steps"], case["shift"])
    sample = torch.tensor(case["sample"])
    index = torch.full((len(sample),), case["index"])
    level, following = schedule.at(index), schedule.at(index + 1)
    _close(level.sigma[0], case["sigma"])
    _close(following.sigma[0], case["sigma_next"])
    transition = transitions.get("flow_sde", noise_level=case["eta"])
    drawn = transition.step(torch.tensor(case["velocity"]), sample, level, following, noise=torch.tensor(case["noise"]))
    for name in ("mean", "next_sample", "denoised", "log_prob"):
        _close(getattr(drawn, name), case[name])
    _close(drawn.std[0], case["std"])
    replayed = transition.step(
        torch.tensor(case["velocity"]), sample, level, following, next_sample=torch.tensor(case["next_sample"])
    )
    _close(replayed.log_prob, case["log_prob"])


@golden
@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text())["ddim"] if GOLDEN.exists() else [])
def test_ddim_meets_golden_numbers(case):
    settings = {k: case[k] for k in ("beta_start", "beta_end", "beta_schedule", "steps_offset", "set_alpha_to_one")}
    schedule = schedules.ddim(case["num_steps"], **settings)
    sample = torch.tensor(case["sample"])
    index = torch.full((len(sample),), case["index"])
    assert schedule.timestep[case["index"]] == case["timestep"]
    replayed = transitions.get("ddim", noise_level=case["eta"]).step(
        torch.tensor(case["epsilon"]),
        sample,
        schedule.at(index),
        schedule.at(index + 1),
        next_sample=torch.tensor(case["next_sample"]),
    )
    _close(replayed.log_prob, case["log_prob"])


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_ddim_agrees_with_diffusers(eta, set_alpha_to_one):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=set_alpha_to_one,
        clip_sample=False,
    )
    theirs.set_timesteps(20)
    ours = schedules.ddim(20, set_alpha_to_one=set_alpha_to_one)
    assert ours.timestep[:-1].tolist() == theirs.timesteps.tolist()
    torch.manual_seed(0)
    sample = torch.randn(2, 4, 8, 8)
    for i in range(20):
        epsilon, noise = torch.randn_like(sample), torch.randn_like(sample)
        expected = theirs.step(epsilon, theirs.timesteps[i], sample, eta=eta, variance_noise=noise).prev_sample
        index = torch.full((2,), i)
        transition = transitions.get("ddim", noise_level=eta)
        step = transition.step(epsilon, sample, ours.at(index), ours.at(index + 1), noise=noise)
        torch.testing.assert_close(step.next_sample, expected, rtol=1e-5, atol=1e-5)
        sample = expected


@pytest.mark.parametrize("shift", [1.0, 1.5, 3.0, 5.0, 7.0, 17.0])
@pytest.mark.parametrize("steps", [4, 16, 25, 50])
def test_flow_schedule_is_diffusers_to_the_bit(steps, shift):
    """A timestep that is off in its last digit costs a network five times what its own rounding does."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    ours = schedules.flow(steps, shift)
    assert torch.equal(ours.sigma, theirs.sigmas) and torch.equal(ours.timestep[:-1], theirs.timesteps)


def test_flow_schedule_with_exp_mu_is_diffusers_dynamic_shift():
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    theirs.set_timesteps(12, mu=0.8, sigmas=torch.linspace(1, 1 / 12, 12).tolist())
    torch.testing.assert_close(schedules.flow(12, math.exp(0.8)).sigma, theirs.sigmas, rtol=1e-6, atol=1e-7)


def _gaussian_velocity(std):
    """The exact velocity for data ``N(0, std^2)`` on ``z = (1 - t) x + t eps``."""

    def predict(z, level):
        alpha, sigma = level.alpha.view(-1, 1), level.sigma.view(-1, 1)
        x = alpha * std**2 / (alpha**2 * std**2 + sigma**2) * z
        eps = sigma / (alpha**2 * std**2 + sigma**2) * z
        return eps - x

    return predict


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 1.0])
def test_flow_sde_keeps_the_marginals_of_a_gaussian_target(noise_level):
    """With the wrong sign of the score term the spread is several times too wide (3.26 at noise level 1)."""
    torch.manual_seed(0)
    latents, _ = rollout(
        _gaussian_velocity(0.5),
        torch.randn(4000, 2),
        Walk(
            schedules.flow(100, 1.0),
            transitions.get("flow_sde", noise_level=noise_level),
            lambda i: torch.randn(4000, 2),
        ),
    )
    assert latents.std() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name,steps", [("ddim", 200), ("diffusion_sde", 500)])
def test_diffusion_keeps_the_marginals_of_a_gaussian_target(name, steps):
    def epsilon(z, level):
        alpha, sigma = level.alpha.view(-1, 1), level.sigma.view(-1, 1)
        return sigma / (alpha**2 * 0.25 + sigma**2) * z

    torch.manual_seed(0)
    schedule = schedules.ddim(steps)
    latents, _ = rollout(
        epsilon,
        torch.randn(4000, 2),
        Walk(schedule, transitions.get(name, noise_level=1.0), lambda i: torch.randn(4000, 2)),
    )
    assert latents.std() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", ["flow_sde", "ode"])
def test_without_noise_the_flow_step_is_euler(name):
    schedule = schedules.flow(8, 3.0)
    torch.manual_seed(0)
    z, u = torch.randn(3, 5), torch.randn(3, 5)
    index = torch.tensor([0, 3, 7])
    step = transitions.get(name, noise_level=0.0).step(u, z, schedule.at(index), schedule.at(index + 1))
    difference = (schedule.sigma[index + 1] - schedule.sigma[index]).view(-1, 1)
    torch.testing.assert_close(step.next_sample, z + difference * u)
    assert step.log_prob is None


NOISE = [(name, {"noise_decay": decay}) for name in ("flow_sde", "cps", "ddim", "diffusion_sde") for decay in (0.0, 0.5)]


@pytest.mark.parametrize("name,noise", [*NOISE, ("flow_sde", {"noise_schedule": "flow_grpo"})])
def test_replay_gives_the_log_prob_of_the_draw_bitwise_at_mixed_levels(name, noise):
    schedule = schedules.flow(6, 3.0) if name in ("flow_sde", "cps") else schedules.ddim(6)
    transition = transitions.get(name, noise_level=0.4, **noise)
    torch.manual_seed(0)
    z, output, noise = torch.randn(4, 7, 3), torch.randn(4, 7, 3), torch.randn(4, 7, 3)
    index = torch.tensor([0, 4, 2, 1])
    level, following = schedule.at(index), schedule.at(index + 1)
    drawn = transition.step(output, z, level, following, noise=noise)
    replayed = transition.step(output, z, level, following, next_sample=drawn.next_sample)
    assert torch.equal(drawn.log_prob, replayed.log_prob)
    for row in range(4):  # one level for the whole batch says the same as samples at different levels
        one = index[row : row + 1]
        alone = transition.step(
            output[row : row + 1],
            z[row : row + 1],
            schedule.at(one),
            schedule.at(one + 1),
            next_sample=drawn.next_sample[row : row + 1],
        )
        torch.testing.assert_close(alone.log_prob[0], replayed.log_prob[row])


def test_log_prob_is_the_mean_gaussian_log_density():
    schedule = schedules.flow(6, 1.0)
    torch.manual_seed(0)
    z, u, noise = torch.randn(2, 9), torch.randn(2, 9), torch.randn(2, 9)
    index = torch.tensor([1, 1])
    step = transitions.get("flow_sde", noise_level=0.5).step(u, z, schedule.at(index), schedule.at(index + 1), noise=noise)
    density = torch.distributions.Normal(step.mean, step.std.view(-1, 1)).log_prob(step.next_sample).mean(1)
    torch.testing.assert_close(step.log_prob, density)


def test_last_flow_step_returns_the_denoised_sample_and_has_no_density():
    schedule = schedules.flow(4, 3.0)
    z, u = torch.randn(2, 3), torch.randn(2, 3)
    transition = transitions.get("flow_sde", noise_level=0.3)
    last = torch.tensor([3, 3])
    step = transition.step(u, z, schedule.at(last), schedule.at(last + 1), noise=torch.randn(2, 3))
    assert torch.equal(step.next_sample, step.denoised)
    assert step.log_prob is None
    mixed = torch.tensor([1, 3])
    step = transition.step(u, z, schedule.at(mixed), schedule.at(mixed + 1), noise=torch.randn(2, 3))
    assert step.log_prob[0].isfinite() and step.log_prob[1].isnan()


def test_gradient_of_log_prob_against_finite_differences():
    schedule = schedules.flow(6, 3.0)
    index = torch.tensor([2, 4])
    transition = transitions.get("flow_sde", noise_level=0.8)
    torch.manual_seed(0)
    z, u, noise = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)
    following = transition.step(u, z, schedule.at(index), schedule.at(index + 1), noise=noise).next_sample

    def log_prob(u):
        return transition.step(u, z, schedule.at(index), schedule.at(index + 1), next_sample=following).log_prob.sum()

    u.requires_grad_(True)
    (gradient,) = torch.autograd.grad(log_prob(u), u)
    h = 1e-2
    for i in range(2):
        for j in range(3):
            shifted = [u.detach().clone() for _ in range(2)]
            shifted[0][i, j] += h
            shifted[1][i, j] -= h
            numeric = (log_prob(shifted[0]) - log_prob(shifted[1])) / (2 * h)
            assert numeric.item() == pytest.approx(gradient[i, j].item(), rel=2e-3, abs=1e-3)


@pytest.mark.parametrize("name", ["flow_sde", "ddim", "diffusion_sde"])
def test_a_noise_level_that_decays_is_its_value_at_each_level(name):
    """``noise_level * t ** noise_decay``, by samples of one batch that stand at different levels."""
    schedule = schedules.flow(6, 3.0) if name == "flow_sde" else schedules.ddim(6)
    torch.manual_seed(0)
    z, output, noise = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3)
    index = torch.arange(4)
    step = transitions.get(name, noise_level=0.8, noise_decay=1.5).step(
        output, z, schedule.at(index), schedule.at(index + 1), noise=noise
    )
    for row in range(4):
        one = index[row : row + 1]
        at = 0.8 * (schedule.timestep[row].item() / 1000) ** 1.5
        constant = transitions.get(name, noise_level=at).step(
            output[row : row + 1], z[row : row + 1], schedule.at(one), schedule.at(one + 1), noise=noise[row : row + 1]
        )
        torch.testing.assert_close(step.mean[row], constant.mean[0])
        torch.testing.assert_close(step.std[row], constant.std[0])


def test_ddim_of_a_scheduler_file():
    """The keys that set the levels are read; what would change the step otherwise is refused with its name."""
    levels = {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear", "set_alpha_to_one": True, "steps_offset": 0}
    file = {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "clip_sample": False, **levels}
    ours, expected = schedules.ddim_of(5, file), schedules.ddim(5, **levels)
    assert torch.equal(ours.alpha, expected.alpha) and torch.equal(ours.timestep, expected.timestep)
    for wrong in ({"prediction_type": "sample"}, {"timestep_spacing": "trailing"}, {"clip_sample": True}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*allowed"):
            schedules.ddim_of(5, {**file, **wrong})
    for name in ("steps_offset", "set_alpha_to_one", "clip_sample"):  # other schedulers' files; DDIM's own default differs
        with pytest.raises(ValueError, match=f"lacks {name}"):
            schedules.ddim_of(5, {key: value for key, value in file.items() if key != name})
    with pytest.raises(ValueError, match="would begin at timestep 1000"):
        schedules.ddim(1000)


def test_bad_input_names_what_is_wrong():
    with pytest.raises(ValueError, match="known: cps, ddim, diffusion_sde, flow_sde, ode"):
        transitions.get("euler")
    with pytest.raises(ValueError, match="noise_level"):
        transitions.get("flow_sde", noise_level=-1)
    with pytest.raises(ValueError, match="noise_decay"):
        transitions.get("ddim", noise_level=1, noise_decay=-1)
    with pytest.raises(ValueError, match="takes no noise"):
        transitions.get("ode", noise_level=0.3)
    with pytest.raises(ValueError, match="steps"):
        schedules.flow(0, 1.0)
    with pytest.raises(ValueError, match="shift"):
        schedules.flow(4, 0.0)
    with pytest.raises(ValueError, match="descend"):
        schedules.Schedule(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3))
    schedule = schedules.flow(4, 1.0)
    at = schedule.at(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="not both"):
        z = torch.zeros(1, 2)
        transitions.get("flow_sde", noise_level=0.3).step(z, z, at, at, noise=z, next_sample=z)


def test_a_transition_may_have_a_step_of_its_own():
    """As those of other packages had it before there was `gaussian`."""

    class Still(transitions.StochasticTransition):
        prediction = "velocity"

        def step(self, output, sample, level, next_level, *, noise=None, next_sample=None):
            return sample

    assert Still(NoiseLevel(0.5)).deterministic().step(None, 3, None, None) == 3

    class Neither(transitions.StochasticTransition):
        prediction = "velocity"

    level = schedules.Level(*(torch.full((1,), value) for value in (0.5, 0.5, 500.0, 0)))
    with pytest.raises(NotImplementedError, match="Neither has neither `gaussian` nor a `step` of its own"):
        Neither(NoiseLevel(0.5)).step(torch.zeros(1, 2), torch.zeros(1, 2), level, level)
