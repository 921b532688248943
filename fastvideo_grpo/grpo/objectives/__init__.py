"""Objectives: what an update minimises, per sample and trained timestep. One file a method; see docs/objectives.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fastvideo_grpo.extensions import Registry, not_callable
from fastvideo_grpo.grpo.objectives.awm import AWM
from fastvideo_grpo.grpo.objectives.base import AdvantageRange, CleanReplay, Objective, Replay, SampleBatch
from fastvideo_grpo.grpo.objectives.ddpo import DDPO
from fastvideo_grpo.grpo.objectives.diffusion_dpo import DiffusionDPO
from fastvideo_grpo.grpo.objectives.dpo import DPO
from fastvideo_grpo.grpo.objectives.dpok import DPOK
from fastvideo_grpo.grpo.objectives.grpo import GRPO
from fastvideo_grpo.grpo.objectives.nft import NFT
from fastvideo_grpo.grpo.objectives.refl import ReFL
from fastvideo_grpo.grpo.objectives.trust_regions import Clip, ClipRange, TrustRegion

__all__ = [
    "AWM",
    "DDPO",
    "DPO",
    "DPOK",
    "GRPO",
    "NFT",
    "OBJECTIVES",
    "CleanReplay",
    "DiffusionDPO",
    "Objective",
    "ReFL",
    "Replay",
    "SampleBatch",
    "get",
    "names",
    "takes",
    "taking",
]

SETTINGS = ("trust_region", "advantage_range", "clip_range", "advantage_clip", "kl_weight", "ema_kl_weight")
"""What every objective may ask for by an argument of that name; its other arguments are ``grpo.objective_params``."""

_NEEDS = ("needs_reference", "needs_reward_gradients", "pairs")

Make = Callable[..., Objective]


OBJECTIVES: Registry[Make] = Registry("objective", "fastvideo_grpo.objectives", problem=not_callable)


def names() -> list[str]:
    """The known objectives, those of other packages included."""
    return OBJECTIVES.names()


def takes(name: str, setting: str) -> bool:
    """Whether the objective has an argument of that name, ValueError for an unknown objective."""
    return setting in _arguments(OBJECTIVES[name])


def taking(setting: str) -> list[str]:
    """The objectives that have an argument of that name."""
    return [name for name, make in OBJECTIVES.usable().items() if setting in _arguments(make)]


def on_clean_samples() -> list[str]:
    """The objectives that train on clean samples with noise."""
    return [name for name, make in OBJECTIVES.usable().items() if getattr(make, "clean", False)]


def get(
    name: str,
    *,
    clip_range: float,
    advantage_clip: float | None,
    kl_weight: float,
    ema_kl_weight: float = 0.0,
    trust_region: TrustRegion | None = None,
    advantage_range: AdvantageRange | None = None,
    params: Mapping[str, Any] | None = None,
) -> Objective:
    """The objective called ``name``, given those of ``SETTINGS`` that it asks for, and its own ``params``.

    Args:
        trust_region: default: clipped at ``clip_range``.
        advantage_range: default: +- ``advantage_clip``.

    Raises:
        ValueError: an unknown name, an unknown or missing parameter, a value that the objective refuses, or an
            objective that does not say what it needs.
    """
    make = OBJECTIVES[name]
    arguments = _arguments(make)
    settings: dict[str, Any] = {
        "trust_region": Clip(ClipRange(clip_range, clip_range)) if trust_region is None else trust_region,
        "advantage_range": (advantage_clip, None) if advantage_range is None else advantage_range,
        "clip_range": clip_range,
        "advantage_clip": advantage_clip,
        "kl_weight": kl_weight,
        "ema_kl_weight": ema_kl_weight,
    }
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
    objective = make(**asked, **params)
    lacking = [part for part in ("loss", *_NEEDS) if not hasattr(objective, part)]
    if lacking:
        raise ValueError(f"objective {name} does not say {', '.join(lacking)}; see fastvideo_grpo/grpo/objectives/base.py")
    return objective


def _arguments(make: Make) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(make).parameters


OBJECTIVES.register("grpo", GRPO)
OBJECTIVES.register("ddpo", DDPO)
OBJECTIVES.register("dpok", DPOK)
OBJECTIVES.register("refl", ReFL)
OBJECTIVES.register("dpo", DPO)
OBJECTIVES.register("nft", NFT)
OBJECTIVES.register("awm", AWM)
OBJECTIVES.register("diffusion_dpo", DiffusionDPO)
