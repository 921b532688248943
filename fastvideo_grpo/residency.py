"""What is used now and then waits in host memory (``engine.offload_idle``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Movable(Protocol):
    """A module, or anything else that can be moved."""

    def to(self, device: torch.device | str, /) -> Any: ...


@contextmanager
def resident(movable: Movable, device: torch.device) -> Iterator[None]:
    """Within, ``movable`` is on ``device``; before and after, in host memory."""
    movable.to(device)
    try:
        yield
    finally:
        movable.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()  # or the allocator keeps the room for it, and nobody else can have it
