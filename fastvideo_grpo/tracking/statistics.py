"""Numbers of an iteration: seconds and passes of the network per phase, statistics of its updates, memory."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastvideo_grpo.engines.parallel import World

FORWARD, TRAINED = "forward", "trained"
"""Passes of the network without gradients, and with them."""


class Clock:
    """Seconds and passes of the network per phase of an iteration.

    Args:
        watch: called with the name of each phase when it begins.
        passes: how many there were so far of each kind, ``FORWARD`` and ``TRAINED``, of one sample and text each.

    Attributes:
        passes: phase -> those made in it.
    """

    def __init__(self, watch: Callable[[str], None] = lambda phase: None, passes: Counter[str] | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.passes: dict[str, Counter[str]] = defaultdict(Counter)
        self._watch, self._made = watch, Counter[str]() if passes is None else passes

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._watch(name)
        start, made = time.perf_counter(), self._made.copy()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
            self.passes[name].update(self._made - made)


def _largest(*values: float | None) -> float | None:
    """The largest value; NaN if one is NaN (``max`` would hide it), None if there is none."""
    known = [value for value in values if value is not None]
    if any(math.isnan(value) for value in known):
        return math.nan
    return max(known, default=None)


class UpdateStatistics:
    """Per-row statistics of an iteration's updates, over the rows that count."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.rows = 0.0
        self.loss = 0.0
        self.deviation: float | None = None
        self.deviation_max: float | None = None

    def add(self, loss: Tensor, info: dict[str, Tensor], weights: Tensor, *, first: bool) -> None:
        counted = weights > 0
        self.rows += counted.sum().item()
        self.loss += loss.item()
        for name, values in info.items():
            self.sums[name] += values[counted].double().sum().item()
        if "ratio" in info and bool(counted.any()):
            deviation = (info["ratio"][counted] - 1).abs().max().item()
            self.deviation_max = _largest(self.deviation_max, deviation)
            if first:
                self.deviation = _largest(self.deviation, deviation)

    def summary(self, world: World) -> dict[str, float | None]:
        parts = world.all_gather_object((dict(self.sums), self.rows, self.loss, self.deviation, self.deviation_max))
        rows = sum(part[1] for part in parts)
        names = sorted({name for part in parts for name in part[0]})
        labels = {"clipped": "clip_fraction", "masked": "masked_fraction", "ratio": "ratio_mean"}
        metrics = {
            f"train/{labels.get(name, name)}": sum(part[0].get(name, 0.0) for part in parts) / rows if rows else math.nan
            for name in names
        }
        return {
            "train/loss": sum(part[2] for part in parts),
            "train/ratio_first_update_max_dev": _largest(*(part[3] for part in parts)),
            "train/ratio_max_dev": _largest(*(part[4] for part in parts)),
            **metrics,
        }


def memory_metrics(world: World) -> dict[str, float]:
    """Peak memory of rank 0 so far, in GiB: device memory on GPUs, resident memory on CPUs."""
    if world.device.type == "cuda":
        return {"memory/device_peak_gib": torch.cuda.max_memory_allocated(world.device) / 2**30}
    import resource

    return {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
