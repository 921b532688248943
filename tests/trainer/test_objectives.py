"""Each objective on the loop of one process, from the one line of configuration that says which."""

import math

import pytest
import torch

from tests.trainer import runs
from tests.trainer.test_loop import _After

STATISTICS = {
    "grpo": {"clip_fraction", "kl_rollout"},
    "ddpo": {"clip_fraction", "kl_rollout"},
    "dpok": {"clip_fraction", "kl_rollout", "kl"},
    "refl": {"unjudged"},
    "dpo": {"preferred"},
}
EVERY = {"train/loss", "train/ratio_first_update_max_dev", "train/ratio_max_dev", "train/grad_norm", "train/lr"}
EVERY |= {"train/updates", "train/skipped_updates", "train/ratio_mean"}
SMOOTH = {"rewards__models__pixels__kind": "test_smooth_brightness"}


# A flow, and a diffusion model with guidance.
MODELS = {"FLUX": {}, "Stable Diffusion": {**runs.STABLE_DIFFUSION, "grpo__updates_per_iteration": 2}}


# GRPO is trained everywhere; the rest of the matrix in `make test-all`.
QUICK = [("FLUX", "refl"), *(("Stable Diffusion", name) for name in STATISTICS if name != "grpo")]
CASES = [(model, name) for model in MODELS for name in STATISTICS]


@pytest.mark.parametrize("model,name", [c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in CASES])
def test_each_objective_trains_and_its_replay_is_the_rollout(make_trainer, model, name):
    """Promise 1 holds whatever is minimised."""
    trainer = make_trainer(**MODELS[model], grpo__objective=name, run__iterations=2, optim__lr=1e-3, **SMOOTH)
    before = trainer.engine.state_dict()
    assert (trainer._reference is not None) == (name in ("dpok", "dpo"))
    trainer.train()
    lines = trainer.run.log.read()
    for line in lines:
        found = {key for key in line if key.startswith("train/")}
        assert found == EVERY | {f"train/{statistic}" for statistic in STATISTICS[name]}
        assert line["train/ratio_first_update_max_dev"] == 0.0 < line["train/ratio_max_dev"]
        assert line["train/updates"] == 2 and line["train/skipped_updates"] == 0
        assert line["train/grad_norm"] > 0 and math.isfinite(line["train/loss"])
    assert not runs.same_bits(trainer.engine.state_dict(), before)


def test_dpo_begins_at_the_loss_of_a_policy_that_is_its_reference(make_trainer):
    trainer = make_trainer(grpo__objective="dpo", grpo__updates_per_iteration=1, run__iterations=2, optim__lr=1e-3)
    trainer.train()
    first, second = (line["train/loss"] for line in trainer.run.log.read())
    assert first == pytest.approx(math.log(2), rel=1e-6) and second != pytest.approx(math.log(2), rel=1e-3)


def test_pairs_of_the_trainer_are_the_best_beside_the_worst(make_trainer):
    trainer = make_trainer(grpo__objective="dpo", run__iterations=1)
    seen = []
    select = trainer.select
    trainer.select = lambda advantages: seen.append((advantages, select(advantages))) or seen[-1][1]
    trainer.train()
    ((advantages, chosen),) = seen
    for values, ((winner, loser),) in zip(advantages.values, chosen, strict=True):
        assert (winner.member, loser.member) == (int(values.argmax()), int(values.argmin()))
        assert winner.weight == loser.weight == 1.0


def test_refl_raises_its_reward(make_trainer):
    """The gradient is the reward's own: one step along it, and the samples of the same noise are better."""
    trainer = make_trainer(
        grpo__objective="refl", grpo__updates_per_iteration=1, run__iterations=3, run__eval_every=3, optim__lr=1e-3, **SMOOTH
    )
    before = trainer.run.monitor.evaluate()["eval/train/pixels/brightness/mean"]
    trainer.train()
    assert trainer.run.log.read()[-1]["eval/train/pixels/brightness/mean"] > before + 1
    assert all(line["train/unjudged"] == 0.0 for line in trainer.run.log.read())


def test_refl_leaves_out_samples_that_its_reward_cannot_judge_and_names_it(make_trainer, monkeypatch):
    monkeypatch.setattr(runs, "PROMPTS", ["a red circle", "something unknown"])
    trainer = make_trainer(grpo__objective="refl", grpo__prompts_per_iteration=2, run__iterations=1, **SMOOTH)
    trainer.train()
    (line,) = trainer.run.log.read()
    assert line["train/unjudged"] == 0.5 and line["train/updates"] == 2
    assert any("pixels/brightness: no gradient" in message for message in trainer.run.scoring.rewards.failure_counts)
    assert all(weight.isfinite().all() for weight in trainer.engine.state_dict().values())


def test_a_resumed_run_remembers_the_rewards_of_each_prompt(make_trainer, tmp_path):
    """Promise 4: in the second iteration prompts have enough rewards for statistics of their own, if they are remembered."""
    settings = {
        "grpo__objective": "ddpo",
        "grpo__history__minimum": 6,
        "grpo__history__size": 9,
        "run__iterations": 3,
        "optim__lr": 1e-3,
    }
    whole = make_trainer(**settings, run__dir=tmp_path / "whole")
    whole.train()
    make_trainer(**settings, run__dir=tmp_path / "parts").train(stop=_After(1))
    resumed = make_trainer(**settings, run__dir=tmp_path / "parts")
    assert resumed.run.first_iteration == 1
    resumed.train()
    assert resumed.run.normalisation.state() == whole.run.normalisation.state()
    assert any(len(scores) == 9 for scores in whole.run.normalisation.state()["pixels/brightness"].values())
    assert runs.same_bits(resumed.engine.state_dict(), whole.engine.state_dict())
    whole_lines, lines = whole.run.log.read(), resumed.run.log.read()
    assert len(lines) == 3
    for one, two in zip(whole_lines, lines, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(runs.OF_THE_MACHINE)} == {
            k: v for k, v in two.items() if not k.startswith(runs.OF_THE_MACHINE)
        }


def test_refl_trains_on_one_late_timestep_of_each_sample(make_trainer):
    """Of ten steps nine are trainable, and the last quarter of those are three."""
    trainer = make_trainer(grpo__objective="refl", sample__steps=10, run__iterations=1, **SMOOTH)
    seen = []
    loss = trainer.run.objective.loss
    trainer.run.objective.loss = lambda replay, samples, i: seen.append(samples.timesteps) or loss(replay, samples, i)
    trainer.train()
    drawn = torch.cat(seen)
    assert drawn.shape == (16, 1) and set(drawn.flatten().tolist()) <= {6, 7, 8} and len(set(drawn.flatten().tolist())) > 1
