"""SkyReels-I2V in real processes, with guidance: shared tokens and ZeRO equal one process (promise 3), kill and resume
(promise 4)."""

from pathlib import Path

import pytest

from fastvideo_grpo import config as configuration
from tests.trainer import runs
from tests.trainer.comparisons import assert_same_bitwise, assert_same_to_rounding

ITERATIONS = 2
SHORT = {
    **runs.SKYREELS_I2V,
    "sample__cfg_scale": 3.0,  # at 5 the latents of these random weights reach 16, whose last digits are the bar of 1e-5
    "sample__steps": 3,
    "grpo__timesteps__strategy": "first",
    "grpo__updates_per_iteration": 2,  # so that there are ratios to compare that are not 1
    "run__iterations": ITERATIONS,
    "run__sample_every": 1,
    "run__sample_prompts": 2,
}
DEEPSPEED = {"engine__kind": "deepspeed", "engine__zero_stage": 2}
SHARED = {**DEEPSPEED, "engine__sequence_parallel": 2}
ONE_PASS = {"model__cfg_batched": True}
HOW = (*SHARED, "engine__activation_checkpointing")

QUICK = {"ZeRO 2, shared tokens, one pass": (2, {**SHARED, **ONE_PASS, "engine__activation_checkpointing": "every:2"})}
REST = {
    "ZeRO 2": (2, DEEPSPEED),
    "ZeRO 2, shared tokens": (2, SHARED),
    "ZeRO 1, shared tokens, one pass": (2, {**SHARED, **ONE_PASS, "engine__zero_stage": 1}),
    "ZeRO 3": (2, {**DEEPSPEED, "engine__zero_stage": 3}),
    "ZeRO 3, shared tokens": (4, {**SHARED, "engine__zero_stage": 3}),
    "ZeRO 3, shared tokens, one pass": (4, {**SHARED, **ONE_PASS, "engine__zero_stage": 3}),
    "ZeRO 3, shared tokens, LoRA": (2, {**SHARED, "engine__zero_stage": 3, "model__lora__rank": 4, "model__lora__alpha": 8.0}),
}


@pytest.fixture(scope="module")
def alone(tiny_skyreels_i2v, tmp_path_factory):
    """``alone(**settings)`` -> folder of a recorded run of one process; equal ones run once."""
    return runs.of_one_process(tmp_path_factory, tiny_skyreels_i2v, SHORT)


@pytest.mark.parametrize(
    "processes,settings",
    [
        *(pytest.param(*case, id=name) for name, case in QUICK.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in REST.items()),
    ],
)
def test_processes_give_the_samples_and_weights_of_one(alone, tiny_skyreels_i2v, tmp_path, processes, settings):
    overrides = runs.settings(tmp_path, tiny_skyreels_i2v, **{**SHORT, **settings})
    assert runs.run(overrides, processes=processes, record=True) == [0] * processes
    assert_same_to_rounding(tmp_path, alone(**{k: v for k, v in settings.items() if k not in HOW}), ITERATIONS)


# An iteration is 4 draws, 12 backwards (4 x 3 timesteps) and one optimiser step.
KILLS = {"in an update": runs.Kill("engine.backward", 15), "in the rollout": runs.Kill("draw", 6)}
CONFIGS = Path(__file__).parents[2] / "train_scripts" / "configs"


def _tiny(folder, checkpoint, **settings):
    """Overrides that are the tiny configuration, on SP 2 and ZeRO-2, for two iterations, half as long each."""
    folder.mkdir()
    config = configuration.load(CONFIGS / "skyreels_i2v_tiny.yaml")
    values = {
        **configuration._flat(configuration.to_dict(config)),
        **{key.replace("__", "."): value for key, value in {**SHARED, **settings}.items()},
        "prompts.path": CONFIGS.parents[1] / config.prompts.path,
        "optim.ema_decay": 0.9,
        "run.dir": folder / "run",
        "run.iterations": ITERATIONS,
        "run.save_every": 1,
        "grpo.prompts_per_iteration": 2,
        "sample.steps": 4,
        "run.eval_every": 0,
        "run.sample_every": 0,
    }
    del values["model.path"]
    return [f"model.path={checkpoint}", *(f"{key}={'null' if value is None else value}" for key, value in values.items())]


WITH_CACHE = [("in an update", True), pytest.param("in the rollout", False, marks=pytest.mark.slow)]


@pytest.mark.parametrize("when,cached", WITH_CACHE)
def test_killed_and_resumed_processes_are_bitwise_those_never_killed(tiny_skyreels_i2v, tmp_path, when, cached):
    """The tiny configuration from end to end; images, texts and negative prompts come from the cache the second time, and the
    text encoders stay on disk."""
    folders = {name: tmp_path / name for name in ("never killed", "killed")}
    overrides = {}
    for name, folder in folders.items():
        cache = {"prompts__embeddings": folder / "embeddings"} if cached else {}
        overrides[name] = _tiny(folder, tiny_skyreels_i2v, **cache)
    assert runs.run(overrides["never killed"], processes=2) == [0, 0]
    # Both processes share each sample: each makes all the calls.
    assert runs.run(overrides["killed"], processes=2, kill=KILLS[when]) == [-9, -9]
    assert runs.checkpoints(folders["killed"]) == ["000001"]
    assert runs.run(overrides["killed"], processes=2) == [0, 0]
    assert "after iteration 1" in runs.output(folders["killed"])
    assert_same_bitwise(folders["killed"], folders["never killed"], ITERATIONS)


def test_resuming_with_another_image_is_refused(tiny_skyreels_i2v, tmp_path):
    overrides = runs.settings(tmp_path, tiny_skyreels_i2v, **{**SHORT, "run__iterations": 1, "run__sample_every": 0})
    assert runs.run(overrides) == [0]
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    assert runs.run([*overrides, "run.iterations=2"]) == [1]
    assert "1 images are others than when" in runs.output(tmp_path) and f"first {tmp_path}/0.png" in runs.output(tmp_path)
    (tmp_path / "0.png").write_bytes(b"")
    assert runs.run([*overrides, "run.iterations=2"]) == [1]
    assert "1 of 5 images cannot be used" in runs.output(tmp_path)
