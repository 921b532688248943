"""Peak memory of rollout, decode and update against the estimate of ``train --dry-run``.

    python benchmarks/memory.py [--width 512] [--layers 2 4] [--precision fp32]

A random HunyuanVideo (its transformer of the given width; VAE, Llama and CLIP tiny) draws, decodes and trains one micro-batch
in a process of its own for each row. On a GPU the peak is CUDA's; on a CPU it is the growth of resident memory, with an
allocator that hands freed memory back. The first table varies the sizes, the second what an iteration holds with the
number of samples, steps and frames.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from measuring import Peak

MIB = 2**20
# Rows of the first table: (frames, side in pixels, micro-batch, activation checkpointing).
SIZES = [
    (1, 256, 1, "none"),
    (9, 256, 1, "none"),
    (9, 256, 2, "none"),
    (9, 256, 1, "full"),
    (9, 256, 1, "every:2"),
    (17, 256, 1, "full"),
]
# Rows of the second: (group size, steps, frames).
GROWTH = [(4, 4, 5), (8, 4, 5), (16, 4, 5), (4, 8, 5), (4, 4, 9), (4, 4, 17)]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="hidden width of the transformer, a multiple of 128")
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 4], metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print("RESULT " + json.dumps(measure(json.loads(arguments.worker))))
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_scaled(Path(folder), arguments.width, *arguments.layers)
        common = {"checkpoint": str(checkpoint), "folder": folder, "precision": arguments.precision}
        print(
            f"machine: {platform.machine()}, {os.cpu_count()} cores; width {arguments.width}, {arguments.layers[0]} double and "
            f"{arguments.layers[1]} single blocks, {arguments.precision}; MiB beyond weights and optimiser, measured / estimate"
        )
        print("frames  side  batch  checkpointing      rollout               decode               update")
        for frames, side, batch, every in SIZES:
            row = run_worker({**common, "frames": frames, "side": side, "batch": batch, "every": every})
            cells = "".join(f"{_cell(row[phase]):>21}" for phase in ("rollout", "decode", "update"))
            print(f"{frames:6} {side:5} {batch:6}  {every:13}{cells}", flush=True)
        print(
            "\none iteration of 2 prompts, 64 x 64 pixels: peak beyond weights and optimiser, and trajectories on the host, MiB"
        )
        print("group  steps  frames   device measured / estimated   trajectories measured / estimated")
        for group, steps, frames in GROWTH:
            row = run_worker(
                {**common, "frames": frames, "side": 64, "batch": 1, "every": "none", "group": group, "steps": steps}
            )
            print(
                f"{group:5} {steps:6} {frames:7} {_cell(row['iteration']):>29} {_cell(row['trajectories'], 2):>33}", flush=True
            )


def _cell(pair: list[float], digits: int = 0) -> str:
    measured, estimated = (value / MIB for value in pair)
    return f"{measured:.{digits}f} / {estimated:.{digits}f} ({measured / estimated:.2f})"


def run_worker(case: dict[str, object]) -> dict[str, list[float]]:
    """One row, in a fresh process: what another row left in memory must not count."""
    # Freed tensors go back to the system at once instead of into the allocator's lists.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(case)],
        env={**os.environ, **allocator},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"the measurement failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def write_scaled(folder: Path, width: int, doubles: int, singles: int) -> Path:
    """A tiny HunyuanVideo whose transformer has this width and these blocks, heads of 64."""
    import torch
    from diffusers import HunyuanVideoTransformer3DModel

    from fastvideo_grpo.models.hunyuan_video.tiny import configs, write_hunyuan_video

    checkpoint = write_hunyuan_video(folder / "scaled")
    sizes = {
        "num_attention_heads": width // 64,
        "attention_head_dim": 64,
        "rope_axes_dim": [16, 24, 24],
        "num_layers": doubles,
        "num_single_layers": singles,
    }
    torch.manual_seed(0)
    module = HunyuanVideoTransformer3DModel.from_config({**configs("random")["transformer"], **sizes})
    for file in (checkpoint / "transformer").iterdir():
        file.unlink()
    module.save_pretrained(checkpoint / "transformer")
    return checkpoint


def measure(case: dict[str, object]) -> dict[str, list[float]]:
    """[measured, estimated] bytes of each phase, or of a whole iteration where a group size is given."""
    import torch

    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.models import run_config
    from fastvideo_grpo.trainers.load import load_trainer

    torch.set_num_threads(1)
    folder = Path(str(case["folder"]))
    (folder / "prompts.txt").write_text("a red circle moving left\na blue square moving right")
    (folder / "empty.yaml").write_text("{}")
    group = case.get("group", case["batch"])
    values = {
        "model.kind": "hunyuan_video",
        "model.path": case["checkpoint"],
        "model.precision": case["precision"],
        "prompts.path": folder / "prompts.txt",
        "prompts.text_length": 32,
        "sample.height": case["side"],
        "sample.width": case["side"],
        "sample.frames": case["frames"],
        "sample.steps": case.get("steps", 3),
        "grpo.prompts_per_iteration": 2,
        "grpo.group_size": max(2, int(str(group))),
        "grpo.updates_per_iteration": 1,
        "engine.micro_batch_size": case["batch"],
        "engine.activation_checkpointing": case["every"],
        "rewards.models.any.kind": "jpeg_size",
        "run.dir": folder / "run" / "-".join(str(value) for key, value in case.items() if key not in ("folder", "checkpoint")),
        "run.iterations": 1,
        "run.eval_every": 0,
        "run.sample_every": 0,
    }
    config = run_config.load(folder / "empty.yaml", [f"{key}={value}" for key, value in values.items()])
    with closing(load_trainer(config, World.current())) as trainer:  # at the end of the program it could not be closed
        return measure_trainer(trainer, whole="group" in case)


def measure_trainer(trainer: Any, whole: bool) -> dict[str, list[float]]:
    """The same; ``whole``: of an iteration."""
    import torch

    from fastvideo_grpo.planning import memory, plan
    from fastvideo_grpo.sampling.noise import SampleKey
    from fastvideo_grpo.tracking.statistics import Clock

    config, facts, device = trainer.config, trainer.facts, trainer.world.device
    trainer.setup_training()
    prompt = trainer.run.prompts[0]
    # As many text tokens as the estimate is told of.
    config.prompts.text_length = trainer.conditioning(prompt, 1)["encoder_hidden_states"].shape[1]
    planned = memory.estimate(config, facts, 1, plan.count_parameters(config, facts))
    if whole:
        trainer.train()  # the first iteration makes AdamW's state and the allocator's pools
        with Peak(device) as peak:
            rollout = trainer.rollout(1, list(trainer.run.prompts), Clock())
            advantages = torch.zeros(2, config.grpo.group_size)
            advantages[:, 0] = 1.0
            from fastvideo_grpo.grpo.advantages import group_advantages

            scores = {name: torch.rand(2, config.grpo.group_size) for name in trainer.run.scoring.rewards.names}
            valid = {name: torch.ones(2, config.grpo.group_size, dtype=torch.bool) for name in scores}
            values_ = group_advantages(scores, valid, trainer.run.scoring.rewards.weights)
            trainer.update(1, rollout, values_, trainer.select(values_), Clock())
        held = sum(t.nbytes for t in rollout.trajectories.values() if t.ndim > 1)
        # On a CPU, trajectories lie in the memory that is measured.
        on_device = peak.bytes - (held if device.type == "cpu" else 0)
        return {"iteration": [on_device, max(planned.phases.values())], "trajectories": [held, planned.host["trajectories"]]}

    keys = [SampleKey(0, 0, 0, prompt.id, member) for member in range(config.engine.micro_batch_size)]
    conditioning = trainer.conditioning(prompt, len(keys))
    sample = trainer.pack(torch.randn(len(keys), *trainer.latent_shape())).to(device)
    level = trainer.schedule.at(torch.zeros(len(keys), dtype=torch.long))
    result = {}
    for phase in ("warm", "rollout"):
        with Peak(device) as peak, torch.no_grad(), trainer.forward_context(conditioning):
            trainer.predict(sample, level, conditioning)
        result["rollout"] = [peak.bytes, planned.phases["rollout"]]
        del phase
    for _ in range(2):
        with Peak(device) as peak:
            trainer.decode(sample)
    result["decode"] = [peak.bytes, planned.phases["decode"]]
    gradients = 4 * plan.count_parameters(config, facts)[0]
    for _ in range(2):
        trainer.engine.accumulate(2)  # the second backward meets gradients that are there already
        for _ in range(2):
            with Peak(device) as peak, trainer.forward_context(conditioning):
                trainer.engine.backward(trainer.predict(sample, level, conditioning).float().square().mean())
        trainer.engine.step()
    result["update"] = [peak.bytes, planned.phases["update"] - gradients]
    return result


if __name__ == "__main__":
    main()
