"""Parameters that rewards on networks share: how much goes through the network together, and in which precision it is kept."""

from __future__ import annotations

from typing import Literal, get_args

import torch

Precision = Literal["fp32", "bf16"]


def check_batch_size(kind: str, batch_size: int) -> None:
    """Raises ValueError, with the reward's `kind`, unless `batch_size` is a whole number, at least 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"{kind}: batch_size is {batch_size!r}; it must be a whole number, at least 1")


def weight_dtype(kind: str, precision: Precision) -> torch.dtype:
    """The dtype of `precision`. Raises ValueError, with the reward's `kind`, for an unknown one."""
    if precision not in get_args(Precision):
        raise ValueError(f"{kind}: precision is {precision!r}; it must be one of {', '.join(get_args(Precision))}")
    return torch.bfloat16 if precision == "bf16" else torch.float32
