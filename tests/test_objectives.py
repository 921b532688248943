"""Objectives against cases computed by hand, normalisations, pairs, and what each asks of the configuration."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from fastvideo_grpo.checkpoints.resume import check_resumable, prompts_state
from fastvideo_grpo.config import saved as config_saved
from fastvideo_grpo.config.checks import cautions
from fastvideo_grpo.config.keys import make_objective
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.grpo import advantages, objectives, selection, timesteps
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.planning import plan
from fastvideo_grpo.planning.memory import estimate
from fastvideo_grpo.rewards import reward_set
from fastvideo_grpo.sampling import noise, schedules, transitions
from fastvideo_grpo.sampling.noise import SampleKey

# --- gradients, by hand -----------------------------------------------------------------------------------------------

SCHEDULES = {"flow_sde": schedules.flow(6, 1.0), "ddim": schedules.ddim(6)}
NOISE_LEVEL = 0.7
INDEX = [1, 3]  # the transition of each row
Z = [[0.4, -1.1, 0.7], [1.3, 0.2, -0.6]]
ADVANTAGES = [1.5, -0.5]
OLD, NOW, REFERENCE = (0.30, -0.10), (0.31, -0.13), (0.25, -0.05)  # (a, b) of the network a z + b
OFFSET = [[0.5, -0.8, 0.3], [-0.2, 0.9, 0.4]]  # what was drawn, in standard deviations of the old policy


def _by_hand(kind, row, a, b):
    """One row's Gaussian under the network a z + b: mean, std, its derivative in the output, x_hat and its derivative."""
    schedule, i = SCHEDULES[kind], INDEX[row]
    alpha, sigma = schedule.alpha[i].item(), schedule.sigma[i].item()
    alpha_next, sigma_next = schedule.alpha[i + 1].item(), schedule.sigma[i + 1].item()
    output = [a * z + b for z in Z[row]]
    if kind == "flow_sde":
        distance = sigma - sigma_next
        pull = 0.5 * NOISE_LEVEL**2 * distance
        mean = [z - distance * u - pull * (z + alpha * u) / sigma for z, u in zip(Z[row], output, strict=True)]
        slope = -distance - pull * alpha / sigma
        std = NOISE_LEVEL * math.sqrt(distance)
        denoised, denoised_slope = [z - sigma * u for z, u in zip(Z[row], output, strict=True)], -sigma
    else:
        variance = NOISE_LEVEL**2 * (sigma_next / sigma) ** 2 * (1 - (alpha / alpha_next) ** 2)
        direction = math.sqrt(sigma_next**2 - variance)
        denoised = [(z - sigma * e) / alpha for z, e in zip(Z[row], output, strict=True)]
        mean = [alpha_next * x + direction * e for x, e in zip(denoised, output, strict=True)]
        slope = -alpha_next * sigma / alpha + direction
        std, denoised_slope = math.sqrt(variance), -sigma / alpha
    return SimpleNamespace(mean=mean, std=std, slope=slope, denoised=denoised, denoised_slope=denoised_slope)


def _drawn(kind, row):
    old = _by_hand(kind, row, *OLD)
    return [m + old.std * n for m, n in zip(old.mean, OFFSET[row], strict=True)]


def _log_prob(kind, row, a, b):
    """Mean over dimensions of the log density of what was drawn, and its derivatives in a and b."""
    step, drawn = _by_hand(kind, row, a, b), _drawn(kind, row)
    constant = math.log(step.std) + 0.5 * math.log(2 * math.pi)
    value = sum(-((x - m) ** 2) / (2 * step.std**2) - constant for x, m in zip(drawn, step.mean, strict=True)) / 3
    errors = [(x - m) / step.std**2 * step.slope / 3 for x, m in zip(drawn, step.mean, strict=True)]
    return value, (sum(e * z for e, z in zip(errors, Z[row], strict=True)), sum(errors))


def _kl(kind, row):
    """(mean - mean_ref)^2 / (2 std^2), mean over dimensions, and its derivatives."""
    now, reference = _by_hand(kind, row, *NOW), _by_hand(kind, row, *REFERENCE)
    apart = [m - r for m, r in zip(now.mean, reference.mean, strict=True)]
    errors = [d / now.std**2 * now.slope / 3 for d in apart]
    value = sum(d**2 for d in apart) / (2 * now.std**2) / 3
    return value, (sum(e * z for e, z in zip(errors, Z[row], strict=True)), sum(errors))


class _Replay:
    """A network a z + b on the stored transitions; a picture is half the latents plus a half, its reward minus the squared
    distance to 0.8."""

    def __init__(self, kind, weights=NOW, rewards=None):
        self.kind, self.rewards = kind, rewards
        self.weights = torch.tensor(weights, requires_grad=True)
        self.transition = transitions.get(kind, noise_level=NOISE_LEVEL)

    def _step(self, weights):
        schedule, index, z = SCHEDULES[self.kind], torch.tensor(INDEX), torch.tensor(Z)
        drawn = torch.tensor([_drawn(self.kind, row) for row in range(2)])
        output = weights[0] * z + weights[1]
        return self.transition.step(output, z, schedule.at(index), schedule.at(index + 1), next_sample=drawn)

    def step(self, i):
        return self._step(self.weights)

    def reference(self, i):
        with torch.no_grad():
            return self._step(torch.tensor(REFERENCE))

    def decode(self, latents):
        return (latents / 2 + 0.5).view(len(latents), 1, 1, 1, 3)

    def reward(self, pixels):
        scores = -((pixels - 0.8) ** 2).mean((1, 2, 3, 4))
        return scores if self.rewards is None else self.rewards(scores)


def _samples(kind):
    old = torch.tensor([[_log_prob(kind, row, *OLD)[0]] for row in range(2)])
    return objectives.SampleBatch(torch.tensor(ADVANTAGES), old, torch.tensor(INDEX).view(2, 1), torch.ones(2))


def _objective(name, **changes):
    defaults = {"clip_range": 0.5, "advantage_clip": None, "kl_weight": 0.3 if name == "dpok" else 0.0}
    return objectives.get(name, **{**defaults, **changes})


def _expected(kind, name):
    """Loss of each row and gradient of their sum, in plain numbers."""
    losses, gradient = [], [0.0, 0.0]
    if name == "dpo":
        (winner, d_winner), (loser, d_loser) = (_log_prob(kind, row, *NOW) for row in range(2))
        reference = [_log_prob(kind, row, *REFERENCE)[0] for row in range(2)]
        margin = (winner - reference[0]) - (loser - reference[1])
        loss = math.log(1 + math.exp(-2.0 * margin))
        factor = -2.0 / (1 + math.exp(2.0 * margin))  # of each row's loss, and there are two
        return [loss, loss], [2 * factor * (w - x) for w, x in zip(d_winner, d_loser, strict=True)]
    for row in range(2):
        if name == "refl":
            step = _by_hand(kind, row, *NOW)
            pixels = [x / 2 + 0.5 for x in step.denoised]
            losses.append(sum((p - 0.8) ** 2 for p in pixels) / 3)
            errors = [2 * (p - 0.8) / 3 * 0.5 * step.denoised_slope for p in pixels]
            part = [sum(e * z for e, z in zip(errors, Z[row], strict=True)), sum(errors)]
        else:
            (new, slopes), (old, _) = _log_prob(kind, row, *NOW), _log_prob(kind, row, *OLD)
            ratio = math.exp(new - old)
            assert 0.5 < ratio < 1.5 and ratio != 1.0  # not clipped
            losses.append(-ADVANTAGES[row] * ratio)
            part = [-ADVANTAGES[row] * ratio * slope for slope in slopes]
            if name == "dpok":
                kl, kl_slopes = _kl(kind, row)
                losses[-1] += 0.3 * kl
                part = [p + 0.3 * k for p, k in zip(part, kl_slopes, strict=True)]
        gradient = [g + p for g, p in zip(gradient, part, strict=True)]
    return losses, gradient


@pytest.mark.parametrize("name", ["grpo", "ddpo", "dpok", "refl", "dpo"])
@pytest.mark.parametrize("kind", ["flow_sde", "ddim"])
def test_loss_and_gradient_are_those_computed_by_hand(kind, name):
    replay = _Replay(kind)
    objective = _objective(name, params={"beta": 2.0} if name == "dpo" else {})
    loss, statistics = objective.loss(replay, _samples(kind), 0)
    (gradient,) = torch.autograd.grad(loss.sum(), replay.weights)
    losses, expected = _expected(kind, name)
    assert loss.tolist() == pytest.approx(losses, rel=1e-5)
    assert gradient.tolist() == pytest.approx(expected, rel=2e-4)
    ratios = [math.exp(_log_prob(kind, row, *NOW)[0] - _log_prob(kind, row, *OLD)[0]) for row in range(2)]
    assert statistics["ratio"].tolist() == pytest.approx(ratios, rel=1e-5)
    assert all(not values.requires_grad and values.shape == (2,) for values in statistics.values())


@pytest.mark.parametrize("name", ["grpo", "ddpo", "dpok"])
def test_the_policy_gradient_stops_where_the_ratio_is_out_of_its_range_in_the_good_direction(name):
    samples = _samples("flow_sde")
    objective = _objective(name, clip_range=1e-4, kl_weight=1e-12 if name == "dpok" else 0.0)
    for sign in (1, -1):  # whichever way the weights went, a row whose advantage agrees with it is clipped
        replay = _Replay("flow_sde")
        ratio = torch.exp(replay.step(0).log_prob.detach() - samples.log_probs[:, 0])
        agreeing = objectives.SampleBatch(sign * (ratio - 1).sign(), samples.log_probs, samples.timesteps, samples.weights)
        loss, statistics = objective.loss(replay, agreeing, 0)
        (gradient,) = torch.autograd.grad(loss.sum(), replay.weights)
        assert statistics["clipped"].tolist() == [1.0, 1.0]
        assert (gradient.abs().max() < 1e-6) == (sign == 1)


@pytest.mark.parametrize("unknown", ["nan", "inf", "gradient"])
def test_a_row_that_a_reward_cannot_judge_leaves_the_gradient_of_the_other(unknown):
    """Also where the NaN only appears in the reward's backward pass: sqrt of a negative number."""

    def rewards(scores):
        if unknown == "gradient":
            return torch.stack([scores[0], scores[1].sqrt()])
        return torch.where(torch.tensor([False, True]), float(unknown), scores)

    spoilt, clean = _Replay("flow_sde", rewards=rewards), _Replay("flow_sde")
    loss, statistics = _objective("refl").loss(spoilt, _samples("flow_sde"), 0)
    (gradient,) = torch.autograd.grad(loss.sum(), spoilt.weights)
    expected = _objective("refl").loss(clean, _samples("flow_sde"), 0)[0][0]
    assert loss.tolist() == [expected.item(), 0.0] and statistics["unjudged"].tolist() == [0.0, 1.0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, clean.weights)[0])


def test_a_batch_that_a_reward_judges_none_of_still_goes_backwards():
    """With the constant NaN that rewards are told to give: other processes wait for this one's backward pass."""
    replay = _Replay("flow_sde", rewards=lambda scores: torch.full_like(scores.detach(), torch.nan))
    loss, statistics = _objective("refl").loss(replay, _samples("flow_sde"), 0)
    (gradient,) = torch.autograd.grad(loss.sum(), replay.weights)
    assert loss.tolist() == [0.0, 0.0] and statistics["unjudged"].tolist() == [1.0, 1.0] and not gradient.any()


def test_refl_needs_no_density_and_the_others_say_that_they_do():
    class Deterministic(_Replay):
        def __init__(self):
            super().__init__("flow_sde")
            self.transition = self.transition.deterministic()

    loss, statistics = _objective("refl").loss(Deterministic(), _samples("flow_sde"), 0)
    assert loss.isfinite().all() and set(statistics) == {"unjudged"}
    for name in ("grpo", "ddpo", "dpok", "dpo"):
        with pytest.raises(ValueError, match="noise level above 0"):
            _objective(name).loss(Deterministic(), _samples("flow_sde"), 0)


# --- a small quadratic case -------------------------------------------------------------------------------------------

NORMALISATION = {"grpo": "group", "ddpo": "prompt_history", "dpok": "global", "refl": "group", "dpo": "group"}


class _Toy:
    """Algorithm 1 on the network a z + b, whose samples shall be 1: reward -(x - 1)^2, mean over 4 dimensions."""

    steps, groups, size = 5, 4, 8

    def __init__(self, kind, name):
        self.schedule = schedules.flow(self.steps, 1.0) if kind == "flow_sde" else schedules.ddim(self.steps)
        self.transition = transitions.get(kind, noise_level=0.7)
        self.weights = torch.tensor([1.0, 0.3] if kind == "flow_sde" else [0.9, 0.3], requires_grad=True)
        self.start = self.weights.detach().clone()
        self.objective = _objective(
            name, clip_range=0.2, kl_weight=0.01 if name == "dpok" else 0.0, params={"beta": 0.5} if name == "dpo" else {}
        )
        self.normalisation = advantages.get(NORMALISATION[name], history_size=32, history_minimum=16)
        self.strategy, self.fraction = ("late", 0.25) if name == "refl" else ("all", 1.0)

    def step_at(self, weights, z, index, **how):
        level, following = self.schedule.at(index), self.schedule.at(index + 1)
        return self.transition.step(weights[0] * z + weights[1], z, level, following, **how)

    def rollout(self, groups):
        count = groups * self.size
        states, log_probs = [torch.randn(count, 4)], []
        with torch.no_grad():
            for i in range(self.steps):
                step = self.step_at(self.weights, states[-1], torch.full((count,), i), noise=torch.randn(count, 4))
                states.append(step.next_sample)
                log_probs.append(torch.zeros(count) if step.log_prob is None else step.log_prob)
        rewards = -((states[-1] - 1) ** 2).mean(1)
        return torch.stack(states, 1), torch.stack(log_probs, 1), rewards.view(groups, self.size)

    def batch(self, iteration):
        """The rows that are trained on, as the trainer picks them."""
        states, log_probs, rewards = self.rollout(self.groups)
        prompts = [f"p{group}" for group in range(self.groups)]
        found = self.normalisation.advantages({"r": rewards}, {"r": torch.ones_like(rewards).bool()}, {"r": 1.0}, prompts)
        rows = []
        for group in range(self.groups):
            members = list(range(self.size))
            if self.objective.pairs:
                members = selection.pairs(found.values[group], found.valid[group], 2)
            rows += [group * self.size + member for member in members]
        keys = [SampleKey(0, iteration, row // self.size, prompts[row // self.size], row % self.size) for row in rows]
        when = timesteps.choose(keys, self.steps, self.strategy, self.fraction, "sample")
        samples = objectives.SampleBatch(
            found.values.flatten()[rows], log_probs[rows].gather(1, when), when, torch.ones(len(rows))
        )
        return _ToyReplay(self, states[rows], when), samples

    def reward(self):
        """Mean over many samples of one noise."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.rollout(500)[2].mean().item()

    def loss(self, replay, samples):
        draws = samples.timesteps.shape[1]
        return sum(self.objective.loss(replay, samples, i)[0].mean() for i in range(draws)) / draws


class _ToyReplay:
    def __init__(self, toy, states, when):
        self.toy, self.states, self.when = toy, states, when

    def _step(self, weights, i):
        index, rows = self.when[:, i], torch.arange(len(self.when))
        return self.toy.step_at(weights, self.states[rows, index], index, next_sample=self.states[rows, index + 1])

    def step(self, i):
        return self._step(self.toy.weights, i)

    def reference(self, i):
        with torch.no_grad():
            return self._step(self.toy.start, i)

    def decode(self, latents):
        return latents

    def reward(self, pixels):
        return -((pixels - 1) ** 2).mean(1)


@pytest.mark.parametrize("name", list(NORMALISATION))
@pytest.mark.parametrize("kind", ["flow_sde", "ddim"])
def test_each_objective_improves_its_own_loss_and_the_reward_on_a_quadratic_case(kind, name):
    torch.manual_seed(0)
    toy = _Toy(kind, name)
    first = toy.reward()
    replay, samples = toy.batch(0)
    optimiser = torch.optim.Adam([toy.weights], lr=1e-3)
    before = toy.loss(replay, samples).item()
    for _ in range(3):
        optimiser.zero_grad()
        toy.loss(replay, samples).backward()
        optimiser.step()
    assert toy.loss(replay, samples).item() < before
    optimiser = torch.optim.Adam([toy.weights], lr=1e-2)
    for iteration in range(1, 40):
        replay, samples = toy.batch(iteration)
        optimiser.zero_grad()
        toy.loss(replay, samples).backward()
        optimiser.step()
    assert toy.reward() > first + 0.1


# --- normalisations ---------------------------------------------------------------------------------------------------


def _normalise(name, rewards, valid=None, weights=None, prompts=None, size=32, minimum=16):
    rewards = rewards if isinstance(rewards, dict) else {"r": torch.tensor(rewards)}
    valid = valid or {key: torch.ones_like(value).bool() for key, value in rewards.items()}
    weights = weights or dict.fromkeys(rewards, 1.0)
    made = advantages.get(name, history_size=size, history_minimum=minimum) if isinstance(name, str) else name
    groups = len(next(iter(rewards.values())))
    return made.advantages(rewards, valid, weights, prompts or [f"p{group}" for group in range(groups)])


def test_global_advantages_are_standard_scores_over_all_valid_samples_of_the_iteration():
    """1, 2, 3, 6: mean 3, unbiased variance 14/3; the NaN and the invalid 99 do not count."""
    rewards = {"r": torch.tensor([[1.0, 2.0, float("nan")], [3.0, 6.0, 99.0]])}
    result = _normalise("global", rewards, {"r": torch.tensor([[True] * 3, [True, True, False]])})
    std = math.sqrt(14 / 3)
    expected = [[-2 / std, -1 / std, 0.0], [0.0, 3 / std, 0.0]]
    torch.testing.assert_close(result.values, torch.tensor(expected))
    assert result.valid.tolist() == [[True, True, False], [True, True, False]] and not result.zero_spread.any()


def test_global_advantages_of_rewards_are_added_and_none_is_invented_without_spread():
    torch.manual_seed(0)
    rewards = {"a": torch.randn(3, 4), "b": torch.full((3, 4), 0.1), "watched": torch.full((3, 4), float("nan"))}
    both = _normalise("global", rewards, weights={"a": 0.5, "b": 2.0, "watched": 0.0})
    torch.testing.assert_close(both.values, 0.5 * _normalise("global", {"a": rewards["a"]}).values)
    flat = _normalise("global", {"b": rewards["b"]})
    assert torch.equal(flat.values, torch.zeros(3, 4)) and flat.zero_spread.all()


def test_a_group_without_spread_still_differs_from_the_iteration_but_one_without_valid_samples_does_not():
    rewards = {"r": torch.tensor([[1.0, 1.0], [3.0, 5.0], [0.0, 0.0]])}
    valid = {"r": torch.tensor([[True, True], [True, True], [False, False]])}
    result = _normalise("global", rewards, valid)
    assert result.zero_spread.tolist() == [False, False, True]
    assert (result.values[0] < 0).all() and torch.equal(result.values[2], torch.zeros(2))


def test_a_prompt_is_normalised_with_its_last_rewards_once_it_has_enough_of_them():
    """Size 4, from 3 on its own statistics. First iteration: both prompts have 2, so those of the iteration count."""
    history = advantages.PromptHistory(size=4, minimum=3)
    first = _normalise(history, [[1.0, 2.0], [3.0, 6.0]], prompts=["a", "b"])
    torch.testing.assert_close(first.values, _normalise("global", [[1.0, 2.0], [3.0, 6.0]]).values)
    # a: 1, 2, 4, 5: mean 3, variance 10/3. c is new: mean and variance of 4, 5, 0, 3: 3 and 14/3.
    second = _normalise(history, [[4.0, 5.0], [0.0, 3.0]], prompts=["a", "c"])
    own, all_ = math.sqrt(10 / 3), math.sqrt(14 / 3)
    torch.testing.assert_close(second.values, torch.tensor([[1 / own, 2 / own], [-3 / all_, 0.0]]))
    # The oldest fall out: 4, 5, 7, 8, mean 6.
    third = _normalise(history, [[7.0, 8.0]], prompts=["a"])
    torch.testing.assert_close(third.values, torch.tensor([[1 / own, 2 / own]]))
    assert history.state() == {"r": {"a": [4.0, 5.0, 7.0, 8.0], "b": [3.0, 6.0], "c": [0.0, 3.0]}}


def test_a_prompt_drawn_twice_has_one_history_and_invalid_samples_never_enter_it():
    history = advantages.PromptHistory(size=8, minimum=3)
    rewards = {"r": torch.tensor([[1.0, float("nan")], [2.0, 99.0], [6.0, 7.0]])}
    valid = {"r": torch.tensor([[True, True], [True, False], [True, True]])}
    result = _normalise(history, rewards, valid, prompts=["a", "a", "b"])
    assert history.state() == {"r": {"a": [1.0, 2.0], "b": [6.0, 7.0]}}
    assert result.valid.tolist() == [[True, False], [True, False], [True, True]]
    result = _normalise(history, [[4.0, 5.0], [3.0, 3.0]], prompts=["a", "a"])
    std = math.sqrt(sum((x - 3) ** 2 for x in (1, 2, 4, 5, 3, 3)) / 5)
    torch.testing.assert_close(result.values, torch.tensor([[1 / std, 2 / std], [0.0, 0.0]]))


def test_a_history_without_spread_gives_advantage_zero():
    history = advantages.PromptHistory(size=8, minimum=2)
    result = _normalise(history, [[0.1, 0.1], [0.2, 0.9]], prompts=["a", "b"])
    assert torch.equal(result.values[0], torch.zeros(2)) and result.zero_spread.tolist() == [True, False]


def test_a_history_goes_on_exactly_where_it_was_saved():
    torch.manual_seed(0)
    rewards = [{"r": torch.randn(2, 3) / 3, "s": torch.randn(2, 3)} for _ in range(4)]
    whole, parts = (advantages.PromptHistory(size=5, minimum=4) for _ in range(2))
    for iteration, scores in enumerate(rewards):
        resumed = advantages.PromptHistory(size=5, minimum=4)
        resumed.restore(json.loads(json.dumps(parts.state(), indent=1)))
        parts = resumed
        prompts = ["a", "b"] if iteration % 2 else ["b", "c"]
        assert torch.equal(*(_normalise(h, scores, prompts=prompts).values for h in (whole, parts)))
        assert whole.state() == parts.state()


def test_a_normalisation_without_memory_refuses_another_ones():
    made = advantages.get("group", history_size=32, history_minimum=16)
    assert made.state() == {}
    with pytest.raises(ValueError, match="remembers nothing"):
        made.restore({"r": {"a": [1.0]}})
    with pytest.raises(ValueError, match="known: group, global, prompt_history"):
        advantages.get("batch", history_size=32, history_minimum=16)


# --- pairs and timesteps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values,valid,count,expected",
    [
        ([0.1, 3.0, -2.0, 0.2, -1.0, 2.0], "111111", 2, [1, 2, 5, 4]),
        ([0.1, 3.0, -2.0, 0.2, -1.0, 2.0], "111111", 9, [1, 2, 5, 4, 3, 0]),
        ([0.1, 3.0, -2.0, 0.2, -1.0, 2.0], "101111", 1, [5, 2]),
        ([1.0, 2.0, 3.0], "111", 2, [2, 0]),  # the middle one has nobody
        ([1.0, 2.0, 3.0], "001", 1, []),
        ([1.0, 2.0], "00", 1, []),
        ([0.0, 0.0, 0.0], "111", 1, []),  # no spread
        ([5.0, 1.0, 1.0, 0.0], "1111", 2, [0, 3]),  # the second best and the second worst are alike
        ([2.0, 2.0, 0.0, 0.0], "1111", 2, [0, 3, 1, 2]),
    ],
)
def test_pairs_are_best_beside_worst_of_the_valid_ones(values, valid, count, expected):
    assert selection.pairs(torch.tensor(values), torch.tensor([bit == "1" for bit in valid]), count) == expected


def test_pairs_stay_together_in_micro_batches_and_what_fills_them_does_not_count():
    batches = selection.regroup_pairs([4, 1, 0, 2], slots=6, micro_batch_size=4)
    assert [[(row.member, row.weight) for row in batch] for batch in batches] == [
        [(4, 1.0), (1, 1.0), (0, 1.0), (2, 1.0)],
        [(4, 0.0), (4, 0.0), (4, 0.0), (4, 0.0)],
    ]


def test_late_is_one_timestep_of_the_last_part_and_each_of_them_is_drawn():
    keys = [SampleKey(0, iteration, 0, "p", member) for iteration in range(40) for member in range(2)]
    assert timesteps.count(17, "late", 0.25) == 1
    per_sample = timesteps.choose(keys, 17, "late", 0.25, "sample")
    assert per_sample.shape == (80, 1) and set(per_sample.flatten().tolist()) == {12, 13, 14, 15}
    per_group = timesteps.choose(keys, 17, "late", 0.25, "group").view(40, 2)
    assert torch.equal(per_group[:, 0], per_group[:, 1])
    assert timesteps.choose(keys[:2], 3, "late", 0.1, "sample").tolist() == [[1], [1]]


# --- what each asks of the configuration ------------------------------------------------------------------------------

MINIMAL = {
    "model": {"path": "model"},
    "prompts": {"path": "prompts.txt"},
    "rewards": {"models": {"size": {"kind": "jpeg_size"}}},
    "engine": {"micro_batch_size": 2},
    "run": {"dir": "runs/x"},
}


def _config(*overrides):
    return run_config.build(MINIMAL, list(overrides))


def test_each_objective_brings_the_defaults_of_its_paper():
    grpo = _config()
    assert (grpo.grpo.normalisation, grpo.sample.init_noise, grpo.grpo.best_of) == ("group", "shared", None)
    ddpo = _config("grpo.objective=ddpo")
    assert (ddpo.grpo.normalisation, ddpo.sample.init_noise) == ("prompt_history", "per_sample")
    assert (ddpo.grpo.history.size, ddpo.grpo.history.minimum) == (32, 16)
    dpok = _config("grpo.objective=dpok")
    assert (dpok.grpo.normalisation, dpok.sample.init_noise, dpok.grpo.kl_weight) == ("global", "per_sample", 0.01)
    refl = _config("grpo.objective=refl")
    assert (refl.grpo.timesteps.strategy, refl.grpo.timesteps.fraction) == ("late", 0.25)
    assert refl.sample.init_noise == "per_sample"
    for name in ("dpo", "diffusion_dpo"):
        dpo = _config(f"grpo.objective={name}")
        assert (dpo.grpo.best_of.top, dpo.grpo.best_of.bottom, dpo.grpo.timesteps.per) == (1, 1, "group")
    nft = _config("grpo.objective=nft")
    assert (nft.grpo.old_weights.decay, nft.grpo.old_weights.ramp, nft.grpo.kl_weight) == (0.5, 0.001, 1e-4)
    assert (nft.sample.init_noise, nft.sample.stochastic.steps) == ("per_sample", "none")
    awm = _config("grpo.objective=awm")
    assert (awm.optim.ema_decay, awm.optim.ema_ramp, awm.grpo.ema_kl_weight) == (0.3, 0.001, 0.1)
    assert awm.grpo.old_weights is None and (awm.grpo.clip_range, awm.grpo.advantage_clip) == (1.0, 1.0)
    for objective in (nft, awm):
        assert (objective.sample.init_noise, objective.sample.stochastic.steps) == ("per_sample", "none")


def test_a_key_that_is_given_wins_over_the_objective():
    ddpo = _config("grpo.objective=ddpo", "grpo.normalisation=global", "sample.init_noise=shared")
    assert (ddpo.grpo.normalisation, ddpo.sample.init_noise) == ("global", "shared")
    dpo = _config("grpo.objective=dpo", "grpo.best_of={top: 3, bottom: 3}")
    assert (dpo.grpo.best_of.top, dpo.grpo.timesteps.per) == (3, "group")


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["grpo.objective=ppo"], "allowed: awm, ddpo, diffusion_dpo, dpo, dpok, grpo, nft, refl"),
        (["grpo.normalisation=batch"], "allowed: group, global, prompt_history"),
        (["grpo.history.minimum=40"], "grpo.history.minimum is 40.*at least 40"),
        (["grpo.objective=dpok", "grpo.kl_weight=0"], "grpo.kl_weight is 0.*above 0.*grpo.objective=ddpo"),
        (["grpo.objective=ddpo", "grpo.kl_weight=0.1"], "grpo.kl_weight is 0.1.*set it to 0 .those of awm, dpok, grpo, nft "),
        (["grpo.objective=ddpo", "grpo.ema_kl_weight=0.1"], "ema_kl_weight is 0.1.*set it to 0 .those of awm, dpok, grpo, nft"),
        (["grpo.ema_kl_weight=0.1"], "ema_kl_weight is 0.1, but optim.ema_decay=null averages nothing.*optim.ema_ramp=0.001"),
        (["optim.ema_ramp=0.1"], "optim.ema_ramp is 0.1, but optim.ema_decay=null averages nothing"),
        (["grpo.old_weights={}"], "grpo.old_weights is set, which is of objectives on clean samples .awm, diffusion_dpo, nft."),
        (["grpo.cfg_scale=2.0"], "grpo.cfg_scale is set, which is of objectives on clean samples"),
        (["grpo.timesteps.levels=uniform"], "grpo.timesteps.levels is set, which is of objectives on clean samples"),
        (["sample.stochastic.steps=none"], "but objective grpo trains steps that draw noise: use all, window or one"),
        (["sample.solver=dpm_solver"], "sample.solver is dpm_solver, which is of sample.stochastic.steps=none"),
        (["grpo.objective=nft", "grpo.old_weights.decay=1.0"], "grpo.old_weights.decay: a decay of 1.0 is no average"),
        (["grpo.objective=nft", "sample.init_noise=shared"], "all samples of a prompt would be the same: use per_sample"),
        (["grpo.objective=nft", "grpo.timesteps.weight=guard"], "timesteps.weight is guard.*use none"),
        (["grpo.objective=nft", "grpo.timesteps.levels=uniform"], "strategy is first, but levels=uniform draws them"),
        (["grpo.objective=nft", "grpo.timesteps.level_shift=2.0"], "level_shift is 2, which is of drawn levels"),
        (
            ["grpo.objective=awm", "grpo.timesteps.levels=uniform", "grpo.timesteps.level_std=2.0"],
            "level_std is 2, which is of levels=logit_normal",
        ),
        (
            ["grpo.objective=nft", "sample.transition=ddim", "sample.solver=dpm_solver"],
            "sample.solver is dpm_solver, which is made for networks that predict a velocity",
        ),
        (["grpo.objective=diffusion_dpo", "grpo.timesteps.per=sample"], "set grpo.timesteps.per=group"),
        (
            [
                "grpo.objective=diffusion_dpo",
                "grpo.timesteps={levels: uniform, strategy: all, fraction: 1.0, per: sample}",
            ],
            "compared at the same levels: set grpo.timesteps.per=group",
        ),
        (["grpo.objective=dpo", "grpo.kl_weight=0.1"], "objective dpo has no such term"),
        (["grpo.objective=refl", "grpo.kl_weight=0.1"], "objective refl has no such term"),
        (["grpo.objective=dpo", "engine.micro_batch_size=3"], "engine.micro_batch_size is 3.*set it to 2 or 4"),
        (["grpo.objective=dpo", "engine.micro_batch_size=1"], "engine.micro_batch_size is 1.*set it to 2"),
        (["grpo.objective=dpo", "grpo.timesteps.per=sample"], "grpo.timesteps.per=group"),
        (["grpo.objective=dpo", "grpo.best_of=null"], r"grpo.best_of is null.*best_of=\{top: 1, bottom: 1\}"),
        (["grpo.objective=dpo", "grpo.best_of={top: 2, bottom: 1}"], r"grpo.best_of is \{top: 2, bottom: 1\}"),
        (["grpo.objective=dpo", "grpo.objective_params={bta: 1}"], r"objective_params\.bta: .*it has beta"),
        (["grpo.objective=dpo", "grpo.objective_params={beta: -1}"], "beta is -1; it must be a finite number above 0"),
        (["grpo.objective=dpo", "grpo.objective_params={beta: many}"], "beta is 'many'"),
        (["grpo.objective_params={clip_range: 1}"], r"it has none; it is a key of its own, grpo\.clip_range"),
        (["grpo.objective=refl", "engine.offload_idle=true"], "engine.offload_idle is true.*use false"),
        (
            ["grpo.objective=refl", "engine.kind=deepspeed", "engine.sequence_parallel=2"],
            "engine.sequence_parallel is 2.*use 1",
        ),
    ],
)
def test_impossible_combinations_stop_with_a_way_out(overrides, message):
    with pytest.raises(ConfigError, match=message):
        _config(*overrides)


def test_pairs_may_have_timesteps_per_sample_where_nothing_is_drawn():
    assert _config("grpo.objective=dpo", "grpo.timesteps={per: sample, strategy: first}").grpo.timesteps.per == "sample"


def test_refl_at_noisy_steps_is_cautioned_against():
    assert not cautions(_config("grpo.objective=refl"))
    (line,) = cautions(_config("grpo.objective=refl", "grpo.timesteps.strategy=random"))
    assert "set late, with fraction 0.25" in line


@pytest.mark.parametrize(
    "override", ["grpo.objective=dpok", "grpo.normalisation=global", "grpo.history.size=64", "grpo.objective_params={beta: 1}"]
)
def test_a_run_is_not_resumed_with_another_objective(override):
    needed = {"beta": "grpo.objective=dpo", "history": "grpo.objective=ddpo"}
    started = [setting for word, setting in needed.items() if word in override]
    old = config_saved.to_dict(_config(*started))
    changed = config_saved.changed_on_resume(old, _config(*started, override))
    assert override.partition("=")[0] in {key.rpartition(".beta")[0] or key for key in changed}


def _saved(config):
    """What a checkpoint's trainer.json says of a run."""
    state = {"config": config_saved.to_dict(config), "denoiser": "its weights", "noise": noise.VERSION, "images": {}}
    return {**state, **prompts_state([], config)}


def test_a_run_from_before_these_keys_goes_on():
    old = config_saved.to_dict(_config())
    for key in ("normalisation", "history", "objective_params"):
        del old["grpo"][key]
    assert config_saved.changed_on_resume(old, _config()) == []
    state = {**_saved(_config()), "config": old}
    check_resumable(state, _config(), [], "its weights")
    with pytest.raises(ConfigError, match="another network"):
        check_resumable(state, _config(), [], "others")


@pytest.mark.parametrize("overrides,merged", [((), False), (("model.lora={}",), True)])
def test_a_run_with_the_noise_of_another_version_does_not_go_on_and_says_how_to_start_anew(overrides, merged):
    config = _config(*overrides)
    state = _saved(config)
    del state["noise"]  # as it was before there was another
    with pytest.raises(ConfigError, match=r"drew its noise otherwise.*fastvideo-grpo export .* --pipeline") as error:
        check_resumable(state, config, [], "its weights")
    assert ("--merge-lora" in str(error.value)) == merged
    check_resumable({**state, "noise": noise.VERSION}, config, [], "its weights")


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["grpo.objective=refl", "grpo.clip_range=0.5"], "grpo.clip_range is 0.5, but objective refl does not use it"),
        (["grpo.objective=dpo", "grpo.advantage_clip=2", "engine.micro_batch_size=2"], "is 2.0, but objective dpo"),
        (["grpo.objective=refl", "grpo.normalisation=global"], "objective refl has no advantages"),
        (["grpo.history.size=64"], "grpo.normalisation=group remembers nothing"),
    ],
)
def test_a_key_that_the_objective_would_ignore_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        _config(*overrides)


def test_an_objective_registered_elsewhere_gets_the_settings_it_asks_for(monkeypatch):
    monkeypatch.setattr(objectives.OBJECTIVES, "_registered", dict(objectives.OBJECTIVES._registered))

    class Own:
        needs_reference, needs_reward_gradients, pairs = False, False, False

        def __init__(self, *, clip_range, margin, slope=1.0):
            self.given = clip_range, margin, slope

        def loss(self, replay, samples, i):
            raise NotImplementedError

    objectives.OBJECTIVES.register("own", Own)
    made = make_objective(
        _config("grpo.objective=own", "grpo.objective_params={margin: 3}", "grpo.clip_range=0.2")
    )
    assert made.given == (0.2, 3, 1.0)
    with pytest.raises(ConfigError, match=r"needs grpo\.objective_params\.margin"):
        _config("grpo.objective=own")
    with pytest.raises(ValueError, match="registered twice"):
        objectives.OBJECTIVES.register("grpo", Own)


def _planned(tmp_path, *overrides):
    (tmp_path / "prompts.txt").write_text("a red circle")
    config = _config(f"prompts.path={tmp_path / 'prompts.txt'}", *overrides)
    return config, model_facts(config, published_if_missing=True)


def test_the_reference_and_the_decoding_of_an_update_count_as_memory(tmp_path):
    def memory(*overrides):
        config, facts = _planned(tmp_path, *overrides)
        return estimate(config, facts, 1, (10**9, 10**9))

    assert "reference" not in memory().resident
    for name in ("dpok", "dpo"):
        assert memory(f"grpo.objective={name}").resident["reference"] == 2 * 10**9
        assert "reference" not in memory(f"grpo.objective={name}", "model.lora.rank=4").resident
    more = memory("grpo.objective=refl").phases["update"] - memory().phases["update"]
    assert more == 2 * 720 * 720 * (45 * 128 * 4 + 12)


def test_the_plan_names_objective_and_normalisation(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "count_parameters", lambda config, facts: (10**9, 10**9))
    config, facts = _planned(tmp_path, "grpo.objective=ddpo")
    (line,) = [line for line in plan.describe(config, facts, 1).splitlines() if line.startswith("  update     ddpo")]
    assert "ddpo, rewards normalised over the prompt's last 32 rewards" in line


def test_refl_asks_for_rewards_with_gradients(tmp_path, monkeypatch):
    """The check itself is the rewards'; here: it is made for every reward, of no other objective and no pictures."""
    asked = []
    monkeypatch.setattr(reward_set, "check_differentiable", lambda name, entry: asked.append((name, entry.kind)))
    for overrides, training in ((("grpo.objective=refl",), True), (("grpo.objective=refl",), False), ((), True)):
        config, facts = _planned(tmp_path, *overrides)
        plan.check_run(config, facts, 1, here=False, training=training)
    assert asked == [("size", "jpeg_size")]
