"""Promises 2 to 4 of objectives on clean samples: what was stored is what the weights that drew say, whatever the processes,
micro-batches and restarts."""

import pytest
import torch

from fastvideo_grpo.planning import memory
from fastvideo_grpo.trainers import base
from tests.promises.models import GUIDANCE, MODELS, cases
from tests.trainer import runs
from tests.trainer.comparisons import assert_same_bitwise, assert_same_to_rounding

OLD = {"grpo__old_weights__decay": 0.5, "grpo__old_weights__ramp": None}
DRAWN = {"grpo__timesteps__levels": "logit_normal", "grpo__timesteps__level_shift": 2.0}
OBJECTIVES = {
    "nft": {"grpo__objective": "nft", **OLD},
    "nft, a decay that rises": {"grpo__objective": "nft", "grpo__old_weights__ramp": 0.2},
    "nft, trained weights draw": {"grpo__objective": "nft", "grpo__old_weights": None, "grpo__kl_weight": 0.0},
    "awm": {"grpo__objective": "awm", "grpo__ema_kl_weight": 0.5},
    "awm, drawn levels, stochastic samples": {
        "grpo__objective": "awm",
        **DRAWN,
        "sample__stochastic__steps": "all",
        "sample__init_noise": "shared",
    },
    "diffusion_dpo, drawn levels": {
        "grpo__objective": "diffusion_dpo",
        "grpo__timesteps__levels": "uniform",
        "grpo__timesteps__within": 0.7,
    },
    "grpo held at its average": {"grpo__ema_kl_weight": 10.0, "optim__ema_decay": 0.9},
}
# Of models that predict a velocity.
FLOWS = {"nft, solved": {"grpo__objective": "nft", **OLD, "sample__solver": "dpm_solver"}}
SHORT = {
    "sample__steps": 4,
    "grpo__prompts_per_iteration": 4,
    "grpo__updates_per_iteration": 2,
    "run__iterations": 2,
    "run__save_every": 2,
}


def objectives(model):
    return OBJECTIVES if model.kind == "stable_diffusion" else {**OBJECTIVES, **FLOWS}


def settings_of(model, case):
    settings = model.run(**{**SHORT, **GUIDANCE["guidance in one pass" if model.guided else "no guidance"]})
    # What an objective's own defaults say is left to them.
    settings = {key: value for key, value in settings.items() if not key.startswith("grpo__timesteps")}
    if "grpo" in case:
        settings |= {"grpo__timesteps__strategy": "random", "grpo__timesteps__fraction": 0.6}
    else:
        settings.pop("sample__init_noise", None)
    return {**settings, **objectives(model)[case]}


def quick(model, case):
    """FLUX is asked most of it here, and two others one each."""
    asked = {
        "flux": ("nft, solved", "awm", "diffusion_dpo, drawn levels", "grpo held at its average"),
        "wan": ("awm, drawn levels, stochastic samples",),
        "stable_diffusion": ("nft",),
    }
    return case in asked.get(model.kind, ())


@pytest.mark.parametrize("model,case", cases(objectives, quick))
def test_what_was_stored_is_what_the_weights_that_drew_say(make_trainer, model, case):
    """Bit for bit; and where these are the trained ones nothing has moved before the first update."""
    trainer = make_trainer(**{**settings_of(model, case), "optim__lr": 1e-3})
    drawn, rollout = [], trainer.rollout

    def watched(iteration, prompts, clock):
        made = rollout(iteration, prompts, clock)
        drawn.append({what for what, *_ in made.trajectories})
        return made

    states, update = [trainer.engine.state_dict()], trainer.update

    def followed(*args):
        metrics = update(*args)
        states.append(trainer.engine.state_dict())
        return metrics

    trainer.rollout, trainer.update = watched, followed
    trainer.train()
    lines = trainer.run.log.read()
    assert len(lines) == 2
    if case in ("nft", "nft, solved"):  # once an iteration, half way to what its updates left
        for name, old in states[0].items():
            expected = (old + states[1][name]) / 4 + states[2][name] / 2
            torch.testing.assert_close(trainer.engine.averages["old"].piece(name), expected.flatten(), rtol=0, atol=1e-6)
    for line in lines:
        if "grpo" in case:
            assert line["train/ratio_first_update_max_dev"] == 0.0 and "train/stored_output_max_dev" not in line
        elif "dpo" in case:
            assert 0 <= line["train/preferred"] <= 1
        else:
            assert line["train/stored_output_max_dev"] == 0.0 < line["train/ratio_max_dev"]
        if ("nft" not in case and "dpo" not in case) or "trained weights" in case:
            assert line["train/ratio_first_update_max_dev"] == 0.0
    if case in ("nft", "nft, solved"):  # the old weights are the trained ones in the first iteration, and then follow them
        assert lines[0]["train/ratio_first_update_max_dev"] == 0.0 < lines[1]["train/ratio_first_update_max_dev"]
    if "ema" in trainer.steps.stored:
        assert lines[0]["train/ema_kl"] > 0
    assert drawn == [{"latents", "log_probs"} if "grpo" in case else {"clean"}] * 2


HOW = {
    "a micro-batch of 4": ("awm", {"engine__micro_batch_size": 4}),
    "LoRA": ("nft, trained weights draw", {"model__lora": {"rank": 2}}),
    "guidance, trained without": ("awm", {"sample__cfg_scale": 3.0, "grpo__cfg_scale": 1.0, "sample__eval_cfg_scale": 2.0}),
    "bf16": ("nft, trained weights draw", {"model__precision": "bf16"}),
}


@pytest.mark.parametrize("how", HOW)
def test_nothing_has_moved_before_the_first_update(make_trainer, how):
    case, settings = HOW[how]
    trainer = make_trainer(**{**settings_of(MODELS["flux"], case), "optim__lr": 1e-3, **settings})
    trainer.train()
    for line in trainer.run.log.read():
        assert line["train/stored_output_max_dev"] == 0.0
        assert line["train/ratio_first_update_max_dev"] == 0.0 < line["train/ratio_max_dev"]


def test_what_is_stored_takes_the_memory_that_the_plan_says(make_trainer, monkeypatch):
    """Bytes of all outputs that an iteration keeps, of a process that trains on all samples."""
    trainer, kept = make_trainer(**{**settings_of(MODELS["flux"], "awm"), "run__iterations": 1}), []
    made = base.store_outputs

    def store(*args):
        outputs, deviation = made(*args)
        kept.append(sum(tensor.nbytes for of_batch in outputs.values() for tensor in of_batch.values()))
        return outputs, deviation

    monkeypatch.setattr(base, "store_outputs", store)
    trainer.train()
    found = memory.estimate(trainer.config, trainer.facts, 1, (1000, 1000)).host
    assert kept == [found["stored outputs"]] and found["EMA"] == 4000 and "old weights" not in found
    assert found["weights set aside"] == 4000  # float32, of 1000 that are trained
    assert found["trajectories"] == 16 * trainer.pack(torch.zeros(1, *trainer.latent_shape())).nbytes


def test_drawing_training_and_evaluation_have_guidance_of_their_own(make_trainer, tmp_path):
    model = MODELS["flux"]
    prompt, drawn, outputs = model.prompt(tmp_path), {}, {}
    for name, scales in {
        "none": (1.0, None, None),
        "rollout": (3.0, None, None),
        "each": (3.0, 1.0, 2.0),
        "evaluation": (2.0, None, None),
    }.items():
        scale, training, evaluation = scales
        own = {"sample__cfg_scale": scale, "grpo__cfg_scale": training, "sample__eval_cfg_scale": evaluation}
        trainer = make_trainer(**{**settings_of(model, "awm"), **own, "run__iterations": 1, "run__dir": tmp_path / name})
        keys = model.keys(prompt, 2)
        drawn[name] = trainer.draw(prompt, keys).latents, trainer.draw_fixed(prompt, keys).latents
        seen, passes = [], trainer.predict
        trainer.predict = lambda *args, seen=seen, passes=passes, trainer=trainer: (
            seen.append(trainer.guidance) if torch.is_grad_enabled() else None
        ) or passes(*args)
        trainer.train()
        outputs[name] = set(seen)
        trainer.close()
    assert torch.equal(drawn["each"][0], drawn["rollout"][0]) and torch.equal(drawn["each"][1], drawn["evaluation"][1])
    assert not torch.equal(drawn["each"][0], drawn["none"][0])
    assert outputs == {"none": {1.0}, "rollout": {3.0}, "each": {1.0}, "evaluation": {2.0}}


def test_samples_noise_and_levels_do_not_depend_on_the_micro_batch(make_trainer, tmp_path):
    """Weights after a run of micro-batches of 1 and of 4, to rounding, but for those whose gradient is one."""
    weights = []
    for size in (1, 4):
        settings = settings_of(MODELS["flux"], "awm, drawn levels, stochastic samples")
        folder = tmp_path / str(size)
        trainer = make_trainer(**{**settings, "engine__micro_batch_size": size, "optim__lr": 1e-4, "run__dir": folder})
        trainer.train()
        weights.append(trainer.engine.state_dict())
        trainer.close()
    apart = torch.cat([(one - weights[1][name]).abs().flatten() for name, one in weights[0].items()])
    assert (apart > 2e-5).float().mean() < 1e-4


@pytest.fixture(scope="module")
def alone(tiny_checkpoint, tmp_path_factory):
    """``alone(settings)`` -> folder of a recorded run of one process."""
    return runs.once(tmp_path_factory, tiny_checkpoint, record=True)


PROCESSES = {
    "nft, ZeRO 3": (2, {"engine__zero_stage": 3}),
    "awm, ZeRO 2, 4 processes": (4, {"engine__zero_stage": 2}),
    "diffusion_dpo, drawn levels, ZeRO 2": (2, {"engine__zero_stage": 2}),
    "grpo held at its average, ZeRO 3": (2, {"engine__zero_stage": 3}),
}
SHARED = {
    "nft, ZeRO 2, shared tokens": (2, {"engine__zero_stage": 2, "engine__sequence_parallel": 2}),
    "awm, ZeRO 3, shared tokens, 4 processes": (4, {"engine__zero_stage": 3, "engine__sequence_parallel": 2}),
}


@pytest.mark.parametrize(
    "model,case",
    cases(
        lambda model: {**PROCESSES, **(SHARED if model.shares_tokens else {})},
        lambda model, case: (model.kind, case) == ("flux", "nft, ZeRO 3"),
    ),
)
def test_processes_give_the_samples_and_weights_of_one(alone, tiny_checkpoint, tmp_path, model, case):
    processes, how = {**PROCESSES, **SHARED}[case]
    method = next(name for name in sorted(objectives(model), key=len, reverse=True) if case.startswith(name))
    of_one = {
        **settings_of(model, method),
        "optim__warmup_steps": 4,
        "run__sample_every": 2,
        "run__sample_prompts": 2,
    }
    overrides = runs.settings(tmp_path, tiny_checkpoint(model.kind), **of_one, **how, engine__kind="deepspeed")
    assert runs.run(overrides, processes=processes, record=True) == [0] * processes
    ratio_one = not case.startswith(("nft", "diffusion_dpo"))
    assert_same_to_rounding(tmp_path, alone(of_one), 2, ratio_one=ratio_one)


@pytest.mark.parametrize(
    "model,case",
    cases(
        lambda model: ("nft, a decay that rises", "awm", "diffusion_dpo, drawn levels"),
        lambda model, case: (model.kind, case) == ("flux", "nft, a decay that rises"),
    ),
)
def test_killed_and_resumed_is_bitwise_never_killed(tiny_checkpoint, tmp_path, model, case):
    """Old weights, and how far their decay has risen, are part of what is saved."""
    settings = {**settings_of(model, case), "run__save_every": 1, "run__iterations": 3}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert runs.run(runs.settings(whole, tiny_checkpoint(model.kind), **settings)) == [0]
    overrides = runs.settings(killed, tiny_checkpoint(model.kind), **settings)
    assert runs.run(overrides, kill=runs.Kill("engine.step", 5, after=True)) == [-9]
    assert runs.checkpoints(killed) == ["000001", "000002"]
    assert runs.run(overrides) == [0]
    assert_same_bitwise(killed, whole, 3)
    average, moves = {"nft": ("old", 3), "awm": ("ema", 6)}.get(case[:3], (None, 0))
    assert runs.averages(whole, 3) == ({} if average is None else {average: moves})
