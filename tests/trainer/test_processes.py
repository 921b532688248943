"""Runs in real processes: two equal one (promise 3), kill and resume (promise 4), damaged checkpoints (promise 6)."""

import shutil
from dataclasses import dataclass, replace

import pytest

from tests.trainer import runs
from tests.trainer.comparisons import assert_same_bitwise, assert_same_to_rounding

DEEPSPEED = {"engine__kind": "deepspeed"}
LORA = {"model__lora__rank": 4, "model__lora__alpha": 8.0}


@pytest.fixture(scope="module")
def finished(tiny_flux, tmp_path_factory):
    """``finished(**settings)`` -> folder of a recorded run on one process that was never killed; equal ones run once.

    Three iterations at lr 1e-5 with a continuous reward, and pictures of fixed noise before and after each.
    """
    folders = {}

    def make(**settings):
        key = repr(sorted(settings.items()))
        if key not in folders:
            folder = tmp_path_factory.mktemp("one")
            assert runs.run(runs.settings(folder, tiny_flux, run__sample_every=1, **settings), record=True) == [0]
            folders[key] = folder
        return folders[key]

    return make


# One stage at one micro-batch size here (test_hunyuan_processes.py has the others), the matrix in `make test-all`.
QUICK = {"ZeRO 2": (2, {})}
REST = {
    "ZeRO 0": (0, {}),
    "ZeRO 1": (1, {}),
    "ZeRO 3": (3, {}),
    "ZeRO 2, 4 samples": (2, {"engine__micro_batch_size": 4}),
    **{f"ZeRO {stage}, 1 sample": (stage, {"engine__micro_batch_size": 1}) for stage in (0, 1, 2, 3)},
    **{f"ZeRO {stage}, 4 samples": (stage, {"engine__micro_batch_size": 4}) for stage in (0, 1, 3)},
    **{f"LoRA, ZeRO {stage}": (stage, LORA) for stage in (0, 2, 3)},
    **{f"KL, ZeRO {stage}": (stage, {"grpo__kl_weight": 0.1}) for stage in (0, 2, 3)},
}


@pytest.mark.parametrize(
    "stage,settings",
    [
        *(pytest.param(*case, id=name) for name, case in QUICK.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in REST.items()),
    ],
)
def test_two_processes_give_the_samples_and_weights_of_one(finished, tiny_flux, tmp_path, stage, settings):
    overrides = runs.settings(tmp_path, tiny_flux, **DEEPSPEED, **settings, engine__zero_stage=stage, run__sample_every=1)
    assert runs.run(overrides, processes=2, record=True) == [0, 0]
    assert_same_to_rounding(tmp_path, finished(**settings))
    if "grpo__kl_weight" in settings:
        assert runs.metrics(tmp_path)[-1]["train/kl"] > 0


def test_best_of_n_moves_samples_between_processes(tiny_flux, tmp_path):
    """One prompt an update: its samples are drawn on both ranks, and each rank trains on the best or the worst."""
    weights = {}
    for processes in (1, 2):
        overrides = runs.settings(
            tmp_path / str(processes),
            tiny_flux,
            **(DEEPSPEED if processes == 2 else {}),
            grpo__group_size=8,
            grpo__best_of__top=2,
            grpo__best_of__bottom=2,
            grpo__prompts_per_iteration=2,
        )
        assert runs.run(overrides, processes=processes) == [0] * processes
        weights[processes] = runs.weights(tmp_path / str(processes), 3)
    assert runs.largest_difference(weights[1], weights[2]) < 1e-6


WRITE = "fastvideo_grpo.engines.base.write_tensors"


@dataclass
class Stop:
    """A kill, and what it must leave: (draws, backwards, steps) finished, metrics lines, checkpoint folders.

    An iteration is 8 draws (4 prompts x 4 samples, 2 at a time), 24 backwards (8 x 3 timesteps) and 2 optimiser steps.
    """

    kill: runs.Kill
    finished: tuple[int, int, int]
    lines: int = 1
    checkpoints: tuple[str, ...] = ("000001",)


KILLS = {
    "in the rollout of the second iteration": Stop(runs.Kill("draw", 11), (11, 24, 2)),
    "in an update of the second iteration": Stop(runs.Kill("engine.backward", 30), (16, 30, 2)),
    "between the two updates of the second iteration": Stop(runs.Kill("engine.step", 2, after=True), (16, 36, 3)),
    # A checkpoint with EMA is three files: the first of the second one is written.
    "while saving the second checkpoint": Stop(runs.Kill(WRITE, 3, after=True), (16, 48, 4), 2, (".saving-000002", "000001")),
}
BETWEEN = "between the two updates of the second iteration"
RESUMED = {"optim__ema_decay": 0.9, "optim__warmup_steps": 4, "optim__lr": 1e-3, "run__keep": 1}
FLAVOURS = {"full": {}, "lora": LORA, "kl": {"grpo__kl_weight": 0.1}}


@pytest.fixture(scope="module")
def never_killed(tiny_flux, tmp_path_factory):
    """``never_killed(flavour)`` -> folder of a run with EMA and warm-up."""
    folders = {}

    def make(flavour):
        if flavour not in folders:
            folders[flavour] = tmp_path_factory.mktemp(f"never-killed-{flavour}")
            assert runs.run(runs.settings(folders[flavour], tiny_flux, **RESUMED, **FLAVOURS[flavour])) == [0]
        return folders[flavour]

    return make


# LoRA and KL share all of it but the weights' names and the reference: two kills here (one more on two processes, and in
# test_skyreels_processes.py in an update), the rest in `make test-all`.
QUICK_KILLS = ("in the rollout of the second iteration", "while saving the second checkpoint")


@pytest.mark.parametrize(
    "flavour,when",
    [
        *(pytest.param("full", when, marks=[pytest.mark.slow] if when not in QUICK_KILLS else []) for when in KILLS),
        *(pytest.param(flavour, when, marks=pytest.mark.slow) for flavour in ("lora", "kl") for when in KILLS),
    ],
)
def test_a_killed_and_resumed_run_is_bitwise_the_one_never_killed(never_killed, tiny_flux, tmp_path, flavour, when):
    overrides, stop = runs.settings(tmp_path, tiny_flux, **RESUMED, **FLAVOURS[flavour]), KILLS[when]
    assert runs.run(overrides, kill=stop.kill) == [-9]
    assert runs.killed(tmp_path) == stop.finished
    assert len(runs.metrics(tmp_path)) == stop.lines
    assert runs.checkpoints(tmp_path) == list(stop.checkpoints)
    if ".saving-000002" in stop.checkpoints:
        left = (tmp_path / "run" / "checkpoints" / ".saving-000002").rglob("*")
        assert [path.name for path in left if path.is_file()] == ["weights-00000.safetensors"]
    assert runs.run(overrides) == [0]
    assert "after iteration 1" in runs.output(tmp_path)
    assert runs.checkpoints(tmp_path) == ["000003"]
    assert_same_bitwise(tmp_path, never_killed(flavour))


def test_two_killed_processes_resume_bitwise_and_on_one_process_to_rounding(tiny_flux, tmp_path):
    settings = {**DEEPSPEED, "engine__zero_stage": 2, "optim__ema_decay": 0.9}
    whole, killed, moved = (tmp_path / name for name in ("whole", "killed", "moved"))
    assert runs.run(runs.settings(whole, tiny_flux, **settings), processes=2) == [0, 0]
    assert runs.run(runs.settings(killed, tiny_flux, **settings), processes=2, kill=KILLS[BETWEEN].kill) == [-9, -9]
    # Each process has half of the draws and backwards, and all of the steps.
    assert runs.killed(killed, 0) == runs.killed(killed, 1) == (8, 18, 3)
    assert runs.checkpoints(killed) == ["000001"] and len(runs.metrics(killed)) == 1
    shutil.copytree(killed / "run", moved / "run")
    assert runs.run(runs.settings(killed, tiny_flux, **settings), processes=2) == [0, 0]
    assert_same_bitwise(killed, whole)
    assert runs.run(runs.settings(moved, tiny_flux, optim__ema_decay=0.9)) == [0]
    for which in ("model", "ema"):
        assert runs.largest_difference(runs.weights(moved, 3, which), runs.weights(whole, 3, which)) < 1e-6


# What the FLUX recipes turn on, all at once.
RECIPE = {
    **DEEPSPEED,
    **LORA,
    "engine__zero_stage": 2,
    "engine__activation_checkpointing": "full",
    "model__precision": "bf16",
    "optim__ema_decay": 0.9,
    "optim__lr": 1e-3,
    "run__iterations": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("when", KILLS)
def test_two_processes_with_a_recipes_settings_have_ratio_one_and_resume_bitwise(tiny_flux, tmp_path, when):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert runs.run(runs.settings(whole, tiny_flux, **RECIPE), processes=2) == [0, 0]
    kill = KILLS[when].kill
    if kill.target in ("draw", "engine.backward"):
        kill = replace(kill, call=kill.call // 2)  # dealt to two processes
    assert runs.run(runs.settings(killed, tiny_flux, **RECIPE), processes=2, kill=kill) == [-9, -9]
    assert runs.checkpoints(killed) == list(KILLS[when].checkpoints)
    assert runs.run(runs.settings(killed, tiny_flux, **RECIPE), processes=2) == [0, 0]
    assert_same_bitwise(killed, whole, iterations=2)
    for line in runs.metrics(whole):
        assert line["train/ratio_first_update_max_dev"] <= 1e-6 < line["train/ratio_max_dev"]
        assert line["train/updates"] == 2 and line["train/skipped_updates"] == 0
    start = {name: w for name, w in runs.weights(whole, 1).items() if "lora_B" in name}
    assert start and all(w.abs().max() > 0 for w in start.values())


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, tiny_flux, tmp_path):
    overrides = runs.settings(tmp_path, tiny_flux)
    assert runs.run([*overrides, "run.iterations=2"]) == [0]
    (damaged,) = (tmp_path / "run" / "checkpoints" / "000002" / "state").glob("weights-*.safetensors")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert runs.run(overrides) == [0]
    output = runs.output(tmp_path)
    assert "000002 is damaged" in output and damaged.name in output
    assert "after iteration 1" in output
    assert runs.same_bits(runs.weights(tmp_path, 3), runs.weights(finished(), 3))


def test_resuming_with_other_settings_or_prompts_is_refused(tiny_flux, tmp_path):
    overrides = runs.settings(tmp_path, tiny_flux)
    assert runs.run([*overrides, "run.iterations=1"]) == [0]
    assert runs.run([*overrides, "optim.lr=1e-3", "grpo.group_size=8"]) == [1]
    assert "other values of grpo.group_size, optim.lr" in runs.output(tmp_path)
    (tmp_path / "prompts.txt").write_text("another prompt\n")
    assert runs.run(overrides) == [1]
    assert "other prompts" in runs.output(tmp_path)
