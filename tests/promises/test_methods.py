"""Promises 1 to 4 with windows of stochastic steps, single ones, what a group shares, solved tails, CPS and trust regions."""

import json

import pytest
import torch

from fastvideo_grpo.sampling.noise import SampleKey
from fastvideo_grpo.sampling.noise_levels import NoiseLevel
from fastvideo_grpo.trainers.iteration_steps import trained_timestep_weights
from tests.promises.models import GUIDANCE, cases
from tests.trainer import runs
from tests.trainer.comparisons import assert_same_bitwise, assert_same_to_rounding

ALL_TRAINED = {"grpo__timesteps__strategy": "all", "grpo__timesteps__fraction": 1.0}
WINDOW = {**ALL_TRAINED, "sample__stochastic__steps": "window", "sample__stochastic__width": 2}
ONE = {**ALL_TRAINED, "sample__stochastic__steps": "one", "sample__stochastic__fraction": 0.8}
METHODS = {
    "window": {**WINDOW, "sample__stochastic__start": 1},
    "window that moves, best of": {
        **WINDOW,
        "sample__stochastic__start": 1,
        "sample__stochastic__moves": "progressive",
        "sample__stochastic__every": 1,
        "grpo__best_of__top": 1,
        "grpo__best_of__bottom": 1,
    },
    "window anywhere, guard": {
        **WINDOW,
        "sample__stochastic__moves": "random",
        "grpo__trust_region": "guard",
        "grpo__timesteps__weight": "guard",
    },
    "one for each group, dppo": {**ONE, "grpo__trust_region": "dppo", "grpo__timesteps__weight": "rectified"},
    "one for each sample": {**ONE, "sample__stochastic__per": "sample", "grpo__timesteps__weight": "noise"},
}
# Of models that predict a velocity.
FLOWS = {
    "window, solved tail": {**WINDOW, "sample__stochastic__start": 1, "sample__stochastic__tail": 0.6},
    "one for each group, solved tail": {**ONE, "sample__stochastic__tail": 0.5},
    "cps": {"sample__transition": "cps", "grpo__trust_region": "guard"},
    "noise of Flow-GRPO": {"sample__noise_schedule": "flow_grpo", "grpo__timesteps__weight": "rectified"},
}
SHORT = {
    "sample__steps": 5,
    "grpo__prompts_per_iteration": 4,
    "grpo__updates_per_iteration": 2,
    "run__iterations": 2,
    "run__save_every": 2,
}


def methods(model):
    return METHODS if model.kind == "stable_diffusion" else {**METHODS, **FLOWS}


def settings_of(model, case):
    guidance = GUIDANCE["guidance in one pass" if model.guided else "no guidance"]
    return model.run(**{**SHORT, **guidance, **methods(model)[case]})


def quick(model, case):
    """FLUX is asked half of it here, and two others one each."""
    asked = {
        "flux": (
            "window that moves, best of",
            "window anywhere, guard",
            "one for each sample",
            "one for each group, solved tail",
        ),
        "wan": ("cps",),
        "stable_diffusion": ("one for each group, dppo",),
    }
    return case in asked.get(model.kind, ())


@pytest.mark.parametrize("model,case", cases(methods, quick))
def test_ratios_are_one_and_what_is_made_and_kept_is_what_the_plan_says(make_trainer, model, case):
    """The ratio whatever the trust region; and evaluations of the network, and states kept of a sample."""
    trainer = make_trainer(**{**settings_of(model, case), "optim__lr": 1e-3})
    steps, made = trainer.steps, []
    predict, rollout = trainer.predict, trainer.rollout

    def counted(sample, level, conditioning):
        made[-1] += 0 if torch.is_grad_enabled() else 1
        return predict(sample, level, conditioning)

    def watched(iteration, prompts, clock):
        made.append(0)
        drawn = rollout(iteration, prompts, clock)
        seed, size = trainer.config.run.seed, trainer.config.engine.micro_batch_size
        keys = [
            SampleKey(seed, iteration, group, prompts[group].id, members[0])
            for group, members in trainer.run.dealing.rollout_batches(0)
        ]
        assert made[-1] == steps.predictions_of([(key.group, key) for key in keys])
        assert made[-1] <= len(keys) * steps.steps and len(keys) == 4 * 4 // size
        for (what, *_), kept in drawn.trajectories.items():
            assert len(kept) == steps.kept + (what == "latents")
        assert any(what == "means" for what, *_ in drawn.trajectories) == steps.keeps_means
        made.append(0)  # the update's, and the evaluations'
        return drawn

    def weighed(iteration, rollout, found, chosen, clock):
        table = trained_timestep_weights(trainer, trainer.run.objective, iteration, rollout.prompts, chosen)
        keys = [
            SampleKey(trainer.config.run.seed, iteration, group, rollout.prompts[group].id, row.member)
            for group, batches in enumerate(chosen)
            for batch in batches
            for row in batch
            if row.weight > 0
        ]
        assert table[steps.chosen(keys)].mean().item() == pytest.approx(1.0, rel=1e-6)
        return update(iteration, rollout, found, chosen, clock)

    update, trainer.update = trainer.update, weighed
    trainer.predict, trainer.rollout = counted, watched
    made.append(0)
    trainer.train()
    lines = trainer.run.log.read()
    assert len(lines) == 2
    for line in lines:
        assert line["train/ratio_first_update_max_dev"] == 0.0 < line["train/ratio_max_dev"]
        assert abs(line["train/ratio_mean"] - 1) < 0.5
        assert ("train/masked_fraction" if "dppo" in case else "train/clip_fraction") in line
        assert line["train/kl_rollout"] >= 0 or not steps.keeps_means


@pytest.mark.parametrize(
    "model,case",
    cases(
        lambda model: [case for case in methods(model) if case != "noise of Flow-GRPO"],
        lambda model, case: (model.kind, case) in (("flux", "one for each sample"), ("wan", "one for each group, solved tail")),
    ),
)
def test_what_a_group_shares_is_exact(make_trainer, tmp_path, model, case):
    """Drawn once, at batch 1, the samples are those of a rollout in which each draws it for itself, to the rounding of a micro-
    batch's size; and without noise they are the ODE's where nothing is solved in fewer steps."""
    trainer, prompt = make_trainer(train=False, **settings_of(model, case)), model.prompt(tmp_path)
    shared = {iteration: trainer.steps.shared_prefix(SampleKey(0, iteration, 1, prompt.id, 0)) for iteration in range(60)}
    longest = max(shared, key=lambda iteration: shared[iteration])
    if "sample__stochastic__steps" in methods(model)[case]:
        # The window that stays shares a step; so that what is shared is no single step where it can be more.
        assert shared[longest] >= (1 if case in ("window", "window, solved tail") else 2)
    keys = [SampleKey(0, longest, 1, prompt.id, member) for member in range(4)]
    drawn = [trainer.draw(prompt, keys[:2]), trainer.draw(prompt, keys[2:])]
    trainer.steps.shared_prefix = lambda key: 0
    alone = [trainer.draw(prompt, keys[:2]), trainer.draw(prompt, keys[2:])]
    for ours, theirs in zip(drawn, alone, strict=True):
        torch.testing.assert_close(ours.latents, theirs.latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.trajectory.latents, theirs.trajectory.latents, rtol=0, atol=1e-5)
    assert not torch.equal(drawn[0].latents[0], drawn[0].latents[1])
    if trainer.config.sample.stochastic.tail == 1:
        trainer.transition.noise = NoiseLevel()
        trainer.transition = trainer.transition.deterministic()
        trainer.config.sample.init_noise = "per_sample"
        fixed = trainer.draw_fixed(prompt, keys[:2])
        torch.testing.assert_close(trainer.draw(prompt, keys[:2]).latents, fixed.latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "model,case",
    cases(lambda model: ("2 steps", "a solver") if "cps" in methods(model) else ("2 steps",), lambda m, case: m.kind == "flux"),
)
def test_evaluations_are_drawn_in_steps_and_by_a_solver_of_their_own(make_trainer, tmp_path, model, case):
    """Whatever a rollout does, which is as before."""
    prompt = model.prompt(tmp_path)
    keys = [SampleKey(0, 0, 0, prompt.id, member) for member in range(2)]
    own = {"2 steps": {"sample__eval_steps": 2}, "a solver": {"sample__eval_steps": 20, "sample__eval_solver": "dpm_solver"}}
    drawn, rolled = {}, {}
    for name, settings in (("rollout's", {}), (case, own[case]), ("exact", {"sample__eval_steps": 60})):
        trainer = make_trainer(train=False, **{**settings_of(model, "window"), **settings})
        made, predict = [], trainer.predict
        trainer.predict = lambda *args, made=made, predict=predict: made.append(1) or predict(*args)
        drawn[name] = trainer.draw_fixed(prompt, keys).latents
        assert len(made) == (trainer.config.sample.eval_steps or 5)
        rolled[name] = trainer.draw(prompt, keys).latents
        trainer.close()
    assert torch.equal(rolled["rollout's"], rolled[case]) and not torch.equal(drawn["rollout's"], drawn[case])
    if case == "a solver":
        assert (drawn[case] - drawn["exact"]).abs().mean() < (drawn["rollout's"] - drawn["exact"]).abs().mean()


@pytest.fixture(scope="module")
def alone(tiny_checkpoint, tmp_path_factory):
    """``alone(settings)`` -> folder of a recorded run of one process."""
    return runs.once(tmp_path_factory, tiny_checkpoint, record=True)


PROCESSES = {
    # Groups differ in their stochastic steps, so that processes would make unequally many passes.
    "one for each group, dppo, ZeRO 3": (2, {"engine__zero_stage": 3}),
    "one for each sample, ZeRO 3": (2, {"engine__zero_stage": 3}),
    "window that moves, best of, ZeRO 2": (2, {"engine__zero_stage": 2}),
    "window anywhere, guard, ZeRO 2, 4 processes": (4, {"engine__zero_stage": 2}),
}
SHARED = {
    "one for each group, solved tail, ZeRO 3, shared tokens, 4 processes": (
        4,
        {"engine__zero_stage": 3, "engine__sequence_parallel": 2},
    ),
    "window, solved tail, ZeRO 2, shared tokens": (2, {"engine__zero_stage": 2, "engine__sequence_parallel": 2}),
}


def method_of(model, case):
    return next(name for name in sorted(methods(model), key=len, reverse=True) if case.startswith(name))


@pytest.mark.parametrize(
    "model,case",
    cases(
        lambda model: {**PROCESSES, **(SHARED if model.shares_tokens else {})},
        lambda model, case: (model.kind, case) == ("flux", "one for each group, dppo, ZeRO 3"),
    ),
)
def test_processes_give_the_samples_and_weights_of_one(alone, tiny_checkpoint, tmp_path, model, case):
    """Also where groups span processes: each draws its own copy of what they share."""
    processes, how = {**PROCESSES, **SHARED}[case]
    of_one = {
        **settings_of(model, method_of(model, case)),
        "optim__warmup_steps": 4,
        "run__sample_every": 2,
        "run__sample_prompts": 2,
    }
    settings = {**of_one, **how, "engine__kind": "deepspeed"}
    if how["engine__zero_stage"] == 3:
        # Tensors of a tiny model are so small that DeepSpeed leaves them whole, and nobody would wait for anybody.
        partitioned = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        (tmp_path / "deepspeed.json").write_text(json.dumps(partitioned))
        settings["engine__deepspeed_json"] = tmp_path / "deepspeed.json"
    overrides = runs.settings(tmp_path, tiny_checkpoint(model.kind), **settings)
    assert runs.run(overrides, processes=processes, record=True) == [0] * processes
    assert_same_to_rounding(tmp_path, alone(of_one), 2)


@pytest.mark.parametrize(
    "model,case",
    cases(
        lambda model: [case for case in methods(model) if "moves" in case or "anywhere" in case or "group" in case],
        lambda model, case: (model.kind, case) == ("flux", "window that moves, best of"),
    ),
)
def test_killed_and_resumed_is_bitwise_never_killed(tiny_checkpoint, tmp_path, model, case):
    """The window's place is a function of seed and iteration."""
    settings = settings_of(model, case)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings |= {"run__save_every": 1, "optim__ema_decay": 0.9}
    assert runs.run(runs.settings(whole, tiny_checkpoint(model.kind), **settings)) == [0]
    overrides = runs.settings(killed, tiny_checkpoint(model.kind), **settings)
    assert runs.run(overrides, kill=runs.Kill("engine.step", 3, after=True)) == [-9]
    assert runs.checkpoints(killed) == ["000001"]
    assert runs.run(overrides) == [0]
    assert_same_bitwise(killed, whole, 2)
