"""How long a run will take on a card that is not here (``train --dry-run --gpu``): operations that are counted, divided by what
such operations reached where they were measured, and bytes that are exchanged, divided by what links are said to carry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastvideo_grpo.config.keys import Config, checkpointed_blocks, guidance_of, make_objective
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.planning.cards import Card
from fastvideo_grpo.planning.operations import Operations, count_decoding, count_operations
from fastvideo_grpo.planning.plan import count_parameters, dealing
from fastvideo_grpo.planning.run_steps import RunSteps, drawing_of, idle_of
from fastvideo_grpo.planning.weightless import LAYERS
from fastvideo_grpo.precision import DTYPES
from fastvideo_grpo.printed_sizes import gib

CEILING = 0.8
"""Of a card's peak that large matrix products reach, where that was not measured: 0.80 on an H200."""
EFFICIENCY = 0.35
"""Of that ceiling, what forwards and updates reached on an H200: 0.33 to 0.39 for three models (docs/performance.md)."""
COMPILED = 1.15
"""How much faster ``model.compile=blocks`` is: an update on an H200, before rollouts ran its graphs, too."""
DECODING_IMAGE, DECODING_CLIP = 0.045, 0.18
"""Of the ceiling, what decoding in bf16 reached there: of an image of 720 x 720, and of clips in tiles."""
NODE = 8
"""GPUs of a node."""
NETWORK = 50e9
"""Bytes a second that a GPU sends to other nodes while it receives as many: 400 Gbit/s each."""


@dataclass(frozen=True)
class Work:
    """What one GPU does in an iteration.

    Attributes:
        drawing, referring, trained: passes of the network of one sample and text: of the rollout, in the update without a
            backward pass (the reference's, a text that gets no gradients), and with one.
        drawn: samples it decodes.
        sent: what -> bytes that it sends in the rollout; ``sent_updating``: likewise in the update.
    """

    drawing: float
    referring: float
    trained: float
    drawn: float
    sent: dict[str, float]
    sent_updating: dict[str, float]


@dataclass(frozen=True)
class RunCost:
    """Seconds of an iteration on ``ranks`` GPUs, rewards, evaluations and pictures not counted."""

    card: Card
    ranks: int
    iterations: int
    sampling: float
    decoding: float
    updating: float
    exchange: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of an iteration."""
        return self.sampling + self.decoding + self.updating + sum(self.exchange.values())

    @property
    def hours(self) -> float:
        """Of the run."""
        return self.seconds * self.iterations / 3600


def ceiling(card: Card, precision: str) -> float:
    """Operations a second of large matrix products."""
    return card.ceiling.get(precision, CEILING * card.peak[precision])


def run_cost(trainer: type[Any], config: Config, facts: ModelFacts, ranks: int, card: Card) -> RunCost:
    """What a run will take on ``ranks`` such cards.

    Args:
        trainer: the model's :class:`~fastvideo_grpo.trainers.base.GRPOTrainer`.
    """
    operations = count_operations(trainer, config, facts)
    decoding = count_decoding(config, facts)
    return cost_of(config, facts, ranks, card, operations, decoding)


def cost_of(config: Config, facts: ModelFacts, ranks: int, card: Card, operations: Operations, decoding: float) -> RunCost:
    """Likewise, of counted operations; ``decoding``: of a sample."""
    work = _work(config, facts, ranks)
    rate = EFFICIENCY * ceiling(card, config.model.precision) * (COMPILED if config.model.compile != "none" else 1.0)
    # Convolutions of a VAE wait for memory: in float32 twice as long.
    share = DECODING_CLIP if config.sample.frames > 1 else DECODING_IMAGE
    decoded = share * ceiling(card, "bf16") * (0.5 if config.model.vae_precision == "fp32" else 1.0)
    inside = ranks <= NODE
    between = card.link if inside else NETWORK
    exchange: dict[str, float] = {}
    for sent in (work.sent, work.sent_updating):
        for what, count in sent.items():
            link = card.link if what == _TOKENS and config.engine.sequence_parallel <= NODE else between
            exchange[what] = exchange.get(what, 0.0) + count / link
    each = operations.forward + operations.backward + operations.recomputed
    return RunCost(
        card,
        ranks,
        config.run.iterations,
        work.drawing * operations.forward / rate,
        work.drawn * decoding / decoded,
        (work.trained * each + work.referring * operations.forward) / rate,
        exchange,
    )


_WEIGHTS, _GRADIENTS, _TOKENS = "weights", "gradients", "tokens"


def _work(config: Config, facts: ModelFacts, ranks: int) -> Work:
    grpo, engine, sample = config.grpo, config.engine, config.sample
    guidance = guidance_of(config)
    passes, trained_passes = (2 if scale > 1 else 1 for scale in (guidance.rollout, guidance.training))
    batched = config.model.cfg_batched  # else a pass of its own for each text
    dealt = dealing(config, ranks // engine.sequence_parallel)
    drawn = sum(len(members) for _, members in dealt.rollout_batches(0))
    batches = [batch for update in range(grpo.updates_per_iteration) for batch in dealt.update_batches(update, 0)]
    drawing, idle = drawing_of(config, dealt, 0), idle_of(config, dealt, 0)
    run_steps = RunSteps(config)
    transitions = len(batches) * run_steps.trained
    rows = transitions * engine.micro_batch_size
    constant = trained_passes == 2 and not batched and grpo.cfg_gradients == "conditional"
    trained = rows * (1 if constant else trained_passes)
    others_asked = make_objective(config).needs_reference + len(run_steps.stored)
    referring = rows * (1 if constant else 0) + rows * trained_passes * others_asked

    stage = engine.zero_stage if engine.kind == "deepspeed" else 0
    if stage == 0 and engine.kind == "deepspeed" and config.model.precision == "bf16":
        stage = 1  # as the engine does it
    trainable, total = count_parameters(config, facts)
    size = DTYPES[config.model.precision].itemsize
    others = (ranks - 1) / ranks
    steps = grpo.updates_per_iteration
    calls, trained_calls = (1 if batched else each for each in (passes, trained_passes))  # of the network, for a prediction
    sent: dict[str, float] = {}
    updating: dict[str, float] = {}
    if ranks > 1:
        whole = 4.0 * trainable * others  # gradients are float32
        updating[_GRADIENTS] = {0: 2 * steps * whole, 1: steps * whole}.get(stage, transitions * whole)
        if stage == 3:
            recomputed = checkpointed_blocks(engine.activation_checkpointing) > 0
            gathered = size * total * others
            sent[_WEIGHTS] = (drawing.predictions + idle) * calls * gathered
            updating[_WEIGHTS] = transitions * trained_calls * ((3 if recomputed else 2) + others_asked) * gathered
        elif stage:
            updating[_WEIGHTS] = steps * size * trainable * others
    shared = engine.sequence_parallel
    if shared > 1:
        # Ulysses: in each block's attention queries, keys, values and the result change from tokens to heads or back.
        family = FAMILIES[config.model.kind]
        local = math.ceil(family.image_tokens(facts, sample) / shared) * facts.hidden_width * size
        blocks = sum(int(facts.denoiser.get(layers) or 0) for layers in LAYERS[:2])
        once = 4 * blocks * local * (shared - 1) / shared
        sent[_TOKENS] = drawing.samples * passes * once
        again = 3 if checkpointed_blocks(engine.activation_checkpointing) else 2
        updating[_TOKENS] = (trained * again + referring) * once
    return Work((drawing.samples + idle) * passes, referring, trained, drawn, sent, updating)


def describe_cost(cost: RunCost, config: Config, needed: float) -> list[str]:
    """Lines for a person, each assumption among them; ``needed``: bytes on each card at the worst moment, by the estimate."""
    card, precision = cost.card, config.model.precision
    measured = precision in card.ceiling
    top = ceiling(card, precision) / 1e12
    exchanged = sum(cost.exchange.values())
    parts = ", ".join(f"{what} {_seconds(spent)}" for what, spent in cost.exchange.items())
    lines = [
        f"time         {_seconds(cost.seconds)} an iteration on {cost.ranks} {card.name}, without rewards, evaluations and "
        "pictures",
        f"  rollout    {_seconds(cost.sampling)} of sampling, {_seconds(cost.decoding)} of decoding",
        f"  update     {_seconds(cost.updating)}",
        *([f"  exchange   {_seconds(exchanged)} ({parts}), none of it hidden behind computing"] if exchanged else []),
        f"  run        {cost.iterations} iterations: {cost.hours:.1f} hours, {cost.hours * cost.ranks:.0f} GPU-hours",
        f"  assumed    {top:.0f} TFLOP/s of large matrix products in {precision} "
        + ("(measured)" if measured else f"({CEILING:g} of the datasheet's {card.peak[precision] / 1e12:.0f}; 0.80 on an H200)")
        + f"; forwards and updates reach {EFFICIENCY:g} of it, decoding "
        f"{DECODING_CLIP if config.sample.frames > 1 else DECODING_IMAGE:g} in bf16, as on an H200",
    ]
    if config.model.compile != "none":
        lines.append(f"  assumed    compiled blocks are {COMPILED:g} times as fast, as an update was on an H200")
    if exchanged:
        where = f"{card.link / 1e9:.0f} GB/s to each side within a node of {NODE}"
        if cost.ranks > NODE:
            where += f", {NETWORK / 1e9:.0f} GB/s a GPU between nodes"
        lines.append(f"  assumed    {where}")
    if config.engine.offload != "none" or config.engine.offload_idle:
        lines.append("  assumed    what goes to the host and back takes no time, nor AdamW's step there")
    if needed > card.memory:
        lines.append(
            f"note         {gib(needed)} of memory are needed by the estimate, and a {card.name} has {gib(card.memory)}"
        )
    return lines


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 20 else f"{value:.1f} s" if value >= 1 else f"{value:.2g} s"
