"""A run's configuration, with the defaults that its model brings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvideo_grpo.config import loading
from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.models.registry import FAMILIES


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """:func:`fastvideo_grpo.config.loading.load` with all models that are known."""
    return loading.load(path, overrides, models=FAMILIES)


def build(nested: Mapping[str, Any], overrides: list[str] | None = None) -> Config:
    """:func:`fastvideo_grpo.config.loading.build` with all models that are known."""
    return loading.build(nested, overrides, models=FAMILIES)
