"""Processes that share the tokens of a sample do together what one process does alone (promises 1 and 3)."""

import pytest

from tests.trainer import runs

FLUX = {"sample__height": 48, "sample__width": 48}  # 9 tokens: two processes cannot share them evenly
MODELS = {
    "FLUX": FLUX,
    "FLUX, KL": {**FLUX, "grpo__kl_weight": 0.1},
    "HunyuanVideo, video": runs.HUNYUAN_T2V,
    "HunyuanVideo, image": runs.HUNYUAN_T2I,
    "FLUX, guidance in one pass": {**FLUX, "sample__cfg_scale": 2.0, "model__cfg_batched": True},
    "HunyuanVideo, guidance": {**runs.HUNYUAN_T2V, "sample__cfg_scale": 2.0},
    "SkyReels-I2V, guidance in one pass, KL": {
        **runs.SKYREELS_I2V,
        "sample__cfg_scale": 2.0,
        "model__cfg_batched": True,
        "grpo__kl_weight": 0.1,
        "grpo__updates_per_iteration": 2,
    },
}
SHORT = {
    "sample__steps": 3,
    "grpo__prompts_per_iteration": 2,
    "rewards__models__pixels__kind": "test_position",
    "run__iterations": 1,
    "run__sample_every": 1,
    "run__sample_prompts": 2,
}
DEEPSPEED = {"engine__kind": "deepspeed", "engine__zero_stage": 0}


@pytest.fixture(scope="module")
def alone(request, tmp_path_factory):
    """``alone(model)`` -> folder of a recorded run of one process."""
    folders = {}

    def make(model):
        if model not in folders:
            folder = tmp_path_factory.mktemp("alone")
            checkpoint = request.getfixturevalue("tiny_" + MODELS[model].get("model__kind", "flux"))
            assert runs.run(runs.settings(folder, checkpoint, **MODELS[model], **SHORT), record=True) == [0]
            folders[model] = folder, checkpoint
        return folders[model]

    return make


CASES = [(model, processes) for model in MODELS for processes in (2, 4)]
# Four processes on two cores are slow: two groups of two for one model here, for each in `make test-all`.
SLOW = [
    (model, processes)
    for model, processes in CASES
    if model not in ("FLUX", "HunyuanVideo, video") or processes != {"FLUX": 2, "HunyuanVideo, video": 4}[model]
]


@pytest.mark.parametrize("model,processes", [pytest.param(*c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_shared_tokens_change_nothing(alone, tmp_path, model, processes):
    one, checkpoint = alone(model)
    settings = {**MODELS[model], **SHORT, **DEEPSPEED, "engine__sequence_parallel": 2}
    assert runs.run(runs.settings(tmp_path, checkpoint, **settings), processes=processes, record=True) == [0] * processes

    ours, theirs = runs.drawn(tmp_path, 0), runs.drawn(one, 0)
    assert len(ours[0]) == 8
    assert runs.largest_difference(ours[0], theirs[0]) < 2e-5  # latents of size 1 to 10
    assert runs.largest_difference(ours[1], theirs[1]) < 1e-5  # log-probs
    a, b = runs.metrics(tmp_path)[0], runs.metrics(one)[0]
    assert a["train/ratio_first_update_max_dev"] == 0.0 and a["train/ratio_max_dev"] > 0.0
    assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-2, abs=1e-5)
    assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-4)
    # The first update: before the second, AdamW has divided gradients that are pure rounding by their own size.
    expected = runs.gradients(one, 0)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for rank in range(processes):
        assert runs.largest_difference(runs.gradients(tmp_path, 0, rank), expected) < 1e-5 * scale
    assert "KL" not in model or a["train/kl"] > 0.0
    pictures = runs.pictures(tmp_path, 1).int(), runs.pictures(one, 1).int()
    assert pictures[0].shape == pictures[1].shape and (pictures[0] - pictures[1]).abs().max() <= 1
