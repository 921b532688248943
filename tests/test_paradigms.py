"""Diffusion and rectified flow are one process in two notations (equations 5, 7 and 8 of DanceGRPO, Xue et al.
2025, arXiv:2505.07818, and its section 7.2)."""

import itertools
import math

import pytest
import torch

from fastvideo_grpo.sampling import schedules, transitions
from fastvideo_grpo.sampling.schedules import Level

STD = 0.5  # of the data, which are N(0, STD^2): every network output below is the exact one


def _denoised(z, alpha, sigma):
    """E[x | z], for ``z = alpha x + sigma eps``."""
    return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * z


def _level(t, path):
    alpha, sigma = path(t)
    return Level(alpha.float(), sigma.float(), (1000 * t).float(), torch.zeros(1, dtype=torch.long))


def _flow(t):
    return 1 - t, t


def _cosine(t):
    return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)


def _stable_diffusion(t):
    """SD v1's betas in continuous time, variance preserving."""
    start, end = 0.00085**0.5, 0.012**0.5
    integral = start**2 * t + start * (end - start) * t**2 + (end - start) ** 2 * t**3 / 3  # of (start + (end - start) t)^2
    alpha = torch.exp(-0.5 * 1000 * integral)
    return alpha, (1 - alpha**2).sqrt()


PATHS = {"flow": _flow, "cosine": _cosine, "stable diffusion": _stable_diffusion}


def _derivatives(path, t):
    """``alpha, sigma`` and the derivatives of alpha, sigma, log alpha and sigma / alpha."""
    t = t.clone().requires_grad_(True)
    alpha, sigma = path(t)
    quantities = (alpha, sigma, alpha.log(), sigma / alpha)
    slopes = [torch.autograd.grad(q.sum(), t, retain_graph=True)[0] for q in quantities]
    return alpha.detach(), sigma.detach(), *slopes


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("noise_level", [0.0, 0.3, 1.0])
def test_equations_7_and_8_are_one_sde_under_section_7_2(path, noise_level):
    """With ``f = d log alpha/dt``, ``g^2 = 2 alpha sigma d(sigma/alpha)/dt`` and ``eta = e / g``, drift and noise are equal."""
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    z = torch.linspace(-2, 2, 19, dtype=torch.float64)
    alpha, sigma, alpha_slope, sigma_slope, f, eta_slope = _derivatives(path, t)
    x = _denoised(z, alpha, sigma)
    eps = (z - alpha * x) / sigma
    score = -(z - alpha * x) / sigma**2
    g = (2 * alpha * sigma * eta_slope).sqrt()
    eta = noise_level / (2 * alpha * sigma * eta_slope).sqrt()
    diffusion = f * z - (1 + eta**2) / 2 * g**2 * score  # eq. 7
    flow = alpha_slope * x + sigma_slope * eps - noise_level**2 / 2 * score  # eq. 8, on the same path
    torch.testing.assert_close(diffusion, flow, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(eta * g, torch.full_like(t, noise_level))


@pytest.mark.parametrize("noise_level", [0.3, 1.0])
def test_a_step_of_one_transition_is_a_step_of_the_other(noise_level):
    """``diffusion_sde`` at ``eta = e / g`` on the flow's path against ``flow_sde`` at e: the means are equal, however large the
    step, and the variances to the order of its size: halving it halves what they differ by."""
    z = torch.linspace(-1.5, 1.5, 8, dtype=torch.float64)
    differences = []
    for size in (0.04, 0.02, 0.01):
        t = torch.full((8,), 0.6, dtype=torch.float64)
        level, following = _level(t, _flow), _level(t - size, _flow)
        x = _denoised(z, *_flow(t))
        eps = (z - (1 - t) * x) / t
        flow = transitions.get("flow_sde", noise_level=noise_level).step((eps - x).view(8, 1), z.view(8, 1), level, following)
        eta = noise_level / (2 * t / (1 - t)).sqrt()[0].item()  # alpha sigma d(sigma / alpha)/dt = t / (1 - t) here
        diffusion = transitions.get("diffusion_sde", noise_level=eta).step(eps.view(8, 1), z.view(8, 1), level, following)
        torch.testing.assert_close(flow.denoised, diffusion.denoised)
        torch.testing.assert_close(flow.mean, diffusion.mean, rtol=0, atol=1e-6)
        differences.append((flow.std**2 / diffusion.std**2 - 1).abs().max().item())
    for coarse, fine in itertools.pairwise(differences):
        assert coarse / fine == pytest.approx(2, abs=0.15)
    assert 0 < differences[-1] < 0.03


@pytest.mark.parametrize("name", ["ddim", "diffusion_sde"])
def test_without_noise_a_diffusion_step_is_the_flow_step_in_other_units(name):
    """Equation 5: a diffusion path is a flow path in ``z / (alpha + sigma)`` at ``t = sigma / (alpha + sigma)``; exactly."""
    schedule = schedules.ddim(10)
    torch.manual_seed(0)
    z, eps = torch.randn(9, 5), torch.randn(9, 5)
    index = torch.arange(9)
    level, following = schedule.at(index), schedule.at(index + 1)
    alpha, sigma = level.alpha.view(-1, 1), level.sigma.view(-1, 1)
    diffusion = transitions.get(name, noise_level=0.0).step(eps, z, level, following)

    def in_flow(level):
        total = level.alpha.double() + level.sigma.double()
        t = (level.sigma / total).float()
        return total.float().view(-1, 1), Level(1 - t, t, 1000 * t, torch.zeros(1, dtype=torch.long))

    scale, flow_level = in_flow(level)
    next_scale, next_flow_level = in_flow(following)
    x = (z - sigma * eps) / alpha
    flow = transitions.get("flow_sde", noise_level=0.0).step(eps - x, z / scale, flow_level, next_flow_level)
    # x is up to 15 times as large as z where there is almost nothing but noise.
    torch.testing.assert_close(diffusion.next_sample / next_scale, flow.next_sample, rtol=1e-4, atol=2e-5)


def test_the_network_conversions_agree():
    """One state, told as noise, as v and as velocity."""
    t = torch.full((4,), 0.3, dtype=torch.float64)
    alpha, sigma = _cosine(t)
    x, eps = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    z, v = alpha * x + sigma * eps, alpha * eps - sigma * x
    torch.testing.assert_close(alpha * v + sigma * z, eps)  # as models/stable_diffusion/trainer.py reads v
