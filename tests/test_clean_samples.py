"""Objectives on clean samples: golden numbers, levels and noise, what a network that predicts noise says of a flow."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from fastvideo_grpo.engines.averages import AveragedWeights
from fastvideo_grpo.grpo import objectives, timesteps
from fastvideo_grpo.grpo.decay import Decay
from fastvideo_grpo.grpo.objectives import SampleBatch
from fastvideo_grpo.sampling import schedules
from fastvideo_grpo.sampling.noise import SampleKey, forward_noise
from fastvideo_grpo.sampling.noised import Noised

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "methods.json"


def golden(method):
    if not GOLDEN.is_file():
        return []
    cases = json.loads(GOLDEN.read_text())[method]
    return [{key: torch.tensor(value) if isinstance(value, list) else value for key, value in case.items()} for case in cases]


class Given:
    """A replay whose velocities are given."""

    def __init__(self, case):
        sigma = case["t"]
        level = schedules.Level(1 - sigma, sigma, 1000 * sigma, torch.full((len(sigma),), -1))
        self.at = Noised(case["clean"], case["noise"], level, "velocity")
        self.current = case["velocity"].clone().requires_grad_()
        self.case = case

    def noised(self, i):
        return self.at

    def velocity(self, i):
        return self.current

    def reference(self, i):
        return self.case["velocity_reference"]

    def stored(self, weights, i):
        return self.case["velocity_old"]


def batch(case):
    rows = len(case["advantages"])
    chosen = torch.zeros(rows, 1, dtype=torch.int64)
    return SampleBatch(case["advantages"], torch.full((rows, 1), math.nan), chosen, torch.ones(rows))


@pytest.mark.parametrize("case", golden("nft"), ids=lambda case: f"beta {case['beta']}")
def test_nfts_loss_and_gradient_are_those_of_its_public_code(case):
    nft = objectives.NFT(advantage_clip=case["advantage_clip"], kl_weight=0.0, ema_kl_weight=0.0, beta=case["beta"])
    replay = Given(case)
    loss, _ = nft.loss(replay, batch(case), 0)
    torch.testing.assert_close(loss.detach(), case["loss"], rtol=1e-5, atol=1e-5)
    loss.mean().backward()
    torch.testing.assert_close(replay.current.grad, case["gradient_of_mean_loss"], rtol=1e-5, atol=1e-5)
    with_kl = objectives.NFT(advantage_clip=case["advantage_clip"], kl_weight=1.0, ema_kl_weight=0.0, beta=case["beta"])
    again, statistics = with_kl.loss(Given(case), batch(case), 0)
    torch.testing.assert_close(statistics["kl"], case["kl"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again.detach(), case["loss"] + case["kl"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", golden("awm"), ids=lambda case: case["weighting"])
def test_awms_loss_and_gradient_are_those_of_its_public_code(case):
    awm = objectives.AWM(
        clip_range=case["clip_range"],
        advantage_range=(1.0, None),
        kl_weight=0.0,
        ema_kl_weight=0.0,
        weighting=case["weighting"].lower(),
        power=case["power"],
    )
    replay = Given(case)
    noised, time = replay.noised(0), case["t"]
    density = awm.log_density(case["velocity"], noised.target, time)
    torch.testing.assert_close(density, case["log_density"], rtol=1e-5, atol=1e-5)
    old = awm.log_density(case["velocity_old"], noised.target, time)
    torch.testing.assert_close(old, case["log_density_old"], rtol=1e-5, atol=1e-5)
    loss, _ = awm.loss(replay, batch(case), 0)
    torch.testing.assert_close(loss.detach(), case["loss"], rtol=1e-5, atol=1e-5)
    loss.mean().backward()
    torch.testing.assert_close(replay.current.grad, case["gradient_of_mean_loss"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "t", "ghuber"])
def test_nothing_has_moved_where_the_weights_are_those_that_drew(weighting):
    (case, *_) = golden("awm")
    case = {**case, "velocity_old": case["velocity"], "velocity_reference": case["velocity"]}
    awm = objectives.get(
        "awm", clip_range=1.0, advantage_clip=1.0, kl_weight=0.5, ema_kl_weight=0.5, params={"weighting": weighting}
    )
    nft = objectives.get("nft", clip_range=1.0, advantage_clip=5.0, kl_weight=0.5, ema_kl_weight=0.5)
    for objective in (awm, nft):
        assert objective.stored == ("old", "ema") and objective.needs_reference
        _, statistics = objective.loss(Given(case), batch(case), 0)
        assert bool((statistics["ratio"] == 1).all())
        assert bool((statistics["kl"] == 0).all()) and bool((statistics["ema_kl"] == 0).all())


def test_diffusion_dpo_prefers_the_winner_by_what_the_reference_says():
    (case, *_) = golden("nft")
    dpo = objectives.get("diffusion_dpo", clip_range=1.0, advantage_clip=None, kl_weight=0.0, params={"beta": 2.0})
    replay = Given(case)
    loss, statistics = dpo.loss(replay, batch(case), 0)
    target = case["noise"] - case["clean"]
    error = ((case["velocity"] - target) ** 2).flatten(1).mean(1)
    reference = ((case["velocity_reference"] - target) ** 2).flatten(1).mean(1)
    won, lost = (error - reference).tolist()
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(won - lost))] * 2, rel=1e-5)  # beta / 2 is 1
    assert statistics["preferred"].tolist() == [float(won < lost)] * 2
    loss.sum().backward()
    # The winner's error goes down, the loser's up.
    along = (replay.current.grad * (case["velocity"] - target)).flatten(1).sum(1)
    assert along[0] > 0 > along[1]


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("nft", {"beta": 0}, "grpo.objective_params.beta is 0; it must be a finite number above 0"),
        ("awm", {"weighting": "T"}, "grpo.objective_params.weighting is 'T'; allowed: uniform, t, ghuber"),
        ("awm", {"power": math.inf}, "grpo.objective_params.power is inf"),
        ("diffusion_dpo", {"beta": "much"}, "grpo.objective_params.beta is 'much'"),
    ],
)
def test_bad_parameters_are_told(name, params, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        objectives.get(name, clip_range=1.0, advantage_clip=1.0, kl_weight=0.0, params=params)


def test_nft_divides_by_its_largest_advantage():
    with pytest.raises(ValueError, match=r"grpo\.advantage_clip is null, but objective nft divides advantages by it"):
        objectives.get("nft", clip_range=1.0, advantage_clip=None, kl_weight=0.0)


def levels():
    schedule = schedules.ddim(10)
    return schedule.at(torch.tensor([0, 3, 7, 9]))


def test_what_predicts_noise_predicts_the_velocity_of_a_flow():
    """Data are N(m, s^2): what is expected of noise and of the data given a state is known on both paths, and the velocity is
    their difference whatever the path."""
    m, s = 0.7, 1.3
    draws = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(4, 1000, dtype=torch.float64, generator=draws) for _ in range(2))
    clean, at = m + s * clean, levels()
    noised = Noised(clean, noise, at, "noise")
    alpha, sigma = (value.double().view(-1, 1) for value in (at.alpha, at.sigma))
    expected_noise = sigma / ((alpha * s) ** 2 + sigma**2) * (noised.sample - alpha * m)
    t = noised.time.double()
    torch.testing.assert_close(t, sigma / (alpha + sigma), rtol=0, atol=1e-6)
    of_flow = (1 - t) * clean + t * noise
    torch.testing.assert_close(noised.state.double(), of_flow, rtol=0, atol=1e-5)
    variance = ((1 - t) * s) ** 2 + t**2
    off = of_flow - (1 - t) * m
    velocity = t / variance * off - (m + (1 - t) * s**2 / variance * off)  # E[e | z] - E[x | z]
    torch.testing.assert_close(noised.velocity(expected_noise).double(), velocity, rtol=1e-4, atol=1e-4)


def test_objectives_say_the_same_of_noise_and_of_the_flow_that_it_is():
    """A network that predicts noise, and one that predicts the velocity at the same states of the flow."""
    draws = torch.Generator().manual_seed(1)
    clean, noise, predicted, old = (torch.randn(4, 3, 4, 4, generator=draws) for _ in range(4))
    at = levels()
    t = at.sigma / (at.alpha + at.sigma)
    of_noise = Noised(clean, noise, at, "noise")
    flow = Noised(clean, noise, schedules.Level(1 - t, t, 1000 * t, at.index), "velocity")
    advantages = torch.tensor([1.0, -0.5, 0.3, -2.0])
    given = {
        "t": t,
        "clean": clean,
        "noise": noise,
        "velocity": of_noise.velocity(predicted),
        "velocity_old": of_noise.velocity(old),
        "velocity_reference": of_noise.velocity(old),
        "advantages": advantages,
    }
    for name in ("nft", "awm", "diffusion_dpo"):
        objective = objectives.get(name, clip_range=1.0, advantage_clip=5.0, kl_weight=0.0)
        losses = []
        for noised in (of_noise, flow):
            replay = Given(given)
            replay.at = noised
            losses.append(objective.loss(replay, batch(given), 0)[0].detach())
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def keys(count=64):
    return [SampleKey(3, 5, 1, "prompt", member) for member in range(count)]


@pytest.mark.parametrize(
    ("kind", "settings", "quantile"),
    [
        ("uniform", {}, lambda u: u),
        ("uniform", {"within": 0.3}, lambda u: 0.7 + 0.3 * u),
        ("uniform", {"shift": 3.0}, lambda u: 3 * u / (1 + 2 * u)),
        ("logit_normal", {"mean": 0.5, "std": 0.8}, None),
        ("logit_normal", {"within": 0.5, "shift": 2.0}, None),
    ],
)
def test_drawn_times_have_their_distribution(kind, settings, quantile):
    settings = {"within": 1.0, "mean": 0.0, "std": 1.0, "shift": 1.0, **settings}
    times = timesteps.times(keys(256), 64, kind, "sample", **settings)
    assert times.shape == (256, 64) and times.dtype == torch.float32
    assert times.min() >= max(1e-4, 1 - settings["within"] - 1e-6) and times.max() <= 1
    probe = torch.tensor([0.1, 0.5, 0.9])
    found = times.flatten().quantile(probe)
    if quantile is None:
        draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0)) * settings["std"] + settings["mean"]
        t = torch.sigmoid(draws)
        t = settings["shift"] * t / (1 + (settings["shift"] - 1) * t)
        expected = t[t > 1 - settings["within"]].quantile(probe)
    else:
        expected = torch.tensor([quantile(u) for u in probe.tolist()])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_levels_and_noise_have_names():
    """A function of the sample, whoever else is in its micro-batch; one of a group's where it is compared."""
    settings = {"within": 1.0, "mean": 0.0, "std": 1.0, "shift": 1.0}
    all_of_them = timesteps.times(keys(4), 3, "uniform", "sample", **settings)
    assert torch.equal(all_of_them[2:], timesteps.times(keys(4)[2:], 3, "uniform", "sample", **settings))
    shared = timesteps.times(keys(4), 3, "uniform", "group", **settings)
    assert torch.equal(shared, shared[:1].expand_as(shared)) and not torch.equal(all_of_them[0], all_of_them[1])
    noise = forward_noise(keys(4), (2, 3), 1, shared=False)
    assert torch.equal(noise[1:2], forward_noise(keys(4)[1:2], (2, 3), 1, shared=False))
    assert not torch.equal(noise, forward_noise(keys(4), (2, 3), 2, shared=False)) and not torch.equal(noise[0], noise[1])
    of_group = forward_noise(keys(4), (2, 3), 1, shared=True)
    assert torch.equal(of_group, of_group[:1].expand_as(of_group))
    with pytest.raises(ValueError, match="levels 'sampler' are not drawn; those that are: uniform, logit_normal"):
        timesteps.times(keys(1), 1, "sampler", "sample", **settings)


def test_levels_between_those_of_a_schedule():
    flow = schedules.flow(5, 3.0).between(torch.tensor([0.25, 1.0]))
    assert flow.sigma.tolist() == [0.25, 1.0] and flow.alpha.tolist() == [0.75, 0.0]
    assert flow.timestep.tolist() == [250.0, 1000.0] and flow.index.tolist() == [-1, -1]
    schedule = schedules.ddim(50)
    trained = schedule.between(torch.tensor([1e-4, 0.5, 1.0]))
    assert trained.timestep.tolist() == [0.0, 499.0, 999.0]
    torch.testing.assert_close(trained.alpha**2 + trained.sigma**2, torch.ones(3))
    at = schedule.between((schedule.timestep[3:4] + 1) / 1000)
    assert at.timestep == schedule.timestep[3] and torch.equal(at.alpha, schedule.alpha[3:4])


@pytest.mark.parametrize(
    ("decay", "moves"),
    [
        (Decay(0.5), [0.5, 0.5, 0.5, 0.5]),
        (Decay(0.25, ramp=0.1), [0.0, 0.1, 0.2, 0.25]),
        (Decay(0.25, ramp=0.1, delay=2), [0.0, 0.0, 0.0, 0.1]),
        (Decay(0.9, delay=1), [0.0, 0.9, 0.9, 0.9]),
    ],
)
def test_weights_that_follow_others_by_a_schedule(decay, moves):
    assert [decay.at(k) for k in range(4)] == pytest.approx(moves)
    average, weights, expected = AveragedWeights(decay), torch.tensor([1.0, -2.0]), torch.tensor([1.0, -2.0])
    average.start([("w", weights)])
    for k, share in enumerate(moves, start=1):
        weights = weights + 1
        average.move([("w", weights)])
        expected = share * expected + (1 - share) * weights
        torch.testing.assert_close(average.piece("w"), expected)
        assert average.moves == k
    resumed = AveragedWeights(decay)
    resumed.start([("w", average.piece("w"))], average.moves)
    for one in (average, resumed):
        one.move([("w", weights + 3)])
    assert torch.equal(average.piece("w"), resumed.piece("w"))
    with pytest.raises(ValueError, match=r"a decay of 1\.0 is no average"):
        Decay(1.0)
