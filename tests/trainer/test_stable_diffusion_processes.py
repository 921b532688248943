"""Stable Diffusion in real processes, with guidance: ZeRO equals one process (promise 3), kill and resume (promise 4)."""

import pytest

from tests.trainer import runs
from tests.trainer.comparisons import assert_same_bitwise, assert_same_to_rounding

ITERATIONS = 2
SHORT = {
    **runs.STABLE_DIFFUSION,
    "sample__cfg_scale": 3.0,
    "sample__steps": 3,
    "grpo__timesteps__strategy": "first",
    "grpo__updates_per_iteration": 2,  # so that there are ratios to compare that are not 1
    "run__iterations": ITERATIONS,
    "run__sample_every": 1,
    "run__sample_prompts": 2,
}
DEEPSPEED = {"engine__kind": "deepspeed", "engine__zero_stage": 2}
ZERO_3 = {**DEEPSPEED, "engine__zero_stage": 3}
LORA = {"model__lora__rank": 4, "model__lora__alpha": 8.0}
HOW = (*DEEPSPEED, "engine__activation_checkpointing")
# Pairs of samples that another process drew, and a second copy of the weights (without guidance, which multiplies by 3 in the
# samples what the pairs leave of rounding in the weights); what is remembered of each prompt; a way back through decoder and
# reward.
DPO = {"grpo__objective": "dpo", "sample__cfg_scale": 1.0}
DDPO = {"grpo__objective": "ddpo", "grpo__history__minimum": 6, "grpo__history__size": 9}
REFL = {
    "grpo__objective": "refl",
    "grpo__timesteps__strategy": "late",
    "rewards__models__pixels__kind": "test_smooth_brightness",
}

QUICK = {
    "ZeRO 3, checkpointed": (2, {**ZERO_3, "engine__activation_checkpointing": "every:2"}),
    "ZeRO 2, DPO": (2, {**DEEPSPEED, **DPO}),
}
REST = {
    "ZeRO 0": (2, {**DEEPSPEED, "engine__zero_stage": 0}),
    "ZeRO 2": (2, DEEPSPEED),
    "ZeRO 2, one pass": (2, {**DEEPSPEED, "model__cfg_batched": True}),
    "ZeRO 2, LoRA": (2, {**DEEPSPEED, **LORA}),
    "ZeRO 3, LoRA": (2, {**ZERO_3, **LORA}),
    "ZeRO 3, KL": (2, {**ZERO_3, "grpo__kl_weight": 0.1}),
    "ZeRO 3, DPO": (2, {**ZERO_3, **DPO}),
    "ZeRO 2, DDPO": (2, {**DEEPSPEED, **DDPO}),
    "ZeRO 2, ReFL": (2, {**DEEPSPEED, **REFL}),
    "ZeRO 3, 4 processes": (4, ZERO_3),
}


@pytest.fixture(scope="module")
def alone(tiny_stable_diffusion, tmp_path_factory):
    """``alone(**settings)`` -> folder of a recorded run of one process; equal ones run once."""
    return runs.of_one_process(tmp_path_factory, tiny_stable_diffusion, SHORT)


@pytest.mark.parametrize(
    "processes,settings",
    [
        *(pytest.param(*case, id=name) for name, case in QUICK.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in REST.items()),
    ],
)
def test_processes_give_the_samples_and_weights_of_one(alone, tiny_stable_diffusion, tmp_path, processes, settings):
    overrides = runs.settings(tmp_path, tiny_stable_diffusion, **{**SHORT, **settings})
    assert runs.run(overrides, processes=processes, record=True) == [0] * processes
    assert_same_to_rounding(tmp_path, alone(**{k: v for k, v in settings.items() if k not in HOW}), ITERATIONS)


KILLS = {"in an update": runs.Kill("engine.backward", 11), "in the rollout": runs.Kill("draw", 6)}


@pytest.mark.parametrize("when", ["in an update", pytest.param("in the rollout", marks=pytest.mark.slow)])
def test_killed_and_resumed_processes_are_bitwise_those_never_killed(tiny_stable_diffusion, tmp_path, when):
    settings = {**SHORT, **DEEPSPEED, "optim__ema_decay": 0.9, "run__sample_every": 0}
    folders = {name: tmp_path / name for name in ("never killed", "killed")}
    overrides = {name: runs.settings(folder, tiny_stable_diffusion, **settings) for name, folder in folders.items()}
    assert runs.run(overrides["never killed"], processes=2) == [0, 0]
    assert runs.run(overrides["killed"], processes=2, kill=KILLS[when]) == [-9, -9]
    assert runs.checkpoints(folders["killed"]) == ["000001"]
    assert runs.run(overrides["killed"], processes=2) == [0, 0]
    assert "after iteration 1" in runs.output(folders["killed"])
    assert_same_bitwise(folders["killed"], folders["never killed"], ITERATIONS)
