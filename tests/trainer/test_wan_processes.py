"""Wan 2.1 in real processes, with guidance: shared tokens and ZeRO equal one process, and kill and resume.

(Promises 3 and 4.)
"""

import pytest

from tests.trainer import runs
from tests.trainer.comparisons import assert_same_bitwise, assert_same_to_rounding

ITERATIONS = 2
SHORT = {
    **runs.WAN_T2V,
    "sample__cfg_scale": 3.0,
    "sample__steps": 3,
    "grpo__timesteps__strategy": "first",
    "grpo__updates_per_iteration": 2,  # so that there are ratios to compare that are not 1
    "run__iterations": ITERATIONS,
    "run__sample_every": 1,
    "run__sample_prompts": 2,
}
DEEPSPEED = {"engine__kind": "deepspeed", "engine__zero_stage": 2}
SHARED = {**DEEPSPEED, "engine__sequence_parallel": 2}
HOW = (*SHARED, "engine__activation_checkpointing")

QUICK = {
    "ZeRO 2, shared tokens, one pass": (
        2,
        {**SHARED, "model__cfg_batched": True, "engine__activation_checkpointing": "every:2"},
    )
}
REST = {
    "ZeRO 2": (2, DEEPSPEED),
    "ZeRO 3, shared tokens": (2, {**SHARED, "engine__zero_stage": 3}),
    "ZeRO 3, shared tokens, LoRA": (2, {**SHARED, "engine__zero_stage": 3, "model__lora__rank": 4, "model__lora__alpha": 8.0}),
}


@pytest.fixture(scope="module")
def alone(tiny_wan, tmp_path_factory):
    """``alone(**settings)`` -> folder of a recorded run of one process; equal ones run once."""
    return runs.of_one_process(tmp_path_factory, tiny_wan, SHORT)


@pytest.mark.parametrize(
    "processes,settings",
    [
        *(pytest.param(*case, id=name) for name, case in QUICK.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in REST.items()),
    ],
)
def test_processes_give_the_samples_and_weights_of_one(alone, tiny_wan, tmp_path, processes, settings):
    overrides = runs.settings(tmp_path, tiny_wan, **{**SHORT, **settings})
    assert runs.run(overrides, processes=processes, record=True) == [0] * processes
    assert_same_to_rounding(tmp_path, alone(**{k: v for k, v in settings.items() if k not in HOW}), ITERATIONS)


# An iteration is 8 draws, 12 backwards an update (4 micro-batches x 3 timesteps) and two optimiser steps.
KILLS = {"in an update": runs.Kill("engine.backward", 30), "in the rollout": runs.Kill("draw", 10)}


@pytest.mark.parametrize("when", ["in an update", pytest.param("in the rollout", marks=pytest.mark.slow)])
def test_killed_and_resumed_processes_are_bitwise_those_never_killed(tiny_wan, tmp_path, when):
    """The texts come from the cache the second time, and the text encoder stays on disk."""
    folders = {name: tmp_path / name for name in ("never killed", "killed")}
    changed = {"optim__ema_decay": 0.9, "run__sample_every": 0, **SHARED}
    overrides = {
        name: runs.settings(folder, tiny_wan, **{**SHORT, **changed, "prompts__embeddings": folder / "embeddings"})
        for name, folder in folders.items()
    }
    assert runs.run(overrides["never killed"], processes=2) == [0, 0]
    # Both processes share each sample: each makes all the calls.
    assert runs.run(overrides["killed"], processes=2, kill=KILLS[when]) == [-9, -9]
    assert runs.checkpoints(folders["killed"]) == ["000001"]
    assert runs.run(overrides["killed"], processes=2) == [0, 0]
    assert "after iteration 1" in runs.output(folders["killed"])
    assert_same_bitwise(folders["killed"], folders["never killed"], ITERATIONS)
