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
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from memory import Peak, write_scaled

GIB = 2**30
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
    parser.add_argument("--out", type=Path, help="folder of the results (without it they are only printed)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one, else cpu and --tiny")
    parser.add_argument("--processes", type=int, help="of the cases with several (default: the GPUs here; 1 leaves them out)")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        measure(Case(**json.loads(arguments.worker)))
        return 0
    deadline = time.monotonic() + 60 * arguments.minutes
    machine = describe_machine(arguments.device)
    device, tiny = machine["device"], arguments.tiny or (machine["device"] == "cpu" and arguments.device is None)
    processes = arguments.processes or (machine["gpus"] if device == "cuda" else 1)
    if device == "cuda" and processes > machine["gpus"]:
        parser.error(f"--processes is {processes}, but there are {machine['gpus']} GPUs")
    if device == "cpu" and not tiny:
        parser.error("--device cpu needs --tiny: the sizes for a GPU would take hours")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        attentions = ["sdpa"]
        if device == "cuda" and importlib.util.find_spec("flash_attn"):
            attentions.append("flash")
        cases = plan_cases(Path(folder), device, attentions, processes, tiny, machine, 60 * arguments.minutes)
        print(f"machine: {json.dumps(machine)}\nmodel: {describe_sizes(cases[0])}", flush=True)
        for case in cases:
            result = {"case": case.name, **run_case(case, deadline)}
            results.append(result)
            print(f"{case.name}: {result.get('error') or json.dumps(result)}", flush=True)
        text = markdown(machine, cases[0], results)
    print("\n" + text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "gpu_phases.json").write_text(
            json.dumps({"machine": machine, "model": describe_sizes(cases[0]), "results": results}, indent=1) + "\n"
        )
        (arguments.out / "gpu_phases.md").write_text(text)
    failed = [r["case"] for r in results if "error" in r and not r.get("left_out")]
    # Not `> TOLERANCE`: NaN is not 1 either.
    drifted = [r["case"] for r in results if "ratio" in r and not r["ratio"] <= TOLERANCE]
    if drifted:
        print(f"the ratio before the first optimiser step is not 1: {'; '.join(drifted)}", file=sys.stderr)
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed or drifted or not any("ratio" in r for r in results) else 0


def describe_machine(wanted: str | None) -> dict[str, Any]:
    """What there is: device, its name, free bytes and speed."""
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda, but torch sees no GPU; --device cpu --tiny tries the script")
    machine: dict[str, Any] = {"torch": torch.__version__, "cores": os.cpu_count(), "machine": platform.machine()}
    if wanted == "cpu" or not torch.cuda.is_available():
        return {**machine, "device": "cpu", "name": platform.machine(), "gpus": 0, "free": None, "tflops": None}
    free = min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    speed = 10 * 2 * 8192**3 / (time.perf_counter() - start)
    del a
    torch.cuda.empty_cache()
    return {
        **machine,
        "device": "cuda",
        "name": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "free": free,
        "tflops": round(speed / 1e12, 1),
    }


def plan_cases(
    folder: Path, device: str, attentions: list[str], processes: int, tiny: bool, machine: dict[str, Any], seconds: float
) -> list[Case]:
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
    (folder / "empty.yaml").write_text("{}")
    base = Case(str(checkpoint), str(folder), device, model, sample)
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


def choose(machine: dict[str, Any], seconds: float) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The largest model that leaves half of the memory to activations, and the largest sample that fits in memory and time."""
    import shutil

    from fastvideo_grpo.models.facts import ModelFacts
    from fastvideo_grpo.models.hunyuan_video.family import PUBLISHED
    from fastvideo_grpo.planning.memory import estimate
    from fastvideo_grpo.planning.plan import count_parameters

    room = 0.85 * machine["free"] - 2 * GIB
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    disk = shutil.disk_usage(tempfile.gettempdir()).free
    speed = 0.25 * machine["tflops"] * 1e12
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


def run_case(case: Case, deadline: float) -> dict[str, Any]:
    """One case in processes of its own; ``error`` instead of numbers where it failed or no time was left."""
    left = deadline - time.monotonic()
    if left < 45:
        return {"error": "left out: no time left (--minutes)", "left_out": True}
    command = [sys.executable]
    if case.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes)]
    command += [str(Path(__file__).resolve()), "--worker", json.dumps(asdict(case))]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "FASTVIDEO_LOGGING_LEVEL": "WARNING",
    }
    if case.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        # What is freed goes back to the system, so that resident memory says what is held.
        environment.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers, which are in sessions of their own
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        return {"error": f"stopped after {left:.0f} s: no time left (--minutes)"}
    for line in output.splitlines():
        if "RESULT " in line:
            return json.loads(line.partition("RESULT ")[2])
    return {"error": f"exit code {process.returncode}:\n{output[-3000:]}"}


def measure(case: Case) -> None:
    """Two iterations; rank 0 prints ``RESULT`` and, as JSON, [measured, estimated] bytes, seconds and the ratio's deviation."""
    import torch

    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.grpo.advantages import group_advantages
    from fastvideo_grpo.models.checkpoint import model_facts
    from fastvideo_grpo.planning import memory, plan
    from fastvideo_grpo.tracking.statistics import Clock
    from fastvideo_grpo.trainers.load import load_trainer

    config = load_config(case)
    if case.device == "cpu":
        torch.set_num_threads(1)
    world = World.current(case.device, sequence_parallel=case.shared)
    facts = model_facts(config)
    trainer = load_trainer(config, world)
    trainer.setup_training()
    device = trainer.world.device

    def iteration(number: int, clock: Clock) -> Any:
        rollout = trainer.rollout(number, list(trainer.run.prompts), clock)
        # Random scores: jpeg_size may call all of them equal, and equal scores train nothing.
        generator = torch.Generator().manual_seed(number)
        scores = {name: torch.rand(valid.shape, generator=generator) for name, valid in rollout.valid.items()}
        return rollout, group_advantages(scores, rollout.valid, trainer.run.scoring.rewards.weights)

    rollout, advantages = iteration(0, Clock())
    trainer.update(0, rollout, advantages, trainer.select(advantages), Clock())
    held = _held(device)
    clock = Clock()
    with Peak(device) as during_rollout:
        rollout, advantages = iteration(1, clock)
    sample = trainer.pack(torch.randn(1, *trainer.latent_shape())).to(device)
    level = trainer.schedule.at(torch.zeros(1, dtype=torch.long))
    conditioning = trainer.conditioning(trainer.run.prompts[0], 1)
    with Peak(device) as forward, torch.no_grad(), trainer.forward_context(conditioning):
        start = time.perf_counter()
        trainer.predict(sample, level, conditioning)
        _wait(device)
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
    peak = max(during_rollout.before + during_rollout.bytes, update.before + update.bytes)
    samples = len(PROMPTS) * config.grpo.group_size / trainer.world.data_size
    result = {
        "ratio": metrics["train/ratio_first_update_max_dev"],
        "grad_norm": metrics["train/grad_norm"],
        "parameters": parameters[1],
        "tokens": tokens(case.sample),
        "memory": {
            "resident": [held, sum(planned.resident.values())],
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
    trainer.close()
    if trainer.world.rank == 0:
        print("RESULT " + json.dumps(result), flush=True)
    trainer.world.barrier()


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _held(device: Any) -> int | None:
    """Bytes that lie on a GPU now; a CPU's resident memory holds the program too, and says nothing."""
    import torch

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def describe_sizes(case: Case) -> str:
    """Model and sample in words."""
    (width, doubles, singles), (frames, height, pixels) = case.model, case.sample
    return (
        f"random HunyuanVideo, width {width}, {doubles} double and {singles} single blocks, heads of 64, bf16; "
        f"{pixels} x {height} x {frames} frames = {tokens(case.sample)} tokens, {STEPS} steps, {TRAINED} trained"
    )


def markdown(machine: dict[str, Any], case: Case, results: list[dict[str, Any]]) -> str:
    """The results for docs/scaling.md."""
    versions = f"torch {machine['torch']}" + (f", CUDA {machine['cuda']}" if "cuda" in machine else "")
    gpus = f"{machine['gpus']} x {machine['name']}" if machine["gpus"] else f"{machine['name']} CPU, {machine['cores']} cores"
    memory, seconds = ["always there", *PHASES, "peak"], ["forward", "decode", "rollout of a sample", "update of a sample"]
    header = ["case", "ratio - 1", *memory, *(f"s: {name}" for name in seconds)]
    lines = [
        f"`python benchmarks/gpu_phases.py`; {gpus}, {versions}. {describe_sizes(case)}. GiB, measured / estimate, "
        "each phase beyond what is always there:",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for result in results:
        if "error" in result:
            lines.append(f"| {result['case']} | {result['error'].splitlines()[0]} " + "| " * (len(header) - 2) + "|")
            continue
        cells = [_pair(*result["memory"][part]) for part in ("resident", *PHASES)]
        # On a CPU the peak holds the program.
        cells.append(_pair(*result["memory"]["peak"]) if machine["device"] == "cuda" else "-")
        cells += ["-" if (value := result["seconds"][key]) is None else f"{value:.3g}" for key in seconds]
        lines.append(f"| {result['case']} | {result['ratio']:.1e} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _pair(measured: float | None, estimated: float) -> str:
    return f"{'-' if measured is None else format(measured / GIB, '.3g')} / {estimated / GIB:.3g}"


if __name__ == "__main__":
    sys.exit(main())
