"""HunyuanVideo in real processes: every ZeRO stage, with and without shared tokens, equals one process (promise 3); kill and
resume (promise 4)."""

from dataclasses import replace

import pytest

from tests.trainer import runs
from tests.trainer.comparisons import assert_same_bitwise, assert_same_to_rounding

ITERATIONS = 2
SHORT = {
    **runs.HUNYUAN_T2V,
    "sample__steps": 3,
    "grpo__timesteps__strategy": "first",
    "run__iterations": ITERATIONS,
    "run__sample_every": 1,
    "run__sample_prompts": 2,
}
OFFLOAD = {"engine__offload": "optimizer"}
OFFLOAD_ALL = {"engine__offload": "parameters"}
SHARED = {"engine__sequence_parallel": 2}
ASYNC = {"rewards__async": "true"}
CHECKPOINTED = {"engine__activation_checkpointing": "every:2", "engine__offload_idle": True}


def _case(processes, stage, *settings):
    together = {"engine__kind": "deepspeed", "engine__zero_stage": stage}
    for part in settings:
        together.update(part)
    return processes, together


# One stage, with what may go along with it; every combination in `make test-all` (ZeRO 3 here: FLUX and Stable Diffusion).
QUICK = {
    "ZeRO 2, shared tokens, checkpointing, asynchronous rewards": _case(2, 2, SHARED, CHECKPOINTED, ASYNC),
}
REST = {
    # Seen on an AMD EPYC: 13 weights, whose gradient is nothing but rounding (1e-6 of the largest), differ by up to
    # 6e-6, since AdamW divides a gradient by its own size.
    "ZeRO 3, parameters offloaded, shared tokens, 4 processes": _case(4, 3, OFFLOAD_ALL, SHARED),
    **{f"ZeRO {stage}, {n} processes": _case(n, stage) for stage in (0, 1, 2, 3) for n in (2, 4)},
    **{f"ZeRO {stage}, shared tokens, {n} processes": _case(n, stage, SHARED) for stage in (1, 2, 3) for n in (2, 4)},
    **{f"ZeRO {stage}, optimiser offloaded": _case(2, stage, OFFLOAD) for stage in (1, 2, 3)},
    "ZeRO 3, parameters offloaded": _case(2, 3, OFFLOAD_ALL),
    "ZeRO 3, full checkpointing": _case(2, 3, {"engine__activation_checkpointing": "full"}),
    "ZeRO 3, tokens shared by 4": _case(4, 3, {"engine__sequence_parallel": 4}),
    "LoRA, ZeRO 3, shared tokens": _case(2, 3, SHARED, {"model__lora__rank": 4, "model__lora__alpha": 8.0}),
    "KL, ZeRO 3, shared tokens": _case(2, 3, SHARED, {"grpo__kl_weight": 0.1}),
    "images, ZeRO 2, shared tokens": _case(2, 2, SHARED, {"sample__frames": 1}),
}
# What is particular to how it runs, not to what it computes.
HOW = ("engine__kind", "engine__zero_stage", *OFFLOAD, *SHARED, *CHECKPOINTED, *ASYNC)


@pytest.fixture(scope="module")
def alone(tiny_hunyuan_video, tmp_path_factory):
    """``alone(**settings)`` -> folder of a recorded run of one process; equal ones run once."""
    return runs.of_one_process(tmp_path_factory, tiny_hunyuan_video, SHORT)


@pytest.mark.parametrize(
    "processes,settings",
    [
        *(pytest.param(*case, id=name) for name, case in QUICK.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in REST.items()),
    ],
)
def test_processes_give_the_samples_and_weights_of_one(alone, tiny_hunyuan_video, tmp_path, processes, settings):
    overrides = runs.settings(tmp_path, tiny_hunyuan_video, **{**SHORT, **settings})
    assert runs.run(overrides, processes=processes, record=True) == [0] * processes
    assert_same_to_rounding(tmp_path, alone(**{k: v for k, v in settings.items() if k not in HOW}), ITERATIONS)
    if "grpo__kl_weight" in settings:
        assert runs.metrics(tmp_path)[-1]["train/kl"] > 0


def test_a_reward_that_hangs_on_one_rank_stops_all_with_what_was_trained_saved(tiny_hunyuan_video, tmp_path):
    """Promise 5, with ranks that wait for the one that scores; and only that one has the rewards in memory."""
    # 8 micro-batches in an iteration; the third one of the second iteration is never answered.
    hanging = {
        "rewards__models__pixels__kind": "test_hangs",
        "rewards__models__pixels__params": f"{{answers: 10, folder: {tmp_path}}}",
        "rewards__timeout_s": 1.0,
        "rewards__retries": 1,
        "rewards__max_invalid_fraction": 0.25,
        "run__sample_every": 0,
    }
    overrides = runs.settings(tmp_path, tiny_hunyuan_video, **{**SHORT, **_case(2, 2, SHARED)[1], **hanging})
    assert runs.run(overrides, processes=2) == [1, 1]
    assert [file.name for file in sorted(tmp_path.glob("made-*"))] == ["made-0"]
    text = runs.output(tmp_path)
    assert "12 of 16 samples of this iteration could not be scored" in text and "no answer within 1 s" in text
    assert runs.checkpoints(tmp_path) == ["000001"]


# An iteration is 8 draws, 16 backwards (8 x 2 timesteps) and 2 optimiser steps, over the data-parallel processes.
KILLS = {
    "in the rollout": runs.Kill("draw", 10),
    "in an update": runs.Kill("engine.backward", 20),
    "between updates": runs.Kill("engine.step", 2, after=True),
    "in a save": runs.Kill("fastvideo_grpo.engines.base.write_tensors", 3, after=True),
}
RESUMED = {**SHORT, "run__sample_every": 0, "optim__ema_decay": 0.9, "optim__lr": 1e-3}
WAYS = {
    "ZeRO 1": _case(2, 1),
    "ZeRO 2": _case(2, 2),
    "ZeRO 3": _case(2, 3),
    "ZeRO 2, shared tokens": _case(2, 2, SHARED),
    "ZeRO 3, shared tokens": _case(2, 3, SHARED),
    "ZeRO 3, shared tokens, 4 processes": _case(4, 3, SHARED),
}


@pytest.fixture(scope="module")
def never_killed(tiny_hunyuan_video, tmp_path_factory):
    """``never_killed(way)`` -> folder of a run with EMA that was never killed."""
    folders = {}

    def make(way):
        if way not in folders:
            folders[way] = tmp_path_factory.mktemp("never-killed")
            processes, settings = WAYS[way]
            overrides = runs.settings(folders[way], tiny_hunyuan_video, **RESUMED, **settings)
            assert runs.run(overrides, processes=processes) == [0] * processes
        return folders[way]

    return make


@pytest.mark.slow  # one of its kind is in test_skyreels_processes.py
@pytest.mark.parametrize("way,when", [(w, k) for w in WAYS for k in KILLS])
def test_killed_and_resumed_processes_are_bitwise_those_never_killed(never_killed, tiny_hunyuan_video, tmp_path, way, when):
    processes, settings = WAYS[way]
    overrides, kill = runs.settings(tmp_path, tiny_hunyuan_video, **RESUMED, **settings), KILLS[when]
    if kill.target in ("draw", "engine.backward"):
        kill = replace(kill, call=kill.call * settings.get("engine__sequence_parallel", 1) // processes)
    assert runs.run(overrides, processes=processes, kill=kill) == [-9] * processes
    assert runs.checkpoints(tmp_path) == ([".saving-000002"] if when == "in a save" else []) + ["000001"]
    assert runs.run(overrides, processes=processes) == [0] * processes
    assert "after iteration 1" in runs.output(tmp_path)
    assert_same_bitwise(tmp_path, never_killed(way), ITERATIONS)
