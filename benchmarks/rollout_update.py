"""What the loop costs beside the forwards and backwards that cannot be avoided.

    python benchmarks/rollout_update.py [--tokens 64 1024] [--micro-batch 1 2 4] [--iterations 3]

For a tiny random FLUX, at each image size and micro-batch: seconds per sample of the rollout and of the update, the bare
seconds for the same forwards (and backwards, and the VAE's decoding in the rollout), and their ratio, all in one run on one
CPU thread or one GPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch

from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.flux.tiny import write_flux
from fastvideo_grpo.tracking.statistics import Clock
from fastvideo_grpo.trainers.base import GRPOTrainer
from fastvideo_grpo.trainers.load import load_trainer

GROUP = 4
PROMPTS = 2


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 1024], help="image tokens (squares of even numbers)")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[1, 2, 4], help="sizes that divide 4")
    parser.add_argument("--iterations", type=int, default=3, help="timed iterations; one more warms up")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = World.current().device
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()}, one thread"
    )
    print(f"machine: {name}, {os.cpu_count()} cores; torch {torch.__version__}")
    print("tokens  micro-batch  rollout s/sample  bare  ratio   update s/sample  bare  ratio")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_flux(Path(folder) / "flux")
        for tokens in arguments.tokens:
            for size in arguments.micro_batch:
                row = _measure(Path(folder), checkpoint, tokens, size, arguments.iterations)
                print(
                    f"{tokens:6} {size:12} {row[0]:17.4f} {row[1]:5.3f} {row[0] / row[1]:6.2f} "
                    f"{row[2]:17.4f} {row[3]:5.3f} {row[2] / row[3]:6.2f}",
                    flush=True,
                )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _measure(folder: Path, checkpoint: Path, tokens: int, size: int, iterations: int) -> tuple[float, float, float, float]:
    side = int(tokens**0.5) * 16
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    (folder / "empty.yaml").write_text("{}")
    config = run_config.load(
        folder / "empty.yaml",
        [
            f"model.path={checkpoint}",
            "model.precision=fp32",
            f"prompts.path={folder / 'prompts.txt'}",
            "prompts.text_length=16",
            f"sample.height={side}",
            f"sample.width={side}",
            "sample.steps=6",
            f"grpo.prompts_per_iteration={PROMPTS}",
            f"grpo.group_size={GROUP}",
            "grpo.updates_per_iteration=1",
            f"engine.micro_batch_size={size}",
            "rewards.models.size.kind=jpeg_size",
            f"run.dir={folder / 'run'}",
            "run.iterations=1",
        ],
    )
    with closing(load_trainer(config, World.current())) as trainer:
        trainer.setup_training()
        return _seconds(trainer, size, iterations)


def _seconds(trainer: GRPOTrainer, size: int, iterations: int) -> tuple[float, float, float, float]:
    samples = PROMPTS * GROUP
    totals = [0.0, 0.0]
    for iteration in range(iterations + 1):
        clock = Clock()
        rollout = trainer.rollout(iteration, trainer.run.prompts, clock)
        advantages = _advantages(trainer, rollout)
        trainer.update(iteration, rollout, advantages, trainer.select(advantages), clock)
        if iteration:
            totals[0] += clock.seconds["rollout"] / samples / iterations
            totals[1] += clock.seconds["update"] / samples / iterations
    forward, backward, decode = _bare(trainer, size, iterations)
    trained = 4  # ceil(0.6 x 6)
    return totals[0], forward * trainer.config.sample.steps + decode, totals[1], backward * trained


def _advantages(trainer, rollout):
    from fastvideo_grpo.grpo.advantages import group_advantages

    return group_advantages(rollout.scores, rollout.valid, trainer.run.scoring.rewards.weights)


def _bare(trainer, size: int, repeats: int) -> tuple[float, float, float]:
    """Seconds per sample of a forward without gradients, of a forward and backward, and of decoding."""
    conditioning = trainer.conditioning(trainer.run.prompts[0], size)
    sample = trainer.pack(torch.randn(size, *trainer.latent_shape())).to(trainer.world.device)
    level = trainer.schedule.at(torch.zeros(size, dtype=torch.int64))

    def timed(step) -> float:
        step()
        start = time.perf_counter()
        for _ in range(4 * repeats):
            step()
        if trainer.world.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / (4 * repeats) / size

    def forward() -> None:
        with torch.no_grad(), trainer.forward_context(conditioning):
            trainer.predict(sample, level, conditioning)

    def backward() -> None:
        with trainer.forward_context(conditioning):
            trainer.predict(sample, level, conditioning).square().mean().backward()

    return timed(forward), timed(backward), timed(lambda: trainer.decode(sample))


if __name__ == "__main__":
    main()
