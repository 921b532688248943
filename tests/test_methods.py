"""What came after DanceGRPO: noise levels, CPS, stochastic steps, the solver behind them, timestep weights, trust regions."""

import json
import math
from pathlib import Path

import pytest
import torch

from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.grpo import advantages, timestep_weights, timesteps
from fastvideo_grpo.grpo.objectives import SampleBatch, trust_regions
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.planning import memory, plan
from fastvideo_grpo.planning.run_steps import evaluations_per_sample, idle_of
from fastvideo_grpo.sampling import schedules, solvers, transitions
from fastvideo_grpo.sampling.noise import SampleKey
from fastvideo_grpo.sampling.rollout import Span, Start, Walk, rollout
from fastvideo_grpo.sampling.stochastic_steps import StochasticSteps

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT.parent / "shared" / "golden" / "methods.json"
golden = pytest.mark.skipif(not GOLDEN.exists(), reason="the golden numbers (../shared/golden) are not beside the project")
CASES = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def _close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected).expand_as(actual), rtol=1e-5, atol=1e-5)


class _Golden:
    """A step of the golden numbers, drawn at ``velocity`` and replayed at ``velocity_new``."""

    def __init__(self, case):
        self.case, schedule = case, schedules.flow(case["steps"], case["shift"])
        self.sample = torch.tensor(case["sample"])
        index = torch.full((len(self.sample),), case["index"])
        self.levels = schedule.at(index), schedule.at(index + 1)
        _close(self.levels[0].sigma, case["sigma"])
        _close(self.levels[1].sigma, case["sigma_next"])
        name, noise_schedule = ("cps", "constant") if case["kind"] == "CPS" else ("flow_sde", "flow_grpo")
        self.transition = transitions.get(name, noise_level=case["noise_level"], noise_schedule=noise_schedule)
        velocity, noise = torch.tensor(case["velocity"]), torch.tensor(case["noise"])
        self.drawn = self.transition.step(velocity, self.sample, *self.levels, noise=noise)

    def step(self, i):
        new = torch.tensor(self.case["velocity_new"])
        return self.transition.step(new, self.sample, *self.levels, next_sample=torch.tensor(self.case["next_sample"]))

    def old_mean(self, i):
        return torch.tensor(self.case["mean"])

    def samples(self):
        count = len(self.sample)
        return SampleBatch(
            torch.zeros(count),
            torch.tensor(self.case["log_prob_gaussian"]).view(count, 1),
            torch.full((count, 1), self.case["index"]),
            torch.ones(count),
        )


@golden
@pytest.mark.parametrize("case", [*CASES.get("flow_sde_of_flow_grpo", []), *CASES.get("cps", [])])
def test_steps_and_trust_regions_meet_golden_numbers(case):
    given = _Golden(case)
    for name in ("mean", "next_sample"):
        _close(getattr(given.drawn, name), case[name])
    _close(given.drawn.std, case["std"])
    _close(given.drawn.log_prob, case["log_prob_gaussian"])
    _close(given.step(0).mean, case["mean_new"])
    _close(given.step(0).log_prob, case["log_prob_gaussian_new"])
    if "gradient_scale" in case:
        scale = transitions.sensitivity(given.transition, *given.levels) / transitions.deviation(
            given.transition, *given.levels
        )
        _close(scale, case["gradient_scale"])
    if "guard_ratio" in case:
        guard = trust_regions.get("guard", 1.0, None, 1.0)
        _, statistics = guard.surrogate(given.step(0), given, given.samples(), 0, torch.ones(len(given.sample)))
        _close(statistics["ratio"], case["guard_ratio"])
    expected = case["dppo"]
    dppo = trust_regions.get("dppo", 1.0, None, expected["threshold"])
    loss, statistics = dppo.surrogate(given.step(0), given, given.samples(), 0, torch.tensor(expected["advantages"]))
    _close(loss, expected["loss"])
    torch.testing.assert_close(statistics["kl_rollout"], torch.tensor(expected["kl"]), rtol=1e-3, atol=0)
    assert statistics["masked"].tolist() == [float(value == 0) for value in expected["loss"]]


@pytest.mark.parametrize("name", ["flow_sde", "cps"])
def test_every_trust_region_begins_at_a_ratio_of_exactly_one_with_the_same_gradient(name):
    """Up to the scale that Guard's normalised ratio says of itself."""
    schedule, transition = schedules.flow(8, 3.0), transitions.get(name, noise_level=0.7)
    torch.manual_seed(0)
    z, noise = torch.randn(3, 5), torch.randn(3, 5)
    index = torch.tensor([0, 3, 5])
    levels = schedule.at(index), schedule.at(index + 1)
    output = torch.randn(3, 5)
    drawn = transition.step(output, z, *levels, noise=noise)

    class Replay:
        def old_mean(self, i):
            return drawn.mean

    samples = SampleBatch(torch.zeros(3), drawn.log_prob.view(3, 1), index.view(3, 1), torch.ones(3))
    gradients = {}
    for region in trust_regions.TRUST_REGIONS:
        network = output.clone().requires_grad_(True)
        step = transition.step(network, z, *levels, next_sample=drawn.next_sample)
        made = trust_regions.get(region, 1e-4, None, 1e-5)
        loss, statistics = made.surrogate(step, Replay(), samples, 0, torch.tensor([1.0, -2.0, 0.5]))
        assert statistics["ratio"].tolist() == [1.0] * 3
        assert statistics["kl_rollout"].tolist() == [0.0] * 3
        (gradients[region],) = torch.autograd.grad(loss.sum(), network)
    torch.testing.assert_close(gradients["dppo"], gradients["clip"])
    torch.testing.assert_close(gradients["guard"], gradients["clip"] * drawn.std.view(3, 1), rtol=1e-5, atol=1e-7)


def test_a_clip_range_of_its_own_above():
    region = trust_regions.ClipRange(0.1, 0.3)
    loss, clipped = region.surrogate(torch.tensor([0.85, 0.95, 1.2, 1.4]), torch.ones(4))
    assert clipped.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert loss.tolist() == pytest.approx([-0.85, -0.95, -1.2, -1.3])


def test_the_mean_of_the_ratio_sinks_below_one_with_clip_and_not_with_guard():
    """A step of the policy in a direction that has nothing to do with the samples."""
    schedule, transition = schedules.flow(10, 1.0), transitions.get("flow_sde", noise_level=0.5)
    torch.manual_seed(0)
    count, size = 2000, 16
    index = torch.full((count,), 4)
    levels = schedule.at(index), schedule.at(index + 1)
    z, output = torch.randn(count, size), torch.randn(count, size)
    drawn = transition.step(output, z, *levels, noise=torch.randn(count, size))
    moved = transition.step(output + 2.0, z, *levels, next_sample=drawn.next_sample)

    class Replay:
        def old_mean(self, i):
            return drawn.mean

    samples = SampleBatch(torch.zeros(count), drawn.log_prob.view(-1, 1), index.view(-1, 1), torch.ones(count))
    mean = {}
    for name in ("clip", "guard"):
        statistics = trust_regions.get(name, 1.0, None, 1.0).surrogate(moved, Replay(), samples, 0, torch.ones(count))[1]
        mean[name] = statistics["ratio"].log().mean().item()
        assert statistics["kl_rollout"].mean().item() == pytest.approx(-mean["clip"], rel=0.1)
    assert mean["clip"] < -0.1 and abs(mean["guard"]) < 0.01


@pytest.mark.parametrize("name", ["flow_sde", "cps", "ddim", "diffusion_sde"])
def test_sensitivity_is_the_derivative_of_the_mean(name):
    schedule = schedules.ddim(6) if name in ("ddim", "diffusion_sde") else schedules.flow(6, 3.0)
    transition, index = transitions.get(name, noise_level=0.6), torch.arange(5)
    levels = schedule.at(index), schedule.at(index + 1)
    torch.manual_seed(0)
    output = torch.randn(5, 1, requires_grad=True)
    mean = transition.step(output, torch.randn(5, 1), *levels).mean
    (slope,) = torch.autograd.grad(mean.sum(), output)
    torch.testing.assert_close(transitions.sensitivity(transition, *levels), slope[:, 0].abs(), rtol=1e-4, atol=1e-6)


def test_timestep_weights_are_what_their_papers_say_of_a_flow():
    schedule, level = schedules.flow(8, 3.0), 0.7
    transition = transitions.get("flow_sde", noise_level=level)
    sigma, apart = schedule.sigma[:-2], schedule.sigma[:-2] - schedule.sigma[1:-1]
    lam = apart * (1 + level**2 * (1 - sigma) / (2 * sigma)) / (level * apart.sqrt())

    def table(name, normalised=False):
        return timestep_weights.table(name, transition, schedule, normalised=normalised)

    torch.testing.assert_close(table("rectified"), 1 / lam, rtol=1e-4, atol=0)
    torch.testing.assert_close(table("rectified", True), 1 / (lam * level * apart.sqrt()), rtol=1e-4, atol=0)
    torch.testing.assert_close(table("guard"), 1 / apart, rtol=1e-4, atol=0)
    torch.testing.assert_close(table("noise"), level * apart.sqrt(), rtol=1e-4, atol=0)
    assert table("none").tolist() == [1.0] * 7


def test_flow_grpo_noise_keeps_the_marginals_of_a_gaussian_target():
    def predict(z, level):
        alpha, sigma = level.alpha.view(-1, 1), level.sigma.view(-1, 1)
        return (sigma - alpha * 0.25) * z / (alpha**2 * 0.25 + sigma**2)

    torch.manual_seed(0)
    transition = transitions.get("flow_sde", noise_level=0.7, noise_schedule="flow_grpo")
    walk = Walk(schedules.flow(200, 1.0), transition, lambda i: torch.randn(4000, 2))
    assert rollout(predict, torch.randn(4000, 2), walk)[0].std() == pytest.approx(0.5, abs=0.03)


def test_cps_leaves_a_state_the_noise_of_its_level():
    """Where the network knows the data: the state's distance from them is the level's sigma, however much is new."""
    schedule, data = schedules.flow(6, 3.0), torch.tensor([0.3, -0.8])
    for noise_level in (0.2, 0.7, 0.95):
        torch.manual_seed(0)
        transition, z = transitions.get("cps", noise_level=noise_level), torch.randn(4000, 2)
        for i in range(6):
            level, following = (schedule.at(torch.full((4000,), at)) for at in (i, i + 1))
            velocity = (z - data) / level.sigma.view(-1, 1)
            z = transition.step(velocity, z, level, following, noise=torch.randn(4000, 2)).next_sample
            left = (z - following.alpha.view(-1, 1) * data).square().mean().sqrt()
            assert left == pytest.approx(float(following.sigma[0]), rel=0.03, abs=1e-5)


@pytest.mark.parametrize(
    "settings,message",
    [
        (("cps", 1.0), "set it above 0 and below 1"),
        (("ddim", 1.5), "at most 1.*transition=diffusion_sde"),
        (("ddim", 0.5, "flow_grpo"), "networks that predict a velocity"),
        (("flow_sde", 0.5, "linear"), "known: constant, flow_grpo"),
        (("flow_sde", 0.5, "flow_grpo", 1.0), "falls by itself"),
    ],
)
def test_a_noise_level_that_does_not_fit_is_refused_with_what_would(settings, message):
    with pytest.raises(ValueError, match=message):
        transitions.get(settings[0], **dict(zip(("noise_level", "noise_schedule", "noise_decay"), settings[1:], strict=False)))


# --- the solver ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin,steps,fraction", [(0, 12, 1.0), (4, 16, 0.4), (6, 25, 0.2), (14, 16, 0.5), (0, 20, 0.3)])
def test_the_solver_is_diffusers_own(begin, steps, fraction):
    """On the same sigmas, its coefficients to 1e-6: on states that are 1, once for each thing that a step multiplies."""
    from diffusers import DPMSolverMultistepScheduler

    schedule = schedules.flow(steps, 3.0)
    levels = solvers.fewer_levels(begin, steps, fraction)
    assert levels[0] == begin and levels[-1] == steps and len(levels) - 1 == math.ceil(fraction * (steps - begin) - 1e-9)
    assert list(levels) == sorted(set(levels))
    solver = solvers.DPMSolver(schedule, levels)
    theirs = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        solver_order=2,
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    theirs.set_timesteps(len(levels) - 1)
    theirs.sigmas = schedule.sigma[list(levels)].double().clamp(max=1.0)
    theirs.lower_order_nums, theirs.model_outputs = 0, [None, None]
    torch.manual_seed(0)
    state = torch.randn(4, 9, dtype=torch.float64)
    ours, before = state.clone(), None
    for k in range(len(levels) - 1):
        velocity = torch.randn(4, 9, dtype=torch.float64)
        sigma = theirs.sigmas[k]
        denoised = ours - sigma * velocity
        state = theirs.step(velocity, theirs.timesteps[k], state, return_dict=False)[0]
        ours, before = solver.step(k, ours, denoised, before), denoised
        torch.testing.assert_close(ours, state, rtol=1e-6, atol=1e-6)


def test_the_solver_is_nearer_the_ode_than_euler_in_as_many_steps():
    def predict(z, level):
        alpha, sigma = level.alpha.view(-1, 1), level.sigma.view(-1, 1)
        return (sigma - alpha * 0.25) * z / (alpha**2 * 0.25 + sigma**2)

    torch.manual_seed(0)
    initial, transition = torch.randn(64, 2), transitions.get("ode")
    drawn = {}
    for steps, solved in ((1000, False), (20, False), (20, True)):
        schedule = schedules.flow(steps, 1.0)
        solver = solvers.DPMSolver(schedule, range(steps + 1)) if solved else None
        walk = Walk(schedule, transition, solver=solver)
        drawn[steps, solved] = rollout(predict, initial, walk)[0]
    exact = drawn[1000, False]
    assert (drawn[20, True] - exact).abs().mean() < 0.3 * (drawn[20, False] - exact).abs().mean()


# --- which steps are stochastic ---------------------------------------------------------------------------------------------


def _keys(count=4, iteration=0, group=0):
    return [SampleKey(3, iteration, group, "a", member) for member in range(count)]


def test_where_windows_are():
    def starts(iterations, **settings):
        steps = StochasticSteps(10, "window", **settings)
        return [int(steps.span(_keys(iteration=k)).first[0]) for k in iterations]

    assert starts(range(3), width=4, start=2) == [2, 2, 2]
    progressive = starts(range(0, 16, 2), width=4, moves="progressive", stride=1, every=2)
    assert progressive == [0, 1, 2, 3, 4, 5, 0, 1]  # 5 is the last place: the window ends before the last step
    assert starts(range(4), width=4, start=1, moves="progressive", stride=4, every=1) == [1, 5, 3, 1]
    drawn = starts(range(200), width=4, moves="random")
    assert set(drawn) == set(range(6)) and drawn == starts(range(200), width=4, moves="random")


@pytest.mark.parametrize("per", ["group", "sample"])
def test_one_step_is_drawn_from_the_first_part(per):
    steps = StochasticSteps(10, "one", fraction=0.5, per=per)
    firsts = [steps.span(_keys(iteration=k)).first.tolist() for k in range(100)]
    assert {first for row in firsts for first in row} == set(range(5))
    assert all(len(set(row)) == 1 for row in firsts) == (per == "group")
    # How often a group's first stochastic step is where.
    seen = [min(row) for row in firsts]
    for place, often in steps.places(4, 100):
        assert seen.count(place) / 100 == pytest.approx(often, abs=0.15)
    assert sum(often for _, often in steps.places(4, 100)) == pytest.approx(1)


@pytest.mark.parametrize(
    "settings,message",
    [({"width": 10}, "use at most 9"), ({"width": 4, "start": 6}, "use at most 5")],
)
def test_a_window_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StochasticSteps(10, "window", **settings)


def test_timesteps_are_chosen_among_stochastic_steps():
    span = Span(torch.tensor([3, 5]), 4)
    assert timesteps.choose(_keys(2), 10, "all", 1.0, "sample", span).tolist() == [[3, 4, 5, 6], [5, 6, 7, 8]]
    assert timesteps.choose(_keys(2), 10, "last", 0.2, "sample", span).tolist() == [[5, 6], [7, 8]]
    random = timesteps.choose(_keys(2), 10, "random", 0.3, "sample", span)
    assert all(first <= i < first + 4 for first, row in zip((3, 5), random.tolist(), strict=True) for i in row)
    with pytest.raises(ValueError, match=r"6 trained timesteps, but only 4 can be trained: use strategy=all"):
        timesteps.count(10, "random", 0.6, 4)
    for strategy, fraction in (("first", 0.3), ("last", 0.3), ("random", 0.3), ("all", 1.0), ("late", 0.4)):
        offset, kept = timesteps.kept(10, strategy, fraction, 4)
        chosen = timesteps.choose(_keys(40), 10, strategy, fraction, "sample", Span.of(40, 3, 4))
        assert chosen.min() >= 3 + offset and chosen.max() < 3 + offset + kept <= 7


# --- configurations -------------------------------------------------------------------------------------------------------


ONE = ["sample.stochastic.steps=one", "grpo.timesteps.strategy=all", "grpo.timesteps.fraction=1.0"]
WINDOW = ["sample.stochastic.steps=window", *ONE[1:]]


def _config(*overrides):
    return run_config.load(ROOT / "train_scripts" / "configs" / "flux_t2i_released.yaml", list(overrides))


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["sample.stochastic.width=3"], r"stochastic.width is 3, which is of steps=window, and steps is all: leave it out"),
        ([*WINDOW, "sample.stochastic.every=3"], "of moves=progressive: leave it out"),
        ([*WINDOW, "sample.stochastic.moves=random", "sample.stochastic.start=3"], "draws where the window begins"),
        ([*WINDOW, "sample.stochastic.width=16"], "width is 16, .* use at most 15"),
        ([*WINDOW, "sample.stochastic.start=12"], "would reach the last.* use at most 11"),
        (["sample.stochastic.steps=window"], "is 10 trained timesteps, but only 4 can be trained: use strategy=all"),
        ([*ONE, "sample.stochastic.per=sample", "sample.stochastic.tail=0.4"], "no tail in common: use per=group, or tail=1"),
        (["sample.stochastic.tail=0.4"], "tail is 0.4, which is of steps=window or one"),
        ([*ONE, "grpo.objective=dpo", "sample.stochastic.per=sample", "engine.micro_batch_size=2"], "pair of objective dpo"),
        ([*ONE, "grpo.objective=refl"], "objective refl needs no density and trains steps of any kind: use all"),
        (["sample.transition=cps", "sample.noise_level=1"], "set it above 0 and below 1"),
        (["grpo.trust_region=dppo", "grpo.clip_range=0.1"], "dppo clips no ratio: leave it out"),
        (["grpo.kl_threshold=0.1"], "only trust region dppo reads: leave it out"),
        (["grpo.objective=dpo", "grpo.trust_region=guard"], "grpo.trust_region is guard, but objective dpo does not use it"),
        (["grpo.timesteps.weight=flash"], "allowed: none, rectified, guard, noise"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would(overrides, message):
    with pytest.raises(ConfigError, match=message):
        _config(*overrides)


@pytest.mark.parametrize(
    "overrides,message",
    [
        ([*ONE, "sample.stochastic.tail=0.4"], "its solver is made for networks that predict a velocity.*use 1"),
        (["sample.eval_solver=dpm_solver"], "made for networks that predict a velocity.*use ode"),
        (["sample.noise_schedule=flow_grpo"], "use noise_schedule=constant"),
        (["sample.noise_level=1.5"], "at most 1.*transition=diffusion_sde"),
    ],
)
def test_what_a_network_that_predicts_noise_cannot_have_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        run_config.load(ROOT / "train_scripts" / "configs" / "stable_diffusion_t2i_paper.yaml", overrides)


def test_evaluations_a_sample_are_those_of_the_table():
    """That of docs/methods.md: T 16, G 12, a group to a process."""
    tail = "sample.stochastic.tail"
    for overrides, expected in (
        ([], (16, 30)),
        ([*WINDOW, "sample.stochastic.start=6"], (10.5, 12)),
        ([*WINDOW, f"{tail}=0.2"], (7, 12)),
        ([*WINDOW, "sample.stochastic.start=4", "sample.stochastic.width=1", f"{tail}=0.4"], (4 / 12 + 6, 3)),
    ):
        config = _config("grpo.updates_per_iteration=1", *overrides)
        assert evaluations_per_sample(config, plan.dealing(config, 16)) == pytest.approx(expected)


def test_what_is_kept_and_idle_is_said_before_a_run():
    config = _config(*ONE)
    facts = model_facts(config, published_if_missing=True)
    text = plan.describe(config, facts, 16)
    assert "x 16 steps, one of the first 8 stochastic, drawn per group, those before once a group = " in text
    assert "3 in the update (a backward counts two)" in text and "makes 46" in text and "idle" not in text
    whole = memory.estimate(_config(), facts, 16, (1, 1)).host["trajectories"]
    assert memory.estimate(config, facts, 16, (1, 1)).host["trajectories"] == whole / 8  # 2 states of 16
    guard = _config(*ONE, "grpo.trust_region=guard")
    assert memory.estimate(guard, facts, 16, (1, 1)).host["trajectories"] == whole * 3 / 16  # and a mean
    zero3 = _config(*ONE, "engine.zero_stage=3", "grpo.prompts_per_iteration=32")
    assert 0 < idle_of(zero3, plan.dealing(zero3, 32), 0) < 16 * 12
    assert " of them idle" in plan.describe(zero3, facts, 32)
    window = _config(*WINDOW, "engine.zero_stage=3", "grpo.prompts_per_iteration=32")
    assert idle_of(window, plan.dealing(window, 32), 0) == 0  # all make as many


def test_global_std_by_hand():
    """The group's mean, the iteration's unbiased standard deviation; a group without spread has none."""
    rewards = {"r": torch.tensor([[1.0, 3.0], [10.0, 10.0]])}
    valid = {"r": torch.ones(2, 2, dtype=torch.bool)}
    found = advantages.get("global_std", history_size=2, history_minimum=2).advantages(rewards, valid, {"r": 2.0}, ["a", "b"])
    std = rewards["r"].std().item()
    assert found.values.tolist() == [pytest.approx([-2 / std, 2 / std]), [0.0, 0.0]]
    assert found.zero_spread.tolist() == [False, True]


# --- walking ------------------------------------------------------------------------------------------------------------------


def _predict(z, level):
    return torch.sin(3 * z) + level.sigma.view(-1, 1)


def _walk(**settings):
    schedule = schedules.flow(8, 3.0)
    torch.manual_seed(1)
    noise = torch.randn(8, 4, 5)
    return Walk(schedule, transitions.get("flow_sde", noise_level=0.7), lambda i: noise[i], **settings)


def test_a_trajectory_keeps_the_states_of_the_transitions_that_are_asked_for():
    """Those of the whole one, sample by sample; and the steps without noise are the ODE's."""
    torch.manual_seed(0)
    initial = torch.randn(4, 5)
    stochastic = Span(torch.tensor([2, 0, 4, 2]), 2)
    end, whole = rollout(_predict, initial, _walk(stochastic=stochastic, kept=Span.of(4, 0, 8), keep_means=True))
    _, part = rollout(_predict, initial, _walk(stochastic=stochastic, kept=Span(stochastic.first + 1, 1), keep_means=True))
    assert part.latents.shape == (4, 2, 5) and part.means.shape == (4, 1, 5) and torch.equal(whole.latents[:, -1], end)
    for row, first in enumerate([3, 1, 5, 3]):
        assert torch.equal(part.latents[row], whole.latents[row, first : first + 2])
        assert torch.equal(part.log_probs[row], whole.log_probs[row, first : first + 1])
        assert torch.equal(part.means[row], whole.means[row, first : first + 1])
        assert whole.log_probs[row].isfinite().nonzero()[:, 0].tolist() == [first - 1, first]
    walk, ode = _walk(), transitions.get("ode")
    for row in range(4):
        for i in range(8):
            level, following = (walk.schedule.at(torch.tensor([at])) for at in (i, i + 1))
            z = whole.latents[row : row + 1, i]
            if not stochastic.holds(i)[row]:
                assert torch.equal(ode.step(_predict(z, level), z, level, following).next_sample[0], whole.latents[row, i + 1])


def test_what_samples_share_is_drawn_once():
    """From a common start the rest of the walk is the same; so is the whole."""
    torch.manual_seed(0)
    initial = torch.randn(1, 5).repeat(4, 1)
    settings = {"stochastic": Span.of(4, 3, 2), "kept": Span.of(4, 3, 2)}
    end, whole = rollout(_predict, initial, _walk(**settings))
    schedule = schedules.flow(8, 3.0)
    state, nothing = rollout(_predict, initial[:1], Walk(schedule, transitions.get("ode"), stop=3))
    assert nothing is None
    made = []
    again, part = rollout(
        lambda z, level: made.append(len(z)) or _predict(z, level), torch.zeros(4, 5), _walk(**settings, start=Start(3, state))
    )
    torch.testing.assert_close(again, end, rtol=0, atol=1e-6)
    torch.testing.assert_close(part.latents, whole.latents, rtol=0, atol=1e-6)
    assert made == [4] * 5
