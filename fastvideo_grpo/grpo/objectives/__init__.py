"""Objectives: what an update minimises, per sample and trained timestep. One file a method; see docs/objectives.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fastvideo_grpo.grpo.objectives.base import Objective, Replay, SampleBatch
from fastvideo_grpo.grpo.objectives.ddpo import DDPO
from fastvideo_grpo.grpo.objectives.dpo import DPO
from fastvideo_grpo.grpo.objectives.dpok import DPOK
from fastvideo_grpo.grpo.objectives.grpo import GRPO
from fastvideo_grpo.grpo.objectives.refl import ReFL

__all__ = [
    "DDPO",
    "DPO",
    "DPOK",
    "GRPO",
    "Objective",
    "ReFL",
    "Replay",
    "SampleBatch",
    "get",
    "names",
    "register",
    "takes",
]

SETTINGS = ("clip_range", "advantage_clip", "kl_weight")
"""What every objective may ask for by an argument of that name; its other arguments are ``grpo.objective_params``."""

_OBJECTIVES: dict[str, Callable[..., Objective]] = {}


def register(name: str, make: Callable[..., Objective]) -> None:
    """Make ``get(name, ...)`` return ``make(...)``, with keyword arguments; a taken name raises ValueError."""
    if name in _OBJECTIVES:
        raise ValueError(f"objective {name!r} is registered already")
    _OBJECTIVES[name] = make


def names() -> list[str]:
    """The registered objectives."""
    return sorted(_OBJECTIVES)


def takes(name: str, setting: str) -> bool:
    """Whether the objective has an argument of that name, ValueError for an unknown objective."""
    return setting in _arguments(name)


def get(
    name: str,
    *,
    clip_range: float,
    advantage_clip: float | None,
    kl_weight: float,
    params: Mapping[str, Any] | None = None,
) -> Objective:
    """The objective called ``name``, given those of ``SETTINGS`` that it asks for, and its own ``params``.

    Raises:
        ValueError: an unknown name, an unknown or missing parameter, or a value that the objective refuses.
    """
    arguments = _arguments(name)
    settings = dict(zip(SETTINGS, (clip_range, advantage_clip, kl_weight), strict=True))
    own = [key for key in arguments if key not in SETTINGS]
    params = dict(params or {})
    for key in params:
        if key not in own:
            where = f"; it is a key of its own, grpo.{key}" if key in SETTINGS else ""
            raise ValueError(
                f"grpo.objective_params.{key}: objective {name} has no such parameter; it has {', '.join(own) or 'none'}{where}"
            )
    missing = [key for key in own if arguments[key].default is inspect.Parameter.empty and key not in params]
    if missing:
        raise ValueError(f"objective {name} needs grpo.objective_params.{missing[0]}")
    asked = {key: value for key, value in settings.items() if key in arguments}
    return _OBJECTIVES[name](**asked, **params)


def _arguments(name: str) -> Mapping[str, inspect.Parameter]:
    if name not in _OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; known: {', '.join(names())}")
    return inspect.signature(_OBJECTIVES[name]).parameters


register("grpo", GRPO)
register("ddpo", DDPO)
register("dpok", DPOK)
register("refl", ReFL)
register("dpo", DPO)
