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
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIB = 2**30
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


@dataclass
class Row:
    """What a case said: numbers, or why there are none."""

    case: str
    numbers: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def main() -> int:
    """Run the cases, say what they said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: those that fit ten minutes; --list names all")
    parser.add_argument("--minutes", type=float, default=8.0, help="all cases together; what does not fit in is named")
    parser.add_argument("--out", type=Path, help="folder of the results (without it they are only printed)")
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
    device = arguments.device or ("cuda" if _sees_gpu() else "cpu")
    machine = describe_machine(device)
    print(f"machine: {json.dumps(machine)}", flush=True)
    deadline, rows = time.monotonic() + 60 * arguments.minutes, []
    for name in names:
        row = run_case(name, device, deadline)
        rows.append(row)
        print(f"{name}: {row.error or json.dumps(row.numbers)}", flush=True)
        if arguments.out:
            write(arguments.out, machine, rows)
    print("\n" + markdown(machine, rows))
    failed = [row.case for row in rows if row.error and not row.error.startswith("left out")]
    drifted = [row.case for row in rows if not row.error and row.numbers["ratio deviation"] != 0]
    if drifted:
        print(f"the ratio before the first optimiser step is not exactly 1: {', '.join(drifted)}", file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or drifted or all(row.error for row in rows) else 0


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


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def describe_machine(device: str) -> dict[str, Any]:
    """What there is; on a GPU with its measured ceiling, operations a second of a large matrix product in bf16."""
    import torch

    machine: dict[str, Any] = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    if device == "cpu":
        return {**machine, "device": f"{platform.machine()} CPU, tiny checkpoints"}
    if not _sees_gpu():
        sys.exit("torch sees no GPU; --device cpu tries the script")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds = _timed(lambda: a @ a, 10, torch.device("cuda"))
    return {
        **machine,
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "ceiling": round(2 * 8192**3 / seconds / 1e12, 1),
    }


def run_case(name: str, device: str, deadline: float) -> Row:
    """A case in a process of its own."""
    case, settings = settings_of(name)
    left = min(deadline - time.monotonic(), case.seconds if device == "cuda" else 600)
    if left < 30:
        return Row(name, error="left out: no time left (--minutes)")
    if settings.get("model.attention") == "flash" and not importlib.util.find_spec("flash_attn"):
        return Row(name, error="left out: flash-attn is not installed")
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--device", device]
    environment = {**os.environ, "FASTVIDEO_LOGGING_LEVEL": "WARNING"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Row(name, error=f"stopped after {left:.0f} s")
    for line in output.splitlines():
        if line.startswith("RESULT "):
            return Row(name, json.loads(line.removeprefix("RESULT ")))
    return Row(name, error=f"exit code {process.returncode}:\n{output[-3000:]}")


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
    import math

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
    """Two iterations and passes by themselves; ``RESULT`` and JSON."""
    import torch

    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.grpo.advantages import group_advantages
    from fastvideo_grpo.planning import memory, plan
    from fastvideo_grpo.planning.operations import count_operations
    from fastvideo_grpo.tracking.statistics import FORWARD, TRAINED, Clock
    from fastvideo_grpo.trainers.load import trainer_class

    case, settings = settings_of(name)
    with made_checkpoint(case.kind, device) as checkpoint, tempfile.TemporaryDirectory() as folder:
        config = load_config(case, settings, checkpoint, Path(folder), device)
        torch.set_num_threads(torch.get_num_threads() if device == "cuda" else 1)
        trainer = trainer_class(case.kind)(config, World.current(device), with_text_encoders=False)
        place = trainer.world.device
        if device == "cuda":
            _fill(trainer.denoiser)
        _give_embeddings(trainer, case.text_tokens if device == "cuda" else 16)
        trainer.setup_training()

        def iteration(number: int, clock: Clock) -> Any:
            rollout = trainer.rollout(number, list(trainer.run.prompts), clock)
            # Random scores: equal ones would train nothing.
            generator = torch.Generator().manual_seed(number)
            scores = {key: torch.rand(valid.shape, generator=generator) for key, valid in rollout.valid.items()}
            return rollout, group_advantages(scores, rollout.valid, trainer.run.scoring.rewards.weights)

        start = time.perf_counter()
        rollout, advantages = iteration(0, Clock())
        first = trainer.update(0, rollout, advantages, trainer.select(advantages), Clock())
        _wait(place)
        first_seconds = time.perf_counter() - start
        resident = _allocated(place)
        _reset_peak(place)
        clock = Clock(passes=trainer.passes)
        rollout, advantages = iteration(1, clock)
        metrics = trainer.update(1, rollout, advantages, trainer.select(advantages), clock)
        _wait(place)
        peak = _peak(place)

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

        once = count_operations(type(trainer), config, trainer.facts)
        count = config.grpo.group_size
        drawn, trained = clock.passes["rollout"], clock.passes["update"]
        done = {
            "rollout": once.forward * drawn[FORWARD],
            "update": once.forward * (trained[FORWARD] + trained[TRAINED]) + once.backward * trained[TRAINED],
        }
        predictions = 2 if config.sample.cfg_scale > 1 else 1
        seconds = {
            "forward": _timed(forward, 4, place) / size,
            "forward and backward": _timed(update, 3, place) / size,
            "decode": _timed(lambda: trainer.decode(sample[:1]), 1, place),
            "rollout a sample and step": clock.seconds["rollout"] / count / config.sample.steps,
            "update a sample and timestep": clock.seconds["update"] * predictions / trained[TRAINED],
            "first iteration": first_seconds,
        }
        if trainer.compiled:
            seconds["forward, graph without gradients"] = _timed(forward_without_gradients, 4, place) / size
        config.prompts.text_length = conditioning["encoder_hidden_states"].shape[1]
        facts = trainer.facts
        planned = memory.estimate(config, facts, 1, plan.count_parameters(config, facts))
        result = {
            "ratio deviation": max(m["train/ratio_first_update_max_dev"] for m in (first, metrics)),
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
            "memory": {"resident": [resident, sum(planned.resident.values())], "peak": [peak, planned.peak]},
        }
        if trainer.compilations is not None:
            result["compilations"] = [(each.function, round(each.seconds, 1)) for each in trainer.compilations.new()]
        trainer.close()
    print("RESULT " + json.dumps(result), flush=True)


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


def _timed(action: Callable[[], Any], times: int, device: Any) -> float:
    """Seconds of one, after one that is not measured."""
    action()
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        action()
    _wait(device)
    return (time.perf_counter() - start) / times


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: Any) -> int | None:
    import torch

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _peak(device: Any) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _reset_peak(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def write(out: Path, machine: dict[str, Any], rows: list[Row]) -> None:
    """What there is so far."""
    out.mkdir(parents=True, exist_ok=True)
    results = [{"case": row.case, "error": row.error, **row.numbers} for row in rows]
    (out / "gpu_cases.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    (out / "gpu_cases.md").write_text(markdown(machine, rows))


def markdown(machine: dict[str, Any], rows: list[Row]) -> str:
    """The rows for docs/performance.md."""
    timed = ("forward", "forward and backward", "rollout a sample and step", "update a sample and timestep", "decode")
    phases = ("forward", "rollout", "update")
    ceiling = machine.get("ceiling")
    share = f"of {ceiling} TFLOP/s" if ceiling else "TFLOP/s"
    header = ["case", "ratio - 1", *(f"s: {name}" for name in timed), *(f"{name}, {share}" for name in phases), "GiB: peak"]
    versions = f"torch {machine['torch']}" + (f", CUDA {machine['cuda']}" if "cuda" in machine else "")
    lines = [
        f"`python benchmarks/gpu_cases.py`; {machine['device']}, {versions}, {machine['date']}; memory measured / estimate:",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for row in rows:
        if row.error:
            lines.append(f"| {row.case} | {row.error.splitlines()[0]} " + "| " * (len(header) - 2) + "|")
            continue
        numbers = row.numbers
        rates = [numbers["TFLOP/s"][phase] / (ceiling or 1) for phase in phases]
        measured, planned = numbers["memory"]["peak"]
        peak = f"{'-' if measured is None else format(measured / GIB, '.1f')} / {planned / GIB:.1f}"
        cells = [f"{numbers['ratio deviation']:.1g}", *(f"{numbers['seconds'][name]:.3g}" for name in timed)]
        lines.append(f"| {row.case} | " + " | ".join([*cells, *(f"{rate:.2g}" for rate in rates), peak]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
