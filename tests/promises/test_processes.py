"""Promise 3 in real processes: whatever they share, they draw the samples and train the weights of one, to rounding."""

import pytest

from tests.promises.models import GUIDANCE, MODELS, cases
from tests.trainer import runs
from tests.trainer.comparisons import assert_same_to_rounding

ITERATIONS = 2
SHORT = {
    "sample__steps": 3,
    "grpo__timesteps__strategy": "first",
    "grpo__updates_per_iteration": 2,  # so that there are ratios to compare that are not 1
    # A weight whose gradient is nothing but rounding moves by a learning rate either way (comparisons.py), and the samples of
    # the next iteration multiply that: at the whole rate HunyuanVideo's, of size 6, by up to 1.3e-5 on an AMD EPYC, where they
    # are held to 1e-5. Warming up, the updates before them have a quarter and a half of it.
    "optim__warmup_steps": 4,
    "run__iterations": ITERATIONS,
    "run__save_every": ITERATIONS,
    "run__sample_every": ITERATIONS,  # and before the first
    "run__sample_prompts": 2,
}
# How a run is done, not what it computes.
HOW = {
    "every second block checkpointed": {"engine__activation_checkpointing": "every:2"},
    "full checkpointing": {"engine__activation_checkpointing": "full"},
    "idle offload": {"engine__offload_idle": True},
    "asynchronous rewards": {"rewards__async": "true"},
    "optimiser offloaded": {"engine__offload": "optimizer"},
    "parameters offloaded": {"engine__offload": "parameters"},
    "shared tokens": {"engine__sequence_parallel": 2},
    "tokens shared by 4": {"engine__sequence_parallel": 4},
    **{f"ZeRO {stage}": {"engine__kind": "deepspeed", "engine__zero_stage": stage} for stage in (0, 1, 2, 3)},
}
# Guidance multiplies in the samples of later iterations what is rounding in the weights: at 3, with latents of size 10, by more
# than the 1e-5 that samples are held to (3 of 66 runs, on an AMD EPYC).
SCALE = {"sample__cfg_scale": 2.0}
WHAT = {
    "no guidance": GUIDANCE["no guidance"],
    "guidance in two passes": {**GUIDANCE["guidance in two passes"], **SCALE},
    "guidance in one pass": {**GUIDANCE["guidance in one pass"], **SCALE},
    "LoRA": {"model__lora__rank": 4, "model__lora__alpha": 8.0},
    "KL": {"grpo__kl_weight": 0.1},
    "1 sample": {"engine__micro_batch_size": 1},
    "4 samples": {"engine__micro_batch_size": 4},
    "image": {"sample__frames": 1},
}
FRAMES = 5
"""Of clips whose tokens are not shared: decoding is most of a tiny run. Nine frames have tokens that two processes cannot share
evenly."""
EVERYTHING = "guidance in one pass, every second block checkpointed, idle offload, asynchronous rewards"
ALL = [
    f"ZeRO 3, {EVERYTHING}",
    *(f"ZeRO {stage}" for stage in (0, 1, 2, 3)),
    *(f"ZeRO {stage}, 4 processes" for stage in (0, 1, 2, 3)),
    *(f"ZeRO {stage}, optimiser offloaded" for stage in (1, 2, 3)),
    "ZeRO 3, parameters offloaded",
    "ZeRO 3, full checkpointing",
    *(f"ZeRO {stage}, {what}" for stage in (0, 2, 3) for what in ("LoRA", "KL")),
    *(f"ZeRO {stage}, {what}" for stage in (2, 3) for what in ("1 sample", "4 samples", "guidance in two passes")),
]
SHARED = [
    f"ZeRO 2, shared tokens, {EVERYTHING}",
    *(f"ZeRO {stage}, shared tokens" for stage in (1, 2, 3)),
    *(f"ZeRO {stage}, shared tokens, 4 processes" for stage in (1, 2, 3)),
    *(f"ZeRO 3, shared tokens, {what}" for what in ("LoRA", "KL", "guidance in one pass")),
    "ZeRO 3, tokens shared by 4, 4 processes",
    "ZeRO 3, parameters offloaded, shared tokens, 4 processes",
]


WHOLE = ("flux", "wan")  # one of images, one of clips and with guidance
SOME = [  # of the other models: each stage, and each setting with one stage
    f"ZeRO 3, {EVERYTHING}",
    *(f"ZeRO {stage}" for stage in (0, 1, 2, 3)),
    "ZeRO 0, KL",
    "ZeRO 1, 4 processes",
    "ZeRO 2, LoRA",
    "ZeRO 2, optimiser offloaded",
    "ZeRO 2, 1 sample",
    "ZeRO 3, parameters offloaded",
    "ZeRO 3, full checkpointing",
    "ZeRO 3, 4 samples",
    "ZeRO 3, guidance in two passes",
    f"ZeRO 2, shared tokens, {EVERYTHING}",
    *(f"ZeRO {stage}, shared tokens" for stage in (1, 2, 3)),
    "ZeRO 2, shared tokens, 4 processes",
    "ZeRO 3, shared tokens, LoRA",
    "ZeRO 3, tokens shared by 4, 4 processes",
]
STAGES = [  # of a model whose network is another's
    f"ZeRO 3, {EVERYTHING}",
    *(f"ZeRO {stage}" for stage in (0, 1, 2, 3)),
    f"ZeRO 2, shared tokens, {EVERYTHING}",
    *(f"ZeRO {stage}, shared tokens" for stage in (1, 2, 3)),
]


def runs_of(model):
    images = ["ZeRO 2, shared tokens, image"] if "image" in model.flavours else []
    every = [*ALL, *(SHARED if model.shares_tokens else []), *images]
    if model.kind in WHOLE:
        return every
    some = STAGES if model.kind == "skyreels_i2v" else SOME
    return [case for case in every if case in some or case in images]


def quick(model, case):
    """One with everything at once for each kind of network (SkyReels has HunyuanVideo's); the matrix in `make test-all`."""
    return model.kind != "hunyuan_video" and case == (SHARED if model.shares_tokens else ALL)[0]


def prompts_of(words):
    """Of an iteration, whose two updates take half of them each: four where four processes draw alone, where two do in
    micro-batches of four, and where two have several calls of an update to add up. The other cases need no more than two."""
    shared = any(word.startswith(("shared tokens", "tokens shared")) for word in words)
    return 4 if len(words) == 1 or "4 samples" in words or ("4 processes" in words and not shared) else 2


assert {*SOME, *STAGES} <= {*ALL, *SHARED}


def iterations_of(words, case):
    """Two of each ZeRO stage and of what everything is asked of at once: what comes of an update is drawn from in the second.
    One where a stage is asked of something else, whose two updates show it."""
    count = ITERATIONS if len(words) == 1 or EVERYTHING in case else 1
    return {"run__iterations": count, "run__save_every": count, "run__sample_every": count}


def how_of(words):
    return {key: value for word in words for key, value in HOW.get(word, {}).items()}


def settings_of(model, case):
    """(processes, settings of the run, those that are also the one process's)."""
    words = case.split(", ")
    processes = 4 if words[-1] == "4 processes" else 2
    how, what = how_of(words), dict(WHAT["guidance in one pass" if model.guided else "no guidance"])
    what.update(iterations_of(words, case))
    what["grpo__prompts_per_iteration"] = prompts_of(words)
    if model.settings.get("sample__frames", 1) > 1 and "engine__sequence_parallel" not in how:
        what["sample__frames"] = FRAMES
    for word in words:
        what.update(WHAT.get(word, {}))
        assert word in HOW or word in WHAT or word == "4 processes", word
    return processes, model.run(**{**SHORT, **how, **what}), model.run(**{**SHORT, **what})


@pytest.fixture(scope="module")
def alone(tiny_checkpoint, tmp_path_factory):
    """``alone(settings)`` -> folder of a recorded run of one process."""
    return runs.once(tmp_path_factory, tiny_checkpoint, record=True)


@pytest.mark.parametrize("model,case", cases(runs_of, quick))
def test_processes_give_the_samples_and_weights_of_one(alone, tiny_checkpoint, tmp_path, model, case):
    processes, settings, of_one = settings_of(model, case)
    overrides = runs.settings(tmp_path, tiny_checkpoint(model.kind), **settings)
    assert runs.run(overrides, processes=processes, record=True) == [0] * processes
    assert_same_to_rounding(tmp_path, alone(of_one), settings["run__iterations"])
    assert "KL" not in case or runs.metrics(tmp_path)[-1]["train/kl"] > 0


GRADIENTS = {
    **{f"shared tokens, {n} processes": (n, GUIDANCE["no guidance"]) for n in (2, 4)},
    **{
        f"shared tokens, guidance in one pass, KL, {n} processes": (
            n,
            {**WHAT["guidance in one pass"], "grpo__kl_weight": 0.1},
        )
        for n in (2, 4)
    },
    "shared tokens, guidance in two passes, 2 processes": (2, WHAT["guidance in two passes"]),
}
# Four processes on two cores are slow: two groups of two for one model here.
QUICK = {"flux": "shared tokens, 2 processes", "hunyuan_video": "shared tokens, 4 processes"}


def shared_runs(model):
    images = [f"{case}, image" for case in list(GRADIENTS)[:2]] if "image" in model.flavours else []
    return [*GRADIENTS, *images]


@pytest.mark.parametrize(
    "model,case",
    cases(
        shared_runs,
        lambda model, case: case == QUICK.get(model.kind),
        [model for model in MODELS.values() if model.shares_tokens],
    ),
)
def test_gradients_of_shared_tokens_are_those_of_one_process(alone, tiny_checkpoint, tmp_path, model, case):
    """Compared before an optimiser touches them: AdamW divides gradients that are pure rounding by their own size."""
    processes, what = GRADIENTS[case.removesuffix(", image")]
    exact = {"rewards__models__pixels__kind": "test_position", "run__iterations": 1, "grpo__prompts_per_iteration": 2}
    of_one = model.run(**{**SHORT, "grpo__timesteps__strategy": "random", **exact, **what})
    if case.endswith("image"):
        of_one["sample__frames"] = 1
    settings = {**of_one, **HOW["ZeRO 0"], **HOW["shared tokens"]}
    overrides = runs.settings(tmp_path, tiny_checkpoint(model.kind), **settings)
    assert runs.run(overrides, processes=processes, record=True) == [0] * processes
    one = alone(of_one)

    (ours, _), (theirs, _) = runs.drawn(tmp_path, 0), runs.drawn(one, 0)
    for what, tolerance in (("latents", 2e-5), ("log_probs", 1e-5)):  # latents of size 1 to 10
        a, b = ({key: value for key, value in drawn.items() if key[0] == what} for drawn in (ours, theirs))
        assert len(a) == 8 and runs.largest_difference(a, b) < tolerance
    a, b = runs.metrics(tmp_path)[0], runs.metrics(one)[0]
    assert a["train/ratio_first_update_max_dev"] == 0.0 < a["train/ratio_max_dev"]
    assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-2, abs=1e-5)
    assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-4)
    expected = runs.gradients(one, 0)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for rank in range(processes):
        assert runs.largest_difference(runs.gradients(tmp_path, 0, rank), expected) < 1e-5 * scale
    assert "KL" not in case or a["train/kl"] > 0.0
    pictures = runs.pictures(tmp_path, 1).int(), runs.pictures(one, 1).int()
    assert pictures[0].shape == pictures[1].shape and (pictures[0] - pictures[1]).abs().max() <= 1
