"""Seconds and memory of what a trainer does."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(action: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds of one call, after one that is not measured."""
    action()
    wait(device)
    start = time.perf_counter()
    for _ in range(times):
        action()
    wait(device)
    return (time.perf_counter() - start) / times


class Peak:
    """Growth of memory within a block: CUDA's peak, or that of resident memory.

    Attributes:
        bytes: the growth.
        held: bytes on the GPU at the start. None on a CPU, where the program is among them.
        peak: the most bytes on the GPU; None on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: int | None = None
        self.peak: int | None = None

    def __enter__(self) -> Peak:
        import torch

        gc.collect()
        wait(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        import torch

        gpu = self.device.type == "cuda"
        most = torch.cuda.max_memory_allocated(self.device) if gpu else _status("VmHWM")
        self.bytes = most - self._before
        if gpu:
            self.held, self.peak = self._before, most


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def rollout_with_advantages(trainer: Any, iteration: int, clock: Any) -> tuple[Any, Any]:
    """An iteration's samples, and advantages of random scores: real ones may all be equal, which trains nothing."""
    import torch

    from fastvideo_grpo.grpo.advantages import group_advantages

    rollout = trainer.rollout(iteration, list(trainer.run.prompts), clock)
    generator = torch.Generator().manual_seed(iteration)
    scores = {name: torch.rand(valid.shape, generator=generator) for name, valid in rollout.valid.items()}
    return rollout, group_advantages(scores, rollout.valid, trainer.run.scoring.rewards.weights)
