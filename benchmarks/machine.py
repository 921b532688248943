"""The machine that a benchmark runs on, for its results' first line."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import dataclass

from measuring import seconds_of

SIDE = 8192


@dataclass(frozen=True)
class Machine:
    """A machine.

    Attributes:
        device: "cuda" or "cpu".
        name: of its first GPU; of its processors without one.
        free: bytes, on the GPU that has the fewest.
        ceiling: 10^12 operations a second of a large matrix product in bf16, measured on the first GPU.
    """

    device: str
    name: str
    gpus: int
    cores: int
    torch: str
    date: str
    cuda: str | None = None
    free: int | None = None
    ceiling: float | None = None

    def __str__(self) -> str:
        what = f"{self.gpus} x {self.name}" if self.gpus else f"{self.name} CPU, {self.cores} cores"
        cuda = f", CUDA {self.cuda}" if self.cuda else ""
        return f"{what}, torch {self.torch}{cuda}, {self.date}"


def find_machine(wanted: str | None) -> Machine:
    """What there is; ``wanted`` is a device, or None for a GPU if there is one."""
    import torch

    found, cores, date = torch.cuda.is_available(), os.cpu_count() or 1, time.strftime("%Y-%m-%d")
    if wanted == "cpu" or not (wanted or found):
        return Machine("cpu", platform.machine(), 0, cores, torch.__version__, date)
    if not found:
        sys.exit("torch sees no GPU; --device cpu tries the script")
    gpus = torch.cuda.device_count()
    free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus))
    name, ceiling = torch.cuda.get_device_name(), _measure_ceiling()
    torch.cuda.empty_cache()  # the cases, in processes of their own, need it
    return Machine("cuda", name, gpus, cores, torch.__version__, date, torch.version.cuda, free, round(ceiling, 1))


def _measure_ceiling() -> float:
    import torch

    a = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    return 2 * SIDE**3 / seconds_of(lambda: a @ a, 10, a.device) / 1e12
