"""The tables of docs/scaling.md: memory by the estimate of ``train --dry-run``, from the published sizes alone.

    python benchmarks/scaling_table.py [--part choice settings full lora time trajectories] [--write docs/scaling.md]

Nothing is measured here and no weights are needed. ``--write`` puts the tables between the file's markers. The parts "lora" and
"time" import FastVideo, to count HunyuanVideo's adapters and the operations of networks.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fastvideo_grpo.config.checks import check
from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.planning.cards import card_of
from fastvideo_grpo.planning.cost import RunCost, cost_of
from fastvideo_grpo.planning.memory import MemoryEstimate, estimate
from fastvideo_grpo.planning.operations import Operations, count_decoding, count_operations
from fastvideo_grpo.planning.plan import count_parameters
from fastvideo_grpo.trainers.load import trainer_class

CONFIGS = Path(__file__).parents[1] / "train_scripts" / "configs"
GIB = 2**30
GPUS = (8, 16, 32, 64)
PER_NODE = 8
CARDS = (24, 40, 48, 80, 141)
RANK = 128
LORA = {"model.lora.rank": RANK, "model.lora.alpha": 2 * RANK}
# What the recipes set: every block recomputed, the VAE off the device while it is not used, embeddings cached.
ALWAYS = {
    "engine.kind": "deepspeed",
    "engine.offload_idle": True,
    "engine.micro_batch_size": 1,
    "prompts.embeddings": "embeddings",
    "rewards.models.size.kind": "jpeg_size",
    "prompts.path": "prompts.txt",
    "run.dir": "run",
}


@dataclass(frozen=True)
class Size:
    """A model at a size, with what its recipe draws in an iteration."""

    kind: str
    width: int
    height: int
    frames: int
    text_length: int
    prompts: int
    group: int
    updates: int
    steps: int = 16

    @property
    def name(self) -> str:
        clip = f" x {self.frames} frames" if self.frames > 1 else ""
        return f"{FAMILIES[self.kind].name}, {self.width} x {self.height}{clip}"

    @property
    def settings(self) -> dict[str, object]:
        video = {"sample.vae_tiling": True, "model.vae_precision": "bf16"} if self.frames > 1 else {}
        return {
            **ALWAYS,
            **video,
            "model.kind": self.kind,
            "model.path": f"published/{self.kind}",
            "prompts.text_length": self.text_length,
            "sample.width": self.width,
            "sample.height": self.height,
            "sample.frames": self.frames,
            "sample.steps": self.steps,
            "grpo.prompts_per_iteration": self.prompts,
            "grpo.group_size": self.group,
            "grpo.updates_per_iteration": self.updates,
        }


IMAGE, CLIP, LARGE = (
    Size("hunyuan_video", 480, 480, 1, 256, 16, 12, 4),
    Size("hunyuan_video", 480, 480, 53, 256, 32, 24, 2),
    Size("hunyuan_video", 1280, 720, 129, 256, 32, 24, 2),
)
FLUX, FLUX_LARGE = Size("flux", 720, 720, 1, 512, 16, 12, 4), Size("flux", 1024, 1024, 1, 512, 16, 12, 4)
FROM_IMAGE = Size("skyreels_i2v", 640, 400, 53, 256, 32, 8, 1)
SIZES = (FLUX, FLUX_LARGE, IMAGE, CLIP, LARGE, FROM_IMAGE)


@dataclass(frozen=True)
class Way:
    """How the work is spread: ZeRO stage, processes to a sample, what is offloaded, what is recomputed."""

    stage: int
    shared: int = 1
    offload: str = "none"
    recomputed: str = "full"

    @property
    def settings(self) -> dict[str, Any]:
        """Keys of ``engine``."""
        return {
            "zero_stage": self.stage,
            "sequence_parallel": self.shared,
            "offload": self.offload,
            "activation_checkpointing": self.recomputed,
        }

    @property
    def words(self) -> str:
        parts = [f"ZeRO {self.stage}"]
        parts += [f"SP {self.shared}"] if self.shared > 1 else []
        parts += [f"offload {self.offload}"] if self.offload != "none" else []
        parts += ["nothing recomputed"] if self.recomputed == "none" else []
        return ", ".join(parts)

    @property
    def cells(self) -> str:
        return f"| {self.recomputed} | {self.stage} | {self.offload} | {self.shared} "


# Rows worth reading: of an image, sharing tokens saves next to nothing; of a long clip, the activations are what is in the way.
IMAGE_WAYS = (
    Way(2, recomputed="none"),
    Way(3, recomputed="none"),
    Way(1),
    Way(2),
    Way(2, offload="optimizer"),
    Way(3),
    Way(3, offload="optimizer"),
    Way(3, offload="parameters"),
)
CLIP_WAYS = (
    Way(3, shared=4, recomputed="none"),
    Way(3, shared=8, recomputed="none"),
    Way(1),
    Way(2),
    Way(2, shared=4),
    Way(2, offload="optimizer"),
    Way(2, shared=4, offload="optimizer"),
    *(Way(3, shared=n) for n in (1, 2, 4, 8)),
    Way(3, shared=4, offload="optimizer"),
    Way(3, shared=4, offload="parameters"),
    Way(3, shared=8, offload="parameters"),
)
# From the fastest to the slowest, as docs/scaling.md reasons.
CHEAPEST = (
    Way(2, recomputed="none"),
    Way(2),
    *(Way(2, shared=n) for n in (2, 4, 8)),
    *(Way(3, shared=n) for n in (1, 2, 4, 8)),
    *(Way(3, shared=n, offload="optimizer") for n in (1, 2, 4, 8)),
    *(Way(3, shared=n, offload="parameters") for n in (1, 2, 4, 8)),
)
LORA_IMAGE_WAYS = (Way(2, recomputed="none"), Way(2), Way(3))
LORA_CLIP_WAYS = (Way(2), Way(2, shared=4), Way(3), Way(3, shared=8))


@cache
def _loaded(size: Size, lora: bool) -> tuple[Config, ModelFacts, tuple[int, int]]:
    values = {**size.settings, **(LORA if lora else {})}
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.yaml"
        empty.write_text("{}")
        config = run_config.load(empty, [f"{key}={value}" for key, value in values.items()])
    family = FAMILIES[size.kind]
    facts = ModelFacts(family.name, family.configs, family.denoiser)
    return config, facts, count_parameters(config, facts)


def planned(size: Size, way: Way, gpus: int, lora: bool = False) -> MemoryEstimate:
    """The estimate for one process of so many."""
    config, facts, parameters = _loaded(size, lora)
    config = replace(config, engine=replace(config.engine, **way.settings))
    check(config, FAMILIES.names())
    return estimate(config, facts, gpus, parameters)


def usable(card: int) -> float:
    """What the tables take a card of so many GB to have, in bytes: 10 % are left to the allocator, 4 GB to NCCL, CUDA's context
    and DeepSpeed's buffers (some 2 GB for gradients under way, and with ZeRO-3 2 GB of weights kept gathered)."""
    return (0.9 * card - 4) * GIB


def smallest_card(peak: float) -> str:
    """The smallest card on which this peak fits."""
    return next((str(card) for card in CARDS if peak <= usable(card)), "-")


def number(size: float) -> str:
    """GiB, short."""
    return f"{size / GIB:.1f}" if size < 100 * GIB else f"{size / GIB:.0f}"


def choice() -> str:
    """The first way, from the fastest to the slowest, that fits each card."""
    lines = [
        "| size | GPUs | " + " | ".join(f"{card} GB" for card in CARDS) + " |",
        "|---|---|" + "---|" * len(CARDS),
    ]
    for size in SIZES:
        for gpus in GPUS[::2]:
            fitting = [next((w for w in CHEAPEST if _fits(size, w, gpus, card)), None) for card in CARDS]
            cells = " | ".join("-" if way is None else way.words for way in fitting)
            lines.append(f"| {size.name} | {gpus} | {cells} |")
    return "\n".join(lines)


def _fits(size: Size, way: Way, gpus: int, card: int) -> bool:
    useful = way.shared == 1 or size.frames > 1
    return useful and planned(size, way, gpus).peak <= usable(card)


def full() -> str:
    """Full weights: peak and smallest card of every size, way and number of GPUs."""
    return "\n\n".join(_full(size) for size in SIZES)


def _full(size: Size) -> str:
    config, facts, _ = _loaded(size, False)
    tokens = FAMILIES[size.kind].image_tokens(facts, config.sample)
    rows = CLIP_WAYS if size.frames > 1 else IMAGE_WAYS
    columns = " | ".join(f"{gpus} GPUs" for gpus in GPUS)
    return "\n".join(
        [
            f"**{size.name}** ({tokens:,} tokens)",
            "",
            f"| recomputed | ZeRO | offload | SP | {columns} |",
            "|---|---|---|---|" + "---|" * len(GPUS),
            *(f"{way.cells}{_peaks(size, way, lora=False)}|" for way in rows),
        ]
    )


def lora() -> str:
    """The same with adapters, all sizes in one table."""
    columns = " | ".join(f"{gpus} GPUs" for gpus in GPUS)
    rows = [(size, way) for size in SIZES for way in (LORA_CLIP_WAYS if size.frames > 1 else LORA_IMAGE_WAYS)]
    return "\n".join(
        [
            f"| size | recomputed | ZeRO | offload | SP | {columns} |",
            "|---|---|---|---|---|" + "---|" * len(GPUS),
            *(f"| {size.name} {way.cells}{_peaks(size, way, lora=True)}|" for size, way in rows),
        ]
    )


def _peaks(size: Size, way: Way, *, lora: bool) -> str:
    peaks = [planned(size, way, gpus, lora).peak for gpus in GPUS]
    return "".join(f"| {number(peak)} ({smallest_card(peak)}) " for peak in peaks)


def settings() -> str:
    """What each switch changes, one after the other: HunyuanVideo's clip on 8 GPUs."""
    steps = (
        ("ZeRO 2, nothing recomputed", Way(2, recomputed="none")),
        ("every block recomputed", Way(2)),
        ("ZeRO 3", Way(3)),
        ("4 GPUs to a clip", Way(3, shared=4)),
        ("optimiser on the host", Way(3, shared=4, offload="optimizer")),
        ("weights on the host too", Way(3, shared=4, offload="parameters")),
    )
    lines = [
        f"**{CLIP.name}** on {PER_NODE} GPUs, full weights; GiB on each device, host GiB of the node",
        "",
        "| one more each time | always there | encode | rollout | decode | update | peak | fits | host, a node |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, way in steps:
        memory = planned(CLIP, way, PER_NODE)
        phases = " | ".join(number(memory.phases[phase]) for phase in ("encode", "rollout", "decode", "update"))
        lines.append(
            f"| {name} | {number(sum(memory.resident.values()))} | {phases} | {number(memory.peak)} | "
            f"{smallest_card(memory.peak)} | {number(_on_node(memory, way))} |"
        )
    return "\n".join(lines)


def _on_node(memory: MemoryEstimate, way: Way) -> float:
    """Bytes of host memory on a node: the trajectories lie with the leaders alone."""
    parts = {name: value * PER_NODE for name, value in memory.host.items()}
    parts["trajectories"] /= way.shared
    return sum(parts.values())


PAPER = {
    "flux_t2i_paper": 32,
    "flux_t2i_paper_lora": 8,
    "hunyuan_t2i_paper": 32,
    "hunyuan_t2v_paper_vq": 64,
    "hunyuan_t2v_paper_vq_zero3": 64,
    "skyreels_i2v_paper": 32,
    "wan_t2v_paper": 32,
    "stable_diffusion_t2i_paper": 8,
}
"""Recipe of the paper's settings -> the GPUs that it is for."""


def recipe_cost(recipe: str, gpus: int, **engine: Any) -> RunCost:
    """What a recipe takes on H100s; ``engine``: keys that it has otherwise."""
    overrides = [f"engine.{key}={value}" for key, value in engine.items()]
    config = run_config.load(CONFIGS / f"{recipe}.yaml", overrides)
    facts = model_facts(config, published_if_missing=True)
    operations = _operations(recipe, config, facts)
    return cost_of(config, facts, gpus, card_of("h100"), *operations)


_counted: dict[str, tuple[Operations, float]] = {}


def _operations(recipe: str, config: Config, facts: ModelFacts) -> tuple[Operations, float]:
    """Of a pass and of a decoding; the ZeRO stage changes neither."""
    if recipe not in _counted:
        trainer = trainer_class(config.model.kind)
        _counted[recipe] = count_operations(trainer, config, facts), count_decoding(config, facts)
    return _counted[recipe]


def time() -> str:
    """Seconds of an iteration and GPU-hours of the recipes with the paper's settings."""
    lines = [
        "| recipe | H100 | sampling | decoding | update | exchange | an iteration | 300 iterations, GPU-hours | with ZeRO 1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe, gpus in PAPER.items():
        cost, first = recipe_cost(recipe, gpus), recipe_cost(recipe, gpus, zero_stage=1)
        seconds = (cost.sampling, cost.decoding, cost.updating, sum(cost.exchange.values()), cost.seconds)
        cells = " | ".join(f"{value:.0f} s" if value >= 10 else f"{value:.1f} s" for value in seconds)
        hours = [f"{each.seconds * 300 / 3600 * gpus:,.0f}" for each in (cost, first)]
        lines.append(f"| `{recipe}` | {gpus} | {cells} | {hours[0]} | {hours[1]} |")
    return "\n".join(lines)


def trajectories() -> str:
    """Host memory of the samples of an iteration."""
    lines = [
        "| size | samples | a sample | GiB a node: "
        + " | ".join(f"{gpus} GPUs" for gpus in GPUS)
        + " | while exchanged, SP 4, "
        + " | ".join(f"{gpus} GPUs" for gpus in GPUS)
        + " |",
        "|---|---|---|" + "---|" * (2 * len(GPUS)),
    ]
    for size in SIZES:
        alone = [planned(size, Way(2), gpus).host["trajectories"] * PER_NODE for gpus in GPUS]
        four = [planned(size, Way(2, shared=4), gpus).host for gpus in GPUS]
        samples = size.prompts * size.group
        one = alone[0] / samples * GPUS[0] / PER_NODE
        fetched = [number(host["trajectories in exchange"] * PER_NODE) for host in four]
        lines.append(
            f"| {size.name} | {size.prompts} x {size.group} | {one / 2**20:.0f} MiB | "
            + " | ".join([*map(number, alone), *fetched])
            + " |"
        )
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {
    "choice": choice,
    "settings": settings,
    "full": full,
    "lora": lora,
    "time": time,
    "trajectories": trajectories,
}


def between_markers(text: str, part: str) -> tuple[int, int]:
    """Where a part's table stands in a document: the span between its two marker lines.

    Raises:
        ValueError: the document has no such markers.
    """
    before, after = f"<!-- {part}: by benchmarks/scaling_table.py -->\n", f"\n<!-- end of {part} -->"
    start, end = text.find(before), text.find(after)
    if start < 0 or end < start:
        raise ValueError(f"the markers {before.strip()} and {after.strip()} are not there, in this order")
    return start + len(before), end


def main() -> None:
    """Print the tables, or write them into a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables between the markers of this file")
    arguments = parser.parse_args()
    os.environ.setdefault("FASTVIDEO_LOGGING_LEVEL", "WARNING")
    for part in arguments.part:
        table = PARTS[part]()
        if arguments.write is None:
            print(f"{table}\n")
            continue
        text = arguments.write.read_text()
        start, end = between_markers(text, part)
        arguments.write.write_text(text[:start] + table + text[end:])


if __name__ == "__main__":
    main()
