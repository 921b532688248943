"""Promise 4: killed anywhere and started again, a run is bitwise the one that was never killed."""

import shutil
from dataclasses import dataclass

import pytest

from fastvideo_grpo.grpo import timesteps
from tests.promises.models import GUIDANCE, cases
from tests.trainer import runs
from tests.trainer.comparisons import assert_same_bitwise

ITERATIONS = 2
SHORT = {
    "sample__steps": 3,
    "grpo__timesteps__strategy": "first",
    "grpo__prompts_per_iteration": 2,  # one for each of two that draw alone, one an update
    "grpo__updates_per_iteration": 2,
    "run__iterations": ITERATIONS,
    "optim__ema_decay": 0.9,
    "optim__warmup_steps": 4,
    "optim__lr": 1e-3,
}
DRAWS = 4  # of an iteration: 2 prompts x 4 samples, 2 at a time
BACKWARDS = DRAWS * timesteps.count(SHORT["sample__steps"], "first", 0.6)
DEEPSPEED = {"engine__kind": "deepspeed"}
LORA = {"model__lora__rank": 4, "model__lora__alpha": 8.0}
WAYS = {
    "one process": (1, {}),
    "LoRA": (1, LORA),
    "KL": (1, {"grpo__kl_weight": 0.1}),
    **{f"ZeRO {stage}": (2, {**DEEPSPEED, "engine__zero_stage": stage}) for stage in (1, 2, 3)},
    # What recipes turn on, all at once.
    "ZeRO 2, bf16, LoRA, full checkpointing": (
        2,
        {
            **DEEPSPEED,
            **LORA,
            "engine__zero_stage": 2,
            "engine__activation_checkpointing": "full",
            "model__precision": "bf16",
        },
    ),
}
SHARED = {
    f"ZeRO {stage}, shared tokens": (2, {**DEEPSPEED, "engine__zero_stage": stage, "engine__sequence_parallel": 2})
    for stage in (2, 3)
}
SHARED["ZeRO 3, shared tokens, 4 processes"] = (4, SHARED["ZeRO 3, shared tokens"][1])


@dataclass
class Stop:
    """A kill in the second iteration, and what it must leave.

    ``finished``: (draws, backwards, optimiser steps) of a run on one process. ``lines``: of metrics.jsonl.
    """

    kill: runs.Kill
    finished: tuple[int, int, int]
    lines: int = 1
    checkpoints: tuple[str, ...] = ("000001",)


KILLS = {
    "in the rollout": Stop(runs.Kill("draw", DRAWS + 2), (DRAWS + 2, BACKWARDS, 2)),
    "in an update": Stop(runs.Kill("engine.backward", BACKWARDS + 2), (2 * DRAWS, BACKWARDS + 2, 2)),
    "between the updates": Stop(runs.Kill("engine.step", 2, after=True), (2 * DRAWS, BACKWARDS + BACKWARDS // 2, 3)),
    # A checkpoint with EMA is three files: the first of the second one is written.
    "in a save": Stop(
        runs.Kill("fastvideo_grpo.engines.base.write_tensors", 3, after=True),
        (2 * DRAWS, 2 * BACKWARDS, 4),
        2,
        (".saving-000002", "000001"),
    ),
}
# One of each kind here: on one process, shared tokens and a cache, a model that is no FastVideo pipeline.
QUICK = {
    "flux": ("one process, in the rollout", "one process, in a save"),
    "wan": ("ZeRO 2, shared tokens, in an update",),
    "stable_diffusion": ("ZeRO 2, between the updates",),
}


def kills(model):
    """Every way with one kill and every kill in one: where a kill falls is the loop's affair, not the model's or the way's."""
    ways = [*WAYS, *(SHARED if model.shares_tokens else ())]
    some = [f"{way}, in an update" for way in ways] + [f"ZeRO 2, {kill}" for kill in KILLS]
    if model.kind == "flux":  # on one process, and in partitions
        some += [f"{way}, {kill}" for way in ("one process", "ZeRO 3") for kill in KILLS]
    return list(dict.fromkeys([*some, *QUICK.get(model.kind, ())]))


def way_of(model, case):
    """(processes, how many of them share a sample, settings)."""
    processes, settings = {**WAYS, **SHARED}[case.rpartition(", ")[0]]
    guidance = GUIDANCE["guidance in one pass" if model.guided else "no guidance"]
    return processes, settings.get("engine__sequence_parallel", 1), model.run(**SHORT, **guidance, **settings)


@pytest.fixture(scope="module")
def never_killed(tiny_checkpoint, tmp_path_factory):
    """``never_killed(settings, processes)`` -> folder of a run that was never killed."""
    return runs.once(tmp_path_factory, tiny_checkpoint)


@pytest.mark.parametrize("model,case", cases(kills, lambda model, case: case in QUICK.get(model.kind, ())))
def test_killed_and_resumed_is_bitwise_never_killed(never_killed, tiny_checkpoint, tmp_path, model, case):
    """Weights, EMA, optimiser and logged numbers. The second start finds its embeddings cached: text encoders stay on disk."""
    processes, sharing, settings = way_of(model, case)
    cache = {"prompts__embeddings": tmp_path / "embeddings", "prompts__embedding_dtype": "fp32"}
    overrides = runs.settings(tmp_path, tiny_checkpoint(model.kind), **settings, **cache)
    stop = KILLS[case.rpartition(", ")[2]]
    dealt = processes // sharing  # draws and backwards are dealt; processes that share a sample make all of its calls
    kill = stop.kill
    if kill.target in ("draw", "engine.backward"):
        kill = runs.Kill(kill.target, kill.call // dealt, kill.after)
    assert runs.run(overrides, processes=processes, kill=kill) == [-9] * processes
    draws, backwards, steps = stop.finished
    for rank in range(processes):
        assert runs.killed(tmp_path, rank) == (draws // dealt, backwards // dealt, steps)
    assert len(runs.metrics(tmp_path)) == stop.lines
    assert runs.checkpoints(tmp_path) == list(stop.checkpoints)
    assert runs.run(overrides, processes=processes) == [0] * processes
    assert "after iteration 1" in runs.output(tmp_path)
    assert_same_bitwise(tmp_path, never_killed(settings, processes), ITERATIONS)
    assert list(runs.averages(tmp_path, ITERATIONS)) == ["ema"]


@pytest.mark.parametrize("model,case", cases(lambda model: ("ZeRO 2, moved",), lambda model, case: model.kind == "flux"))
def test_two_killed_processes_go_on_as_one_to_rounding(never_killed, tiny_checkpoint, tmp_path, model, case):
    """Another world size: the weights are those of the run that was never killed, to rounding."""
    processes, _, settings = way_of(model, case)
    settings = {**settings, "optim__lr": 1e-5}
    killed, moved = tmp_path / "killed", tmp_path / "moved"
    overrides = runs.settings(killed, tiny_checkpoint(model.kind), **settings)
    assert runs.run(overrides, processes=processes, kill=KILLS["between the updates"].kill) == [-9, -9]
    shutil.copytree(killed / "run", moved / "run")
    alone = {key: value for key, value in settings.items() if not key.startswith("engine__")}
    assert runs.run(runs.settings(moved, tiny_checkpoint(model.kind), **alone)) == [0]
    whole = never_killed(settings, processes)
    for which in ("model", "ema"):
        ours, theirs = (runs.weights(folder, ITERATIONS, which) for folder in (moved, whole))
        assert runs.largest_difference(ours, theirs) < 1e-6
