"""Checks of an objective's own parameters (``grpo.objective_params``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def positive_number(name: str, value: Any) -> float:
    """``value`` as a float; ValueError where it is not a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"grpo.objective_params.{name} is {value!r}; it must be a finite number above 0")
    return float(value)


def one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """``value``; ValueError where it is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"grpo.objective_params.{name} is {value!r}; allowed: {', '.join(allowed)}")
    return str(value)
