"""Objectives in two processes equal one: pairs of samples that another process drew, what is remembered of each prompt, a way
back through decoder and reward."""

import pytest

from tests.trainer import runs
from tests.trainer.comparisons import assert_same_to_rounding

ITERATIONS = 2
SHORT = {
    **runs.STABLE_DIFFUSION,
    "sample__cfg_scale": 3.0,
    "sample__steps": 3,
    "grpo__timesteps__strategy": "first",
    "grpo__updates_per_iteration": 2,
    "run__iterations": ITERATIONS,
    "run__sample_every": ITERATIONS,  # and before the first
    "run__sample_prompts": 2,
}
OBJECTIVES = {
    # Without guidance, which multiplies by 3 in the samples what the pairs leave of rounding in the weights.
    "DPO": {"grpo__objective": "dpo", "sample__cfg_scale": 1.0},
    "DDPO": {"grpo__objective": "ddpo", "grpo__history__minimum": 6, "grpo__history__size": 9},
    "ReFL": {
        "grpo__objective": "refl",
        "grpo__timesteps__strategy": "late",
        "rewards__models__pixels__kind": "test_smooth_brightness",
    },
}
CASES = [("DPO", 2), ("DPO", 3), ("DDPO", 2), ("ReFL", 2)]


@pytest.fixture(scope="module")
def alone(tiny_checkpoint, tmp_path_factory):
    """``alone(settings)`` -> folder of a recorded run of one process."""
    return runs.once(tmp_path_factory, tiny_checkpoint, record=True)


@pytest.mark.parametrize(
    "name,stage", [case if case == CASES[0] else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_two_processes_give_the_samples_and_weights_of_one(alone, tiny_stable_diffusion, tmp_path, name, stage):
    deepspeed = {"engine__kind": "deepspeed", "engine__zero_stage": stage}
    overrides = runs.settings(tmp_path, tiny_stable_diffusion, **{**SHORT, **OBJECTIVES[name], **deepspeed})
    assert runs.run(overrides, processes=2, record=True) == [0, 0]
    assert_same_to_rounding(tmp_path, alone({**SHORT, **OBJECTIVES[name]}), ITERATIONS)
