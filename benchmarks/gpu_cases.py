"""Published sizes on one GPU: ratio, seconds, share of the card, and memory against the estimate.

    python benchmarks/gpu_cases.py [CASE ...] [--minutes 8] [--out runs/gpu] [--list]
    python benchmarks/gpu_cases.py --device cpu [CASE ...]        # the same steps on tiny checkpoints, to try the script

A case is a model at a size, and how it is run: flux_720:compiled:mb2 is flux_720 with compiled blocks in micro-batches of two;
:flash with flash-attn. Each runs in a process of its own with a time limit, in bf16, two iterations of one prompt: the first
makes AdamW's state (and compiles), the second is measured. Weights are random: files of the published size without content
(sparse), filled on the device. Rows are printed as they come and written to OUT/gpu_cases.json and .md; the exit code is 1
where a ratio before the first optimiser step is not exactly 1, or a case failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from case_runner import Results, Row, format_gib, print_numbers, run_case
from machine import find_machine
from measuring import Peak, rollout_with_advantages, seconds_of, wait

PROMPT = "a red circle moving left"


@dataclass(frozen=True)
class Case:
    """A published model at a size; ``settings``: keys of the configuration. ``seconds``: that it may take on an H100."""

    kind: str
    settings: dict[str, Any]
    seconds: int = 150
    text_tokens: int = 512
    default: tuple[str, ...] = ()  # ways of running it, as behind its name, that run where no case is named


_FLUX = {"model.lora.rank": 128, "model.lora.alpha": 256, "sample.guidance_scale": 3.5, "sample.steps": 6, "grpo.group_size": 4}
_WAN = {"sample.cfg_scale": 5.0, "model.cfg_batched": True, "sample.steps": 4, "grpo.group_size": 2}
_HUNYUAN = {
    "model.lora.rank": 64,
    "model.lora.alpha": 64,
    "sample.guidance_scale": 6.0,
    "sample.steps": 4,
    "grpo.group_size": 2,
}
_CLIP = {"sample.vae_tiling": True, "engine.activation_checkpointing": "full"}

CASES = {
    "flux_720": Case("flux", {**_FLUX, "sample.height": 720, "sample.width": 720}, default=("", ":compiled")),
    "flux_1024": Case("flux", {**_FLUX, "sample.height": 1024, "sample.width": 1024}),
    "sd": Case(
        "stable_diffusion",
        {
            "sample.height": 512,
            "sample.width": 512,
            "sample.steps": 8,
            "sample.cfg_scale": 5.0,
            "model.cfg_batched": True,
            "sample.transition": "ddim",
            "sample.noise_level": 1.0,
            "grpo.group_size": 8,
            "engine.micro_batch_size": 8,
        },
        text_tokens=77,
        default=("",),
    ),
    "wan_image": Case("wan", {**_WAN, "sample.height": 480, "sample.width": 832, "sample.frames": 1}),
    "wan_clip": Case("wan", {**_WAN, **_CLIP, "sample.height": 480, "sample.width": 832, "sample.frames": 33}, default=("",)),
    "hunyuan_image": Case(
        "hunyuan_video", {**_HUNYUAN, "sample.height": 480, "sample.width": 480, "sample.frames": 1}, text_tokens=64
    ),
    "hunyuan_clip": Case(
        "hunyuan_video",
        {**_HUNYUAN, **_CLIP, "sample.height": 480, "sample.width": 480, "sample.frames": 53},
        seconds=200,
        text_tokens=64,
    ),
}
WAYS = ("compiled", "flash", "mb1", "mb2", "mb4", "mb8")
ON_CPU = {"sample.height": 64, "sample.width": 64}
# Columns of the table.
TIMED = ("forward", "forward and backward", "rollout a sample and step", "update a sample and timestep", "decode")
PHASES = ("forward", "rollout", "update")


def main() -> int:
    """Run the cases, say what they said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: those that fit ten minutes; --list names all")
    parser.add_argument("--minutes", type=float, default=8.0, help="all cases together; what does not fit in is named")
    parser.add_argument("--out", type=Path, help="folder of the results (without it the table is only printed)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cpu: tiny checkpoints; the default without a GPU")
    parser.add_argument("--list", action="store_true", help="name the cases and the ways to run them")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        measure(arguments.worker, arguments.device)
        return 0
    default = [name + way for name, case in CASES.items() for way in case.default]
    if arguments.list:
        print(f"cases: {', '.join(CASES)}\nways: {', '.join(f':{way}' for way in WAYS)}\ndefault: {' '.join(default)}")
        return 0
    names = arguments.cases or default
    for name in names:
        try:
            settings_of(name)
        except ValueError as error:
            parser.error(str(error))
    machine = find_machine(arguments.device)
    share = f"of {machine.ceiling} TFLOP/s" if machine.ceiling else "TFLOP/s"
    header = [
        "ratio - 1",
        *(f"s: {name}" for name in TIMED),
        *(f"{name}, {share}" for name in PHASES),
        "GiB: peak, measured / estimate",
    ]
    about = f"{'Published sizes' if machine.device == 'cuda' else 'Tiny checkpoints'}, random weights, bf16"
    row = partial(cells, ceiling=machine.ceiling or 1.0)
    results = Results("gpu_cases", machine, about, header, row, arguments.out)
    deadline = time.monotonic() + 60 * arguments.minutes
    for name in names:
        results.add(try_case(name, machine.device, deadline - time.monotonic()))
    return results.exit_code()


def settings_of(name: str) -> tuple[Case, dict[str, Any]]:
    """The case of ``NAME[:WAY ...]`` and its configuration.

    Raises:
        ValueError: there is none of this name, or no such way to run it.
    """
    base, *ways = name.split(":")
    if base not in CASES:
        raise ValueError(f"there is no case {base!r}; there are {', '.join(CASES)}")
    case = CASES[base]
    settings = dict(case.settings)
    for way in ways:
        if way not in WAYS:
            raise ValueError(f"{name}: there is no way {way!r}; there are {', '.join(WAYS)}")
        if way == "compiled":
            settings["model.compile"] = "blocks"
        elif way == "flash":
            settings["model.attention"] = "flash"
        else:
            size = int(way.removeprefix("mb"))
            settings |= {"engine.micro_batch_size": size, "grpo.group_size": max(size, settings["grpo.group_size"])}
            if size > 1 and case.kind != "stable_diffusion":
                settings["engine.activation_checkpointing"] = "full"
    return case, settings


def try_case(name: str, device: str, seconds: float) -> Row:
    """A case, if there is time and what it needs."""
    case, settings = settings_of(name)
    if settings.get("model.attention") == "flash" and not importlib.util.find_spec("flash_attn"):
        return Row(name, error="left out: flash-attn is not installed", left_out=True)
    command = [str(Path(__file__).resolve()), "--worker", name, "--device", device]
    return run_case(name, command, device, min(seconds, case.seconds if device == "cuda" else 600))


def cells(numbers: dict[str, Any], ceiling: float) -> list[str]:
    """A row of the table."""
    return [
        f"{numbers['ratio deviation']:.1g}",
        *(f"{numbers['seconds'][name]:.3g}" for name in TIMED),
        *(f"{numbers['TFLOP/s'][phase] / ceiling:.2g}" for phase in PHASES),
        format_gib(*numbers["memory"]["peak"]),
    ]


@contextmanager
def made_checkpoint(kind: str, device: str) -> Iterator[Path]:
    """A folder of the published sizes whose weights are files without content; on a CPU the tiny checkpoint."""
    from fastvideo_grpo import cli
    from fastvideo_grpo.models.registry import FAMILIES

    family = FAMILIES[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        assert cli.main(["tiny", kind, "--out", str(path)]) == 0
        if device == "cuda":
            _write_network(path / family.denoiser, family.configs[family.denoiser])
            _write_vae(path / "vae", family.configs["vae"])
        yield path


def _write_network(folder: Path, published: dict[str, Any]) -> None:
    from fastvideo_grpo.models.networks import diffusers_denoiser

    config = {**json.loads((folder / "config.json").read_text()), **published}
    if "axes_dims_rope" in config:  # of FLUX: it follows from the heads, and the tiny one has others
        config["axes_dims_rope"] = [16, 56, 56]
    module = diffusers_denoiser(config)
    for file in folder.iterdir():
        file.unlink()
    written = {key: value for key, value in {**module.config}.items() if not key.startswith("_")}
    (folder / "config.json").write_text(json.dumps({**written, "_class_name": config["_class_name"]}, default=str))
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    write_sparse(folder / "diffusion_pytorch_model.safetensors", shapes)


def write_sparse(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bf16 zeros that takes no room on the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


def _write_vae(folder: Path, published: dict[str, Any]) -> None:
    import diffusers
    import torch

    config = {**json.loads((folder / "config.json").read_text()), **published}
    torch.manual_seed(0)
    vae = getattr(diffusers, config["_class_name"]).from_config(config)
    for file in folder.iterdir():
        file.unlink()
    vae.save_pretrained(folder)


def load_config(case: Case, settings: dict[str, Any], checkpoint: Path, folder: Path, device: str) -> Any:
    """The run's configuration."""
    from fastvideo_grpo.models import run_config

    (folder / "prompts.txt").write_text(PROMPT + "\n")
    (folder / "empty.yaml").write_text("{}")
    values: dict[str, Any] = {
        "model.kind": case.kind,
        "model.path": checkpoint,
        "model.precision": "bf16",
        "model.vae_precision": "bf16",
        "prompts.path": folder / "prompts.txt",
        "prompts.text_length": case.text_tokens if case.kind != "hunyuan_video" else 256,
        "grpo.prompts_per_iteration": 1,
        "grpo.updates_per_iteration": 1,
        "rewards.models.size.kind": "jpeg_size",
        "run.dir": folder / "run",
        "run.iterations": 1,
        "run.eval_every": 0,
        "run.sample_every": 0,
        **settings,
    }
    if device == "cpu":
        values |= ON_CPU
        values |= {"sample.frames": 5} if values.get("sample.frames", 1) > 1 else {}
        values |= {"model.lora.rank": 4, "model.lora.alpha": 4} if "model.lora.rank" in values else {}
        values["prompts.text_length"] = 77 if case.kind == "stable_diffusion" else 256 if case.kind == "hunyuan_video" else 32
    return run_config.load(folder / "empty.yaml", [f"{key}={value}" for key, value in values.items()])


def measure(name: str, device: str) -> None:
    """The case, in this process."""
    import torch

    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.trainers.load import trainer_class

    case, settings = settings_of(name)
    with ExitStack() as held:
        checkpoint = held.enter_context(made_checkpoint(case.kind, device))
        folder = held.enter_context(tempfile.TemporaryDirectory())
        config = load_config(case, settings, checkpoint, Path(folder), device)
        torch.set_num_threads(torch.get_num_threads() if device == "cuda" else 1)
        trainer = trainer_class(case.kind)(config, World.current(device), with_text_encoders=False)
        held.enter_context(closing(trainer))  # at the end of the program it could not be
        if device == "cuda":
            _fill(trainer.denoiser)
        _give_embeddings(trainer, case.text_tokens if device == "cuda" else 16)
        trainer.setup_training()
        print_numbers(measure_trainer(trainer))


def measure_trainer(trainer: Any) -> dict[str, Any]:
    """Two iterations, and passes by themselves."""
    import torch

    from fastvideo_grpo.planning import memory, plan
    from fastvideo_grpo.planning.operations import count_operations
    from fastvideo_grpo.tracking.statistics import FORWARD, TRAINED, Clock

    config, facts, place = trainer.config, trainer.facts, trainer.world.device
    start = time.perf_counter()
    rollout, advantages = rollout_with_advantages(trainer, 0, Clock())
    first = trainer.update(0, rollout, advantages, trainer.select(advantages), Clock())
    wait(place)
    first_seconds = time.perf_counter() - start
    clock = Clock(passes=trainer.passes)
    with Peak(place) as iteration:
        rollout, advantages = rollout_with_advantages(trainer, 1, clock)
        metrics = trainer.update(1, rollout, advantages, trainer.select(advantages), clock)

    size = config.engine.micro_batch_size
    sample = trainer.pack(torch.randn(size, *trainer.latent_shape())).to(place)
    level = trainer.schedule.at(torch.zeros(size, dtype=torch.long))
    conditioning = trainer.conditioning(trainer.run.prompts[0], size)

    def forward() -> None:
        with torch.no_grad(), trainer.pass_context(conditioning):
            trainer.predict(sample, level, conditioning)

    def forward_without_gradients() -> None:
        """The graph that torch would compile for it alone, which rounds otherwise."""
        with torch.no_grad(), trainer.pass_context(conditioning):
            trainer._predict_rows(sample, level, conditioning)

    def update() -> None:
        with trainer.pass_context(conditioning):
            trainer.predict(sample, level, conditioning).float().square().mean().backward()

    once = count_operations(type(trainer), config, facts)
    count = config.grpo.group_size
    drawn, trained = clock.passes["rollout"], clock.passes["update"]
    done = {
        "rollout": once.forward * drawn[FORWARD],
        "update": once.forward * (trained[FORWARD] + trained[TRAINED]) + once.backward * trained[TRAINED],
    }
    predictions = 2 if config.sample.cfg_scale > 1 else 1
    seconds = {
        "forward": seconds_of(forward, 4, place) / size,
        "forward and backward": seconds_of(update, 3, place) / size,
        "decode": seconds_of(lambda: trainer.decode(sample[:1]), 1, place),
        "rollout a sample and step": clock.seconds["rollout"] / count / config.sample.steps,
        "update a sample and timestep": clock.seconds["update"] * predictions / trained[TRAINED],
        "first iteration": first_seconds,
    }
    if trainer.compiled:
        seconds["forward, graph without gradients"] = seconds_of(forward_without_gradients, 4, place) / size
    config.prompts.text_length = conditioning["encoder_hidden_states"].shape[1]
    planned = memory.estimate(config, facts, 1, plan.count_parameters(config, facts))
    deviations = [each["train/ratio_first_update_max_dev"] for each in (first, metrics)]
    result = {
        "ratio deviation": max(deviations, key=lambda value: (math.isnan(value), value)),
        "grad norm": metrics["train/grad_norm"],
        "seconds": {key: round(value, 4) for key, value in seconds.items()},
        "TFLOP": {
            "forward": predictions * once.forward / 1e12,
            "backward": predictions * once.backward / 1e12,
            "recomputed": predictions * once.recomputed / 1e12,
        },
        "TFLOP/s": {
            "forward": predictions * once.forward / seconds["forward"] / 1e12,
            "rollout": done["rollout"] / clock.seconds["rollout"] / 1e12,
            "update": done["update"] / clock.seconds["update"] / 1e12,
        },
        "memory": {"resident": [iteration.held, sum(planned.resident.values())], "peak": [iteration.peak, planned.peak]},
    }
    if trainer.compilations is not None:
        result["compilations"] = [(each.function, round(each.seconds, 1)) for each in trainer.compilations.new()]
    return result


def _give_embeddings(trainer: Any, tokens: int) -> None:
    """Random ones, of so many tokens where the network reads a text's own."""
    import torch

    from fastvideo_grpo.models.registry import FAMILIES

    family, config = FAMILIES[trainer.config.model.kind], trainer.config
    length = tokens if family.texts_differ_in_length else config.prompts.text_length
    shapes = family.conditioning_shapes(trainer.facts, config.sample, length)
    made: dict[str, Any] = {}

    def encoded(prompt: Any) -> Any:
        generator = torch.Generator().manual_seed(len(made))
        if prompt.text not in made:
            made[prompt.text] = {name: torch.randn(1, *shape, generator=generator) for name, shape in shapes.items()}
        return made[prompt.text]

    trainer._encoded = encoded


def _fill(module: Any) -> None:
    """Weights as of a network at its start; adapters stay as they are."""
    import torch

    with torch.no_grad():
        generator = torch.Generator(device=next(module.parameters()).device).manual_seed(0)
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                continue
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") or "norm" in name else 0.0)


if __name__ == "__main__":
    sys.exit(main())
