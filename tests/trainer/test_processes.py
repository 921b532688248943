"""Runs in real processes: two equal one (promise 3), kill and resume (promise 4), damaged checkpoints (promise 6)."""

import pytest

from tests.trainer import runs

DEEPSPEED = {"engine__kind": "deepspeed"}


@pytest.fixture(scope="module")
def one_process(tiny_flux, tmp_path_factory):
    """The run that was never killed, on one process: three iterations at lr 1e-5 with a continuous reward."""
    folder = tmp_path_factory.mktemp("one")
    assert runs.run(runs.settings(folder, tiny_flux)) == [0]
    return folder


STAGES = [0, 2, pytest.param(1, marks=pytest.mark.slow), 3]


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_give_the_weights_of_one(one_process, tiny_flux, tmp_path, stage):
    overrides = runs.settings(tmp_path, tiny_flux, **DEEPSPEED, engine__zero_stage=stage)
    assert runs.run(overrides, processes=2) == [0, 0]
    assert runs.largest_difference(runs.weights(tmp_path, 3), runs.weights(one_process, 3)) < 1e-6
    for two, one in zip(runs.metrics(tmp_path), runs.metrics(one_process), strict=True):
        assert two["train/ratio_first_update_max_dev"] == 0.0
        assert two["reward/pixels/brightness/mean"] == pytest.approx(one["reward/pixels/brightness/mean"], abs=1e-3)
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-2, abs=1e-5)


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


KILLS = {
    "in the rollout of the second iteration": runs.Kill("accumulate", 2),
    "in an update of the second iteration": runs.Kill("backward", 60),
    "between two updates of an iteration": runs.Kill("step", 3),
    "while saving the second checkpoint": runs.Kill("save", 1),
}
RESUMED = {"optim__ema_decay": 0.9, "optim__warmup_steps": 4, "optim__lr": 1e-3, "run__keep": 1}


@pytest.fixture(scope="module", params=["full", "lora"])
def never_killed(request, tiny_flux, tmp_path_factory):
    """(overrides, folder) of a run with EMA and warm-up that was never killed."""
    extra = {"model__lora__rank": 4} if request.param == "lora" else {}
    folder = tmp_path_factory.mktemp(f"never-killed-{request.param}")
    assert runs.run(runs.settings(folder, tiny_flux, **RESUMED, **extra)) == [0]
    return extra, folder


# LoRA shares all of it but the names of the weights: one kill here, the others in `make test-all`.
@pytest.mark.parametrize("when", KILLS)
def test_a_killed_and_resumed_run_is_bitwise_the_one_never_killed(never_killed, tiny_flux, tmp_path, when):
    extra, reference = never_killed
    overrides = runs.settings(tmp_path, tiny_flux, **RESUMED, **extra)
    assert runs.run(overrides, kill=KILLS[when]) == [-9]
    assert runs.run(overrides) == [0]
    for which in ("model", "ema"):
        assert runs.same_bits(runs.weights(tmp_path, 3, which), runs.weights(reference, 3, which))
    assert runs.metrics(tmp_path) == runs.metrics(reference)


def test_two_killed_processes_resume_bitwise_and_on_one_process_to_rounding(tiny_flux, tmp_path):
    settings = {**DEEPSPEED, "engine__zero_stage": 2, "optim__ema_decay": 0.9}
    assert runs.run(runs.settings(tmp_path / "whole", tiny_flux, **settings), processes=2) == [0, 0]
    killed = runs.settings(tmp_path / "killed", tiny_flux, **settings)
    assert runs.run(killed, processes=2, kill=runs.Kill("step", 3)) == [-9, -9]
    assert runs.run(killed, processes=2) == [0, 0]
    for which in ("model", "ema"):
        assert runs.same_bits(runs.weights(tmp_path / "killed", 3, which), runs.weights(tmp_path / "whole", 3, which))
    assert runs.metrics(tmp_path / "killed") == runs.metrics(tmp_path / "whole")
    moved = runs.settings(tmp_path / "moved", tiny_flux, **settings)
    assert runs.run(moved, processes=2, kill=runs.Kill("step", 3)) == [-9, -9]
    assert runs.run(runs.settings(tmp_path / "moved", tiny_flux, optim__ema_decay=0.9)) == [0]
    assert runs.largest_difference(runs.weights(tmp_path / "moved", 3), runs.weights(tmp_path / "whole", 3)) < 1e-6


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(one_process, tiny_flux, tmp_path):
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
    assert runs.same_bits(runs.weights(tmp_path, 3), runs.weights(one_process, 3))


def test_resuming_with_other_settings_or_prompts_is_refused(one_process, tiny_flux, tmp_path):
    overrides = runs.settings(tmp_path, tiny_flux)
    assert runs.run([*overrides, "run.iterations=1"]) == [0]
    assert runs.run([*overrides, "optim.lr=1e-3", "grpo.group_size=8"]) == [1]
    assert "other values of grpo.group_size, optim.lr" in runs.output(tmp_path)
    (tmp_path / "prompts.txt").write_text("another prompt\n" * 1)
    assert runs.run(overrides) == [1]
    assert "other prompts" in runs.output(tmp_path)
