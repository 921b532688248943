"""What a GPU says: ratio, memory and seconds of an iteration of a random HunyuanVideo, as large as time and memory allow.

    python benchmarks/gpu_phases.py [--minutes 8] [--out runs/gpu] [--processes N] [--device cuda]
    python benchmarks/gpu_phases.py --device cpu --tiny [--processes 2]     # the same on a CPU, to try the script

Width, blocks, frames and pixels are chosen by the estimate of ``train --dry-run`` from what the device has free. Each case
runs in a process of its own, in bf16: one process with sdpa and, where flash-attn is installed, flash; with more than one
GPU all of them under ZeRO 2, ZeRO 3 and with two to a sample. Two iterations of two prompts: the first makes AdamW's state,
the second is measured. Printed, and written to OUT/gpu_phases.json and .md; the exit code is 1 where a ratio before the first
optimiser step is not 1, or a case failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from case_runner import GIB, Results, Row, format_gib, print_numbers, run_case
from machine import Machine, find_machine
from measuring import Peak, rollout_with_advantages, wait
from memory import write_scaled

PHASES = ("rollout", "decode", "update")
PROMPTS = ("a red circle moving left", "a blue square moving right")
GROUP, STEPS, TRAINED = 2, 4, 3
TOLERANCE = 1e-6
TEXT = 32
# Largest first. The transformer: (width, double blocks, single blocks); the sample: (frames, height, width).
MODELS = ((3072, 3, 6), (3072, 2, 4), (2048, 2, 4), (1024, 2, 4), (512, 2, 4))
SAMPLES = (
    (129, 720, 1280),
    (53, 720, 1280),
    (53, 480, 480),
    (33, 480, 480),
    (17, 480, 480),
    (9, 480, 480),
    (1, 480, 480),
    (1, 256, 256),
)
TINY_MODEL, TINY_SAMPLE = (128, 1, 1), (5, 64, 64)
# Columns of the table.
TIMED = ("forward", "decode", "rollout of a sample", "update of a sample")


@dataclass(frozen=True)
class Case:
    """One measurement."""

    checkpoint: str
    folder: str
    device: str
    model: tuple[int, int, int]
    sample: tuple[int, int, int]
    attention: str = "sdpa"
    processes: int = 1
    zero_stage: int = 2
    shared: int = 1

    @property
    def name(self) -> str:
        if self.processes == 1:
            return f"1 process, {self.attention}"
        shared = f", {self.shared} to a sample" if self.shared > 1 else ""
        return f"{self.processes} processes, ZeRO {self.zero_stage}{shared}, {self.attention}"


def main() -> int:
    """Choose sizes, run the cases, write what they said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="all cases together; what does not fit in is left out, and named"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (without it the table is only printed)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one, else cpu and --tiny")
    parser.add_argument("--processes", type=int, help="of the cases with several (default: the GPUs here; 1 leaves them out)")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        measure(Case(**json.loads(arguments.worker)))
        return 0
    deadline = time.monotonic() + 60 * arguments.minutes
    machine = find_machine(arguments.device)
    tiny = arguments.tiny or (machine.device == "cpu" and arguments.device is None)
    processes = arguments.processes or max(1, machine.gpus)
    if machine.gpus and processes > machine.gpus:
        parser.error(f"--processes is {processes}, but there are {machine.gpus} GPUs")
    if machine.device == "cpu" and not tiny:
        parser.error("--device cpu needs --tiny: the sizes for a GPU would take hours")
    attentions = ["sdpa"]
    if machine.device == "cuda" and importlib.util.find_spec("flash_attn"):
        attentions.append("flash")
    with tempfile.TemporaryDirectory() as folder:
        cases = plan_cases(Path(folder), machine, attentions, processes, tiny, 60 * arguments.minutes)
        about = f"{describe_sizes(cases[0])}. GiB, measured / estimate, each phase beyond what is always there"
        header = ["ratio - 1", "always there", *PHASES, "peak", *(f"s: {name}" for name in TIMED)]
        results = Results("gpu_phases", machine, about, header, cells, arguments.out)
        for case in cases:
            results.add(run_processes(case, deadline - time.monotonic()))
    return results.exit_code(TOLERANCE)


def plan_cases(folder: Path, machine: Machine, attentions: list[str], processes: int, tiny: bool, seconds: float) -> list[Case]:
    """The cases, at the largest sizes that fit, and their checkpoint."""
    cases = [(attention, 1, 2, 1) for attention in attentions]
    if processes > 1:
        best = attentions[-1]
        cases += [(best, processes, 2, 1), (best, processes, 3, 1)]
        if processes % 2 == 0:
            cases.append((best, processes, 2, 2))
    model, sample = (TINY_MODEL, TINY_SAMPLE) if tiny else choose(machine, seconds / len(cases))
    checkpoint = write_scaled(folder, *model)
    if not tiny:
        write_real_vae(checkpoint)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    base = Case(str(checkpoint), str(folder), machine.device, model, sample)
    return [replace(base, attention=a, processes=n, zero_stage=stage, shared=shared) for a, n, stage, shared in cases]


def write_real_vae(checkpoint: Path) -> None:
    """Give the checkpoint a VAE as wide as the published one, so that decoding takes what it really takes."""
    import torch
    from diffusers import AutoencoderKLHunyuanVideo

    from fastvideo_grpo.models.hunyuan_video.family import PUBLISHED

    facts = json.loads((checkpoint / "vae" / "config.json").read_text())
    for key in ("block_out_channels", "layers_per_block", "norm_num_groups"):
        facts[key] = PUBLISHED["vae"][key]
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo.from_config(facts)
    for file in (checkpoint / "vae").iterdir():
        file.unlink()
    vae.save_pretrained(checkpoint / "vae")


def choose(machine: Machine, seconds: float) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The largest model that leaves half of the memory to activations, and the largest sample that fits in memory and time."""
    from fastvideo_grpo.models.facts import ModelFacts
    from fastvideo_grpo.models.hunyuan_video.family import PUBLISHED
    from fastvideo_grpo.planning.memory import estimate
    from fastvideo_grpo.planning.plan import count_parameters

    assert machine.free and machine.ceiling
    room = 0.85 * machine.free - 2 * GIB
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    disk = shutil.disk_usage(tempfile.gettempdir()).free
    speed = 0.25 * machine.ceiling * 1e12
    # Starting and loading take a minute of it; forwards of two iterations, a backward counts as two.
    forwards = 2 * len(PROMPTS) * GROUP * (STEPS + 3 * TRAINED)
    for width, doubles, singles in MODELS:
        transformer = {
            **PUBLISHED["transformer"],
            "num_attention_heads": width // 64,
            "attention_head_dim": 64,
            "rope_axes_dim": [16, 24, 24],
            "num_layers": doubles,
            "num_single_layers": singles,
        }
        facts = ModelFacts("scaled", {**PUBLISHED, "transformer": transformer}, trained="transformer")
        for sample in SAMPLES:
            config = load_config(Case("published", "published", "cuda", (width, doubles, singles), sample))
            config.prompts.embeddings = "cached"  # the text encoders are tiny here, and do not count
            parameters = count_parameters(config, facts)
            memory = estimate(config, facts, 1, parameters)
            if sum(memory.resident.values()) > room / 2 or 4 * parameters[1] > min(0.6 * disk, 0.35 * host):
                break  # a smaller model
            count = tokens(sample)
            work = 2 * parameters[1] * count + 4 * (doubles + singles) * width * count**2
            if memory.peak <= room and forwards * work / speed <= max(20.0, seconds - 60):
                return (width, doubles, singles), sample
    sys.exit(f"{room / GIB:.1f} GiB of the free device memory are too little for the smallest size; --tiny tries the script")


def tokens(sample: tuple[int, int, int]) -> int:
    """Image tokens of a sample: latents 4 x 8 x 8 times smaller, patches of 1 x 2 x 2."""
    frames, height, width = sample
    return ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)


def load_config(case: Case) -> Any:
    """The run's configuration."""
    from fastvideo_grpo.models import run_config

    folder = Path(case.folder)
    frames, height, width = case.sample
    values = {
        "model.kind": "hunyuan_video",
        "model.path": case.checkpoint,
        "model.precision": "bf16",
        "model.vae_precision": "bf16",
        "model.attention": case.attention,
        "prompts.path": folder / "prompts.txt",
        "prompts.text_length": TEXT,
        "sample.height": height,
        "sample.width": width,
        "sample.frames": frames,
        "sample.vae_tiling": frames > 1,
        "sample.steps": STEPS,
        "grpo.prompts_per_iteration": len(PROMPTS),
        # Every process gets work.
        "grpo.group_size": max(GROUP, case.processes // case.shared),
        "grpo.updates_per_iteration": 1,
        "engine.kind": "local" if case.processes == 1 else "deepspeed",
        "engine.zero_stage": case.zero_stage,
        "engine.sequence_parallel": case.shared,
        "rewards.models.size.kind": "jpeg_size",
        "run.dir": folder / "runs" / case.name.replace(" ", "-").replace(",", ""),
        "run.iterations": 1,
        "run.eval_every": 0,
        "run.sample_every": 0,
    }
    with tempfile.TemporaryDirectory() as empty:
        (Path(empty) / "empty.yaml").write_text("{}")
        return run_config.load(Path(empty) / "empty.yaml", [f"{key}={value}" for key, value in values.items()])


def run_processes(case: Case, seconds: float) -> Row:
    """A case, in its processes."""
    command = [str(Path(__file__).resolve()), "--worker", json.dumps(asdict(case))]
    if case.processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes), *command]
    return run_case(case.name, command, case.device, seconds)


def measure(case: Case) -> None:
    """The case, in this process, which is one of its processes; rank 0 says what was measured."""
    import torch

    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.trainers.load import load_trainer

    if case.device == "cpu":
        torch.set_num_threads(1)
    world = World.current(case.device, sequence_parallel=case.shared)
    with closing(load_trainer(load_config(case), world)) as trainer:  # at the end of the program it could not be closed
        numbers = measure_trainer(trainer, tokens(case.sample))
    if trainer.world.rank == 0:
        print_numbers(numbers)
    trainer.world.barrier()


def measure_trainer(trainer: Any, image_tokens: int) -> dict[str, Any]:
    """Two iterations: [measured, estimated] bytes, seconds and the ratio's deviation."""
    import torch

    from fastvideo_grpo.planning import memory, plan
    from fastvideo_grpo.tracking.statistics import Clock

    config, facts, device = trainer.config, trainer.facts, trainer.world.device
    trainer.setup_training()
    rollout, advantages = rollout_with_advantages(trainer, 0, Clock())
    trainer.update(0, rollout, advantages, trainer.select(advantages), Clock())
    clock = Clock()
    with Peak(device) as during_rollout:
        rollout, advantages = rollout_with_advantages(trainer, 1, clock)
    sample = trainer.pack(torch.randn(1, *trainer.latent_shape())).to(device)
    level = trainer.schedule.at(torch.zeros(1, dtype=torch.long))
    conditioning = trainer.conditioning(trainer.run.prompts[0], 1)
    with Peak(device) as forward, torch.no_grad(), trainer.forward_context(conditioning):
        start = time.perf_counter()
        trainer.predict(sample, level, conditioning)
        wait(device)
        forward_seconds = time.perf_counter() - start
    decode, decode_seconds = None, None
    if trainer.world.leads:
        with Peak(device) as decode:
            start = time.perf_counter()
            trainer.decode(sample)
            decode_seconds = time.perf_counter() - start
    with Peak(device) as update:
        metrics = trainer.update(1, rollout, advantages, trainer.select(advantages), clock)
    # The estimate is told how many text tokens there were.
    config.prompts.text_length = conditioning["encoder_hidden_states"].shape[1]
    parameters = plan.count_parameters(config, facts)
    planned = memory.estimate(config, facts, trainer.world.size, parameters)
    measured = {"rollout": forward.bytes, "decode": decode.bytes if decode else 0, "update": update.bytes}
    peak = max(during_rollout.peak, update.peak) if device.type == "cuda" else None
    samples = len(PROMPTS) * config.grpo.group_size / trainer.world.data_size
    return {
        "ratio deviation": metrics["train/ratio_first_update_max_dev"],
        "grad norm": metrics["train/grad_norm"],
        "parameters": parameters[1],
        "tokens": image_tokens,
        "memory": {
            "resident": [during_rollout.held, sum(planned.resident.values())],
            **{phase: [measured[phase], planned.phases[phase]] for phase in PHASES},
            "peak": [peak, planned.peak],
        },
        "seconds": {
            "forward": forward_seconds,
            "decode": decode_seconds,
            "rollout of a sample": clock.seconds["rollout"] / samples,
            "update of a sample": clock.seconds["update"] / samples,
            "exchange": clock.seconds["exchange"],
        },
    }


def describe_sizes(case: Case) -> str:
    """Model and sample in words."""
    (width, doubles, singles), (frames, height, pixels) = case.model, case.sample
    return (
        f"Random HunyuanVideo, width {width}, {doubles} double and {singles} single blocks, heads of 64, bf16; "
        f"{pixels} x {height} x {frames} frames = {tokens(case.sample)} tokens, {STEPS} steps, {TRAINED} trained"
    )


def cells(numbers: dict[str, Any]) -> list[str]:
    """A row of the table."""
    memory, seconds = numbers["memory"], numbers["seconds"]
    return [
        f"{numbers['ratio deviation']:.1g}",
        *(format_gib(*memory[part]) for part in ("resident", *PHASES, "peak")),
        *("-" if seconds[name] is None else f"{seconds[name]:.3g}" for name in TIMED),
    ]


if __name__ == "__main__":
    sys.exit(main())
