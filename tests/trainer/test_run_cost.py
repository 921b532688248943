"""``train --dry-run --gpu``: what it says of runs that were measured, what is exchanged, and each assumption."""

from dataclasses import replace

import pytest

from fastvideo_grpo import cli
from fastvideo_grpo.grpo import timesteps
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.planning import cost
from fastvideo_grpo.planning.activation_counting import FamilyCounter
from fastvideo_grpo.planning.cards import card_of
from fastvideo_grpo.planning.cost import RunCost, cost_of, describe_cost, run_cost
from fastvideo_grpo.planning.operations import Operations
from fastvideo_grpo.planning.plan import count_parameters
from fastvideo_grpo.trainers.load import trainer_class

H200 = card_of("h200")


def published(kind, *, lora=None, recomputed="none", text_length=512, frames=1, **sample):
    """(trainer, configuration, facts) of the published model in bf16; an iteration is a group of two samples."""
    counter = FamilyCounter(kind, trainer_class, print)
    config = counter.settings("bf16", lora=lora is not None, rank=lora or 1, recomputed=recomputed)
    config = replace(
        config,
        model=replace(config.model, vae_precision="bf16", cfg_batched=sample.get("cfg_scale", 1.0) > 1),
        prompts=replace(config.prompts, text_length=text_length),
        sample=replace(config.sample, frames=frames, **sample),
        grpo=replace(config.grpo, prompts_per_iteration=1, group_size=2, updates_per_iteration=1),
        engine=replace(config.engine, micro_batch_size=1),
    )
    return trainer_class(kind), config, counter.published


# Measured on an H200: seconds of a rollout a sample and step, decoding included, and of an update a sample and timestep.
MEASURED = {
    "FLUX.1-dev, LoRA": (("flux",), {"lora": 128, "height": 720, "width": 720, "steps": 6}, 0.150, 0.305),
    "Wan 2.1 1.3B, all weights": (
        ("wan",),
        {"recomputed": "full", "height": 480, "width": 832, "frames": 33, "steps": 4, "cfg_scale": 5.0},
        0.808,
        2.325,
    ),
    "HunyuanVideo, LoRA": (
        ("hunyuan_video",),
        {"lora": 64, "recomputed": "full", "text_length": 256, "height": 480, "width": 480, "frames": 53, "steps": 4},
        1.69,
        3.46,
    ),
}


@pytest.mark.parametrize("case", [case if "Wan" in case else pytest.param(case, marks=pytest.mark.slow) for case in MEASURED])
def test_what_was_measured_is_within_a_fifth(case):
    arguments, settings, rollout, update = MEASURED[case]
    trainer, config, facts = published(*arguments, **settings)
    found = run_cost(trainer, config, facts, 1, H200)
    trained = timesteps.count(config.sample.steps, config.grpo.timesteps.strategy, config.grpo.timesteps.fraction)
    assert (found.sampling + found.decoding) / (2 * config.sample.steps) == pytest.approx(rollout, rel=0.2)
    assert found.updating / (2 * trained) == pytest.approx(update, rel=0.2)
    assert not found.exchange


ONCE = Operations(forward=1e12, backward=2e12, recomputed=1e12)
PEAK = cost.EFFICIENCY * 795e12


def spread(config, **engine):
    grpo = replace(config.grpo, prompts_per_iteration=4, group_size=4, updates_per_iteration=2)
    return replace(config, grpo=grpo, engine=replace(config.engine, kind="deepspeed", **engine))


def test_passes_are_those_of_the_dry_run():
    """4 prompts of 4 samples on 2 GPUs: 8 samples each, 16 steps, 10 of them trained; a reference and guidance come on top."""
    _, config, facts = published("wan", steps=16)
    config = spread(config, zero_stage=1)
    plain = cost_of(config, facts, 2, H200, ONCE, 1e12)
    assert plain.sampling == pytest.approx(8 * 16 / PEAK * 1e12)
    assert plain.updating == pytest.approx(8 * 10 * 4 / PEAK * 1e12)
    assert plain.decoding == pytest.approx(8e12 / (cost.DECODING_IMAGE * 795e12))
    kl = cost_of(replace(config, grpo=replace(config.grpo, kl_weight=0.1)), facts, 2, H200, ONCE, 1e12)
    assert kl.updating == pytest.approx(8 * 10 * 5 / PEAK * 1e12)
    guided = replace(config, sample=replace(config.sample, cfg_scale=5.0))
    apart = replace(
        guided, model=replace(config.model, cfg_batched=False), grpo=replace(config.grpo, cfg_gradients="conditional")
    )
    assert cost_of(guided, facts, 2, H200, ONCE, 1e12).updating == pytest.approx(2 * plain.updating)
    assert cost_of(apart, facts, 2, H200, ONCE, 1e12).updating == pytest.approx(8 * 10 * 5 / PEAK * 1e12)
    assert cost_of(apart, facts, 2, H200, ONCE, 1e12).sampling == pytest.approx(2 * plain.sampling)
    compiled = replace(config, model=replace(config.model, compile="blocks"))
    assert cost_of(compiled, facts, 2, H200, ONCE, 1e12).sampling == pytest.approx(plain.sampling / cost.COMPILED)


@pytest.mark.parametrize(
    "stage,gradients,weights",
    [
        (1, 4 * 2, 2 * 2),  # once an optimiser step: 4 bytes of gradients, 2 of weights
        (2, 4 * 80, 2 * 2),  # with every backward pass
        (3, 4 * 80, 2 * (8 * 16 + 80 * 2)),  # weights for each forward, and again for each backward
    ],
)
def test_what_zero_exchanges(stage, gradients, weights):
    """Bytes a weight that each of two GPUs sends, half of all of them: 8 samples of 16 steps, 80 trained transitions."""
    _, config, facts = published("wan", steps=16)
    found = cost_of(spread(config, zero_stage=stage), facts, 2, H200, ONCE, 1e12)
    half = count_parameters(config, facts)[1] / 2
    assert found.exchange == pytest.approx({"gradients": gradients * half / H200.link, "weights": weights * half / H200.link})
    config = spread(config, zero_stage=stage)
    eight_times = replace(config, grpo=replace(config.grpo, prompts_per_iteration=32))
    further = cost_of(eight_times, facts, 16, H200, ONCE, 1e12)  # over two nodes, each with the same samples
    more = (15 / 16) / (1 / 2) * H200.link / cost.NETWORK
    assert further.exchange == pytest.approx({what: more * seconds for what, seconds in found.exchange.items()})


def test_what_sharing_tokens_exchanges():
    """Queries, keys, values and the result of each block's attention: half of a process's share goes to the other."""
    _, config, facts = published("wan", steps=16)
    found = cost_of(spread(config, zero_stage=1, sequence_parallel=2), facts, 2, H200, ONCE, 1e12)
    tokens = FAMILIES["wan"].image_tokens(facts, config.sample) / 2
    once = 4 * 30 * tokens * 1536 * 2 / 2
    assert found.exchange["tokens"] == pytest.approx((16 * 16 + 160 * 2) * once / H200.link)


def test_each_assumption_is_said():
    _, config, _ = published("wan", steps=16)
    found = RunCost(card_of("4090"), 16, 100, 30.0, 2.0, 40.0, {"gradients": 0.25})
    lines = describe_cost(found, config, 30e9)
    text = "\n".join(lines)
    assert lines[0].startswith("time         72 s an iteration on 16 GeForce RTX 4090")
    assert "100 iterations: 2.0 hours, 32 GPU-hours" in text
    assert "132 TFLOP/s of large matrix products in bf16 (0.8 of the datasheet's 165" in text
    assert "exchange   0.25 s (gradients 0.25 s)" in text and "50 GB/s a GPU between nodes" in text
    assert lines[-1].startswith("note ") and "GeForce RTX 4090 has" in lines[-1]
    alone = describe_cost(replace(found, card=H200, ranks=1, exchange={}), config, 30e9)
    assert not any("exchange" in line or "between nodes" in line or line.startswith("note") for line in alone)
    assert any("795 TFLOP/s of large matrix products in bf16 (measured)" in line for line in alone)


def test_a_dry_run_says_it_and_a_run_does_not_take_it(tiny_checkpoint, tmp_path, capsys):
    settings = [
        "train_scripts/configs/flux_t2i_tiny.yaml",
        f"model.path={tiny_checkpoint('flux')}",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert cli.main(["train", *settings, "--dry-run", "--gpu", "a100"]) == 0
    printed = capsys.readouterr().out
    assert "an iteration on 1 A100 SXM 80 GB" in printed and "GPU-hours" in printed
    assert cli.main(["train", *settings, "--gpu", "a100"]) == 1
    assert "--gpu only goes with --dry-run" in capsys.readouterr().err
