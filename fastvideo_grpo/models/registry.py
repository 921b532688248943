"""Models by ``model.kind``: the folders of this package, and packages that offer one under the entry point group below."""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

from fastvideo_grpo import models
from fastvideo_grpo.config.keys import Config, LoRAConfig
from fastvideo_grpo.extensions import Registry
from fastvideo_grpo.models.family import Family


def _problem(name: str, offered: Any) -> str | None:
    if not isinstance(offered, Family):
        found = "class" if isinstance(offered, type) else type(offered).__name__
        return f"which is no object of fastvideo_grpo.models.family.Family, but a {found}"
    return None if offered.kind == name else f"whose kind is '{offered.kind}'; both must be the same"


@cache
def import_own() -> None:
    """Each folder of this package is a model, and the ``FAMILY`` in its family.py what is known of it."""
    for folder in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        if not folder.ispkg:
            continue
        module = import_module(f"{folder.name}.family")
        name, family = folder.name.rpartition(".")[2], getattr(module, "FAMILY", None)
        problem = _problem(name, family)
        if problem is not None:
            raise TypeError(f"{module.__file__} has a FAMILY {problem}")
        FAMILIES.register(name, module.FAMILY)


FAMILIES: Registry[Family] = Registry("model", "fastvideo_grpo.models", problem=_problem, import_own=import_own)


def lora_settings(config: Config) -> LoRAConfig:
    """``model.lora`` with the layers named: the model's attention projections where none are."""
    assert config.model.lora is not None
    targets = config.model.lora.targets
    return replace(config.model.lora, targets=list(FAMILIES[config.model.kind].lora_targets if targets is None else targets))
