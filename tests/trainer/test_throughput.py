"""``perf/*``: the operations that are counted without weights are those of the network that trains, and rates are theirs."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvideo_grpo.engines import compiled_blocks
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.planning import operations
from fastvideo_grpo.planning.activation_counting import FamilyCounter
from fastvideo_grpo.planning.cards import CARDS, card_of, find_card
from fastvideo_grpo.planning.operations import Operations, count_operations
from fastvideo_grpo.planning.weightless import LAYERS, with_sizes
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.tracking.statistics import FORWARD, TRAINED, Clock
from fastvideo_grpo.trainers.load import trainer_class
from fastvideo_grpo.trainers.throughput import Throughput
from tests.trainer import runs

SIZES = {"sample__height": 64, "sample__width": 64}
ATTENTION = {  # as in fastvideo_grpo/planning/operations.py; torch's table has that of GPUs alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: operations._attention(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: operations._attention_backward(
        *shapes[:4]
    ),
}


def of_a_real_pass(policy, prompt):
    """(forward, backward) of the loaded network, by torch's own counter."""
    conditioning = policy.conditioning(prompt, 1)
    sample = policy.pack(torch.randn(1, *policy.latent_shape()))
    level = policy.schedule.at(torch.tensor([1]))
    with policy.pass_context(conditioning), FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        output = policy.predict(sample, level, conditioning)
        forward = counter.get_total_flops()
        output.float().sum().backward()
    return forward, counter.get_total_flops() - forward


CASES = [
    ("flux", {"model__lora__rank": 4, "model__lora__alpha": 4.0, "engine__activation_checkpointing": "every:2"}),
    ("stable_diffusion", {"sample__cfg_scale": 1.0, "engine__activation_checkpointing": "full"}),
    pytest.param("flux", {}, marks=pytest.mark.slow),
    pytest.param("wan", {"sample__cfg_scale": 1.0, "engine__activation_checkpointing": "full"}, marks=pytest.mark.slow),
    pytest.param("wan", {"sample__cfg_scale": 1.0, "sample__frames": 5}, marks=pytest.mark.slow),
    pytest.param("hunyuan_video", {"engine__activation_checkpointing": "every:2"}, marks=pytest.mark.slow),
    pytest.param("skyreels_i2v", {"sample__cfg_scale": 1.0}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind,settings", CASES)
def test_what_is_counted_without_weights_is_what_a_real_pass_computes(make_trainer, kind, settings):
    trainer = make_trainer(model__kind=kind, **SIZES, **settings)
    config, lengths = trainer.config, [t.shape[1] for n, t in trainer._encoded(trainer.run.prompts[0]).items() if t.ndim == 3]
    config.prompts.text_length = lengths[0]  # HunyuanVideo reads a text's own tokens
    found = count_operations(type(trainer), config, trainer.facts)
    assert (found.forward, found.backward + found.recomputed) == of_a_real_pass(trainer, trainer.run.prompts[0])
    assert (found.recomputed > 0) == ("engine__activation_checkpointing" in settings)
    assert found.recomputed < found.forward


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "wan" else [pytest.mark.slow]) for kind in ("flux", "hunyuan_video", "wan")]
)
def test_many_blocks_are_counted_by_the_difference_that_one_makes(kind):
    """Not one by one: FLUX has 57."""
    counter, trainer = FamilyCounter(kind, trainer_class, print), trainer_class(kind)
    config = counter.settings("bf16", lora=True, recomputed="every:2")
    few = {
        name: count for name, count in zip(LAYERS, (5, 4, 3), strict=True) if counter.published.denoiser.get(name)
    }
    facts = with_sizes(counter.published, FAMILIES[kind], few)
    plain = replace(config, engine=replace(config.engine, activation_checkpointing="none"))
    whole, recomputing = operations._counted(trainer, plain, facts), operations._counted(trainer, config, facts)
    found = count_operations(trainer, config, facts)
    assert (found.forward, found.backward) == (whole[:2].sum(), whole[2:].sum())
    assert found.recomputed == recomputing.sum() - whole.sum() > 0


def test_published_networks_are_what_was_counted_on_a_gpu():
    """FLUX.1-dev at 720 x 720 with adapters of rank 128: 38.0 TFLOP. Wan 2.1 1.3B at 832 x 480 x 33 with two texts: 146."""
    for kind, rank, size, text, passes, expected in (
        ("flux", 128, {"height": 720, "width": 720}, 512, 1, 38.0),
        ("wan", None, {"height": 480, "width": 832, "frames": 33}, 512, 2, 146.0),
    ):
        counter = FamilyCounter(kind, trainer_class, print)
        config = counter.settings("bf16", lora=rank is not None, rank=rank or 1)
        config = replace(config, sample=replace(config.sample, **size), prompts=replace(config.prompts, text_length=text))
        found = count_operations(trainer_class(kind), config, counter.published)
        assert passes * found.forward / 1e12 == pytest.approx(expected, rel=0.005)


def _count_on_a_rank(settings, folder):
    """What one of two processes that share a sample computes in a real pass."""
    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.engines.process import prepare_process
    from fastvideo_grpo.models import run_config
    from fastvideo_grpo.trainers.load import load_trainer

    (folder / "empty.yaml").write_text("{}")
    config = run_config.load(folder / "empty.yaml", settings)
    prepare_process(config)
    with load_trainer(config, World.current(sequence_parallel=2)) as trainer:
        counted = of_a_real_pass(trainer, Prompt("p", "a red circle"))
        estimated = count_operations(type(trainer), config, trainer.facts)
        (folder / f"{trainer.world.rank}.json").write_text(json.dumps([counted, [estimated.forward, estimated.backward]]))
    return 0


@pytest.mark.parametrize("kind", ["flux", pytest.param("wan", marks=pytest.mark.slow)])
def test_processes_that_share_tokens_compute_what_is_counted_for_them(tiny_checkpoint, tmp_path, kind):
    """A half of the image and of attention, and all of the text's. In a run of two the count is made as by one alone."""
    more = {"engine__kind": "deepspeed", "engine__zero_stage": 0, "engine__sequence_parallel": 2, "sample__cfg_scale": 1.0}
    frames = {"sample__frames": 5} if kind == "wan" else {}
    settings = runs.settings(tmp_path, tiny_checkpoint(kind), model__kind=kind, **SIZES, **frames, **more)
    action = partial(_count_on_a_rank, settings, tmp_path)
    assert runs.in_processes(action, tmp_path / "output.txt", processes=2) == [0, 0]
    for rank in (0, 1):
        counted, estimated = json.loads((tmp_path / f"{rank}.json").read_text())
        assert counted == pytest.approx(estimated, rel=0.02)


OPERATIONS = Operations(forward=2e12, backward=4e12, recomputed=1e12)


def clock_of(seconds, passes=None):
    clock = Clock()
    clock.seconds.update(seconds)
    for phase, made in (passes or {}).items():
        clock.passes[phase].update(made)
    return clock


def test_rates_are_of_the_phases_and_of_what_the_card_can_do():
    clock = clock_of(
        {"rollout": 10.0, "reward": 1.0, "exchange": 1.0, "update": 4.0, "evaluation": 100.0},
        {"rollout": {FORWARD: 30}, "update": {FORWARD: 5, TRAINED: 10}, "evaluation": {FORWARD: 1000}},
    )
    found = Throughput(64, 4, OPERATIONS, card_of("h200"), "bf16").metrics(clock)
    assert found == pytest.approx(
        {
            "perf/seconds_per_sample": 0.25,
            "perf/samples_per_gpu_second": 1.0,
            "perf/rollout_tflop": 60.0,
            "perf/rollout_tflop_per_second": 6.0,
            "perf/rollout_mfu": 6 / 989.4,
            "perf/rollout_of_ceiling": 6 / 795,
            "perf/update_tflop": 70.0,  # 15 forwards and 10 backwards; what is recomputed is no progress
            "perf/recomputed_tflop": 10.0,
            "perf/update_tflop_per_second": 17.5,
            "perf/update_mfu": 17.5 / 989.4,
            "perf/update_of_ceiling": 17.5 / 795,
        }
    )
    unmeasured = Throughput(64, 4, OPERATIONS, card_of("4090"), "fp32").metrics(clock)
    assert unmeasured["perf/rollout_mfu"] == pytest.approx(6 / 82.6) and "perf/rollout_of_ceiling" not in unmeasured
    nothing = clock_of({"rollout": 1.0}, {"rollout": {FORWARD: 3}})
    assert Throughput(64, 4, OPERATIONS, None, "bf16").metrics(nothing)["perf/update_tflop"] == 0.0


def test_cards_are_known_by_the_names_that_torch_gives():
    names = {
        "NVIDIA H200": "h200",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA L40S": "l40s",
        "NVIDIA GeForce RTX 4090": "4090",
    }
    assert {name: find_card(name).key for name in names} == names
    assert find_card("NVIDIA GeForce RTX 4090D") is None and find_card("Tesla T4") is None
    assert len({card.key for card in CARDS}) == len(CARDS)


def passes_of(make_trainer, monkeypatch, **settings):
    """(phase -> passes, metrics) of the only iteration: 2 prompts of 4 samples, 3 timesteps drawn and 2 of them trained."""
    common = {"sample__steps": 3, "grpo__timesteps__fraction": 0.7, "grpo__prompts_per_iteration": 2, "run__iterations": 1}
    trainer = make_trainer(**common, **settings)
    clocks, metrics = [], Throughput.metrics
    monkeypatch.setattr(Throughput, "metrics", lambda self, clock: clocks.append(clock) or metrics(self, clock))
    trainer.train()
    return clocks[0].passes, trainer.run.log.read()[0]


def test_passes_are_counted_by_phase_and_logged(make_trainer, monkeypatch):
    passes, line = passes_of(make_trainer, monkeypatch, run__eval_every=1, run__sample_every=1, grpo__kl_weight=0.1)
    assert passes["rollout"] == Counter({FORWARD: 8 * 3})
    assert passes["update"] == Counter({TRAINED: 8 * 2, FORWARD: 8 * 2})  # the reference's, of KL
    assert passes["evaluation"][FORWARD] > 0
    rate = line["perf/rollout_tflop"] / line["time/rollout"]
    assert line["perf/rollout_tflop_per_second"] == pytest.approx(rate)
    assert line["perf/rollout_tflop"] / 24 == pytest.approx(line["perf/update_tflop"] / (32 + 16 * 2), rel=0.1)


def test_a_compiled_rollout_is_forwards_though_it_runs_the_graphs_of_the_update(make_trainer, monkeypatch):
    monkeypatch.setattr(compiled_blocks, "BACKEND", "eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):  # restored after the test
        passes, _ = passes_of(make_trainer, monkeypatch, model__compile="blocks")
    torch._dynamo.reset()
    assert passes["rollout"] == Counter({FORWARD: 8 * 3}) and passes["update"] == Counter({TRAINED: 8 * 2})


@pytest.mark.parametrize(
    "settings,rollout,update",
    [
        ({"model__cfg_batched": False}, {FORWARD: 48}, {TRAINED: 32}),
        ({"model__cfg_batched": True}, {FORWARD: 48}, {TRAINED: 32}),
        ({"model__cfg_batched": False, "grpo__cfg_gradients": "conditional"}, {FORWARD: 48}, {TRAINED: 16, FORWARD: 16}),
    ],
)
def test_guidance_makes_two_passes(make_trainer, monkeypatch, settings, rollout, update):
    guided = {"model__kind": "stable_diffusion", **runs.STABLE_DIFFUSION, "sample__cfg_scale": 3.0}
    passes, _ = passes_of(make_trainer, monkeypatch, **guided, **settings)
    assert passes["rollout"] == Counter(rollout) and passes["update"] == Counter(update)


def test_a_network_that_cannot_be_counted_is_told_and_trained(make_trainer, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("no such operator\nand a trace")

    monkeypatch.setattr("fastvideo_grpo.trainers.throughput.count_operations", fails)
    monkeypatch.setattr("tests.counted_operations.share", lambda: None)
    trainer = make_trainer(run__iterations=1)
    assert "operations of flux cannot be counted (RuntimeError: no such operator)" in caplog.text
    trainer.train()
    (line,) = trainer.run.log.read()
    assert {key for key in line if key.startswith("perf/")} == {"perf/seconds_per_sample", "perf/samples_per_gpu_second"}
