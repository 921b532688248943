"""Rewards by name: the files in models/ and rules/, and packages that offer one under the entry point group below."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

from fastvideo_grpo.extensions import Registry, nearest, not_callable
from fastvideo_grpo.model_files.downloads import Source
from fastvideo_grpo.rewards import models, rules
from fastvideo_grpo.rewards.base import DifferentiableReward, MediaKind, Reward

Factory = Callable[..., Reward]
F = TypeVar("F", bound=Factory)


def _import_own() -> None:
    """Import every file of these folders, so that a new reward is one new file. They import heavy libraries late."""
    for folder in (models, rules):
        for module in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."):
            importlib.import_module(module.name)


REWARDS: Registry[Factory] = Registry("reward kind", "fastvideo_grpo.rewards", problem=not_callable, import_own=_import_own)


def register(kind: str) -> Callable[[F], F]:
    """Decorate a reward class, or a function that returns a reward, to make it known as `kind`.

    Its keyword arguments are what `rewards.models.NAME.params` may hold; one called `checkpoint` receives
    `rewards.models.NAME.checkpoint`. Raises ValueError when something else already has that kind.
    """

    def add(factory: F) -> F:
        REWARDS.register(kind, factory)
        return factory

    return add


def kinds() -> list[str]:
    """All known kinds in alphabetical order, those of other packages included."""
    return REWARDS.names()


def check(kind: str, *, checkpoint: str | None = None, params: Mapping[str, Any] | None = None) -> Factory:
    """Return what makes rewards of `kind`, without making one.

    Raises ValueError for an unknown kind, an unknown or missing parameter, and a checkpoint that is given to a reward
    that has none or missing for one that needs it.
    """
    factory = REWARDS[kind]
    params = dict(params or {})
    signature = inspect.signature(factory)
    accepted = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    allowed = [name for name in accepted if name != "checkpoint"]
    for name in params:
        if name not in allowed and (not takes_any or name == "checkpoint"):
            raise ValueError(
                f"reward '{kind}' has no parameter '{name}'{nearest(name, allowed)}; allowed: {', '.join(allowed) or 'none'}"
            )
    if checkpoint is not None and "checkpoint" not in accepted and not takes_any:
        raise ValueError(f"reward '{kind}' takes no checkpoint, but was given '{checkpoint}'; remove the key")
    required = [name for name, parameter in accepted.items() if parameter.default is parameter.empty]
    for name in required:
        if name == "checkpoint" and checkpoint is None:
            raise ValueError(f"reward '{kind}' needs a checkpoint; set rewards.models.NAME.checkpoint to its file or folder")
        if name != "checkpoint" and name not in params:
            raise ValueError(f"reward '{kind}' needs the parameter '{name}'; set rewards.models.NAME.params.{name}")
    return factory


_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a text (in quotes where YAML reads something else)"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "None": ((type(None),), "null"),
}


def check_types(kind: str, params: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the parameter, for one whose value is not what the reward annotates it with, as far as that is
    a text, a number, a truth value or one of these."""
    parameters = inspect.signature(REWARDS[kind]).parameters
    for name in params.keys() & parameters.keys():
        annotation = parameters[name].annotation
        text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        sorts = [part.strip() for part in text.split("|")]
        if not all(sort in _TYPES for sort in sorts):
            continue
        value = params[name]
        fitting = any(isinstance(value, _TYPES[sort][0]) and isinstance(value, bool) <= (sort == "bool") for sort in sorts)
        if not fitting:
            wanted = " or ".join(_TYPES[sort][1] for sort in sorts)
            raise ValueError(f"reward '{kind}': the parameter '{name}' is {value!r}; it must be {wanted}")


def differentiable(kind: str) -> bool:
    """Whether rewards of `kind` are `DifferentiableReward`s, without making one: what is registered must be the class
    itself, not a function that returns a reward. Raises ValueError for an unknown kind."""
    return _has_gradient(REWARDS[kind])


def differentiable_kinds() -> list[str]:
    """All kinds that have gradients, in alphabetical order, without those of other packages that cannot be imported."""
    return [kind for kind, factory in REWARDS.usable().items() if _has_gradient(factory)]


def _has_gradient(factory: Factory) -> bool:
    return isinstance(factory, type) and issubclass(factory, DifferentiableReward)


def paths(kind: Any) -> frozenset[str]:
    """The parameters of rewards of `kind` that are files or folders, which its class (or function) names in an attribute
    `paths`: in these `~` and variables are expanded. None of a kind that is not known here."""
    try:
        return frozenset(getattr(REWARDS[kind], "paths", ()))
    except ValueError:  # told with all other wrong values; or it is known in another environment only
        return frozenset()


def source(kind: Any) -> Source | None:
    """Where the checkpoint of rewards of `kind` is to be had, which its class names in an attribute `source`; None of a kind
    that does not say, or is not known here."""
    try:
        return getattr(REWARDS[kind], "source", None)
    except ValueError:
        return None


def create(kind: str, *, checkpoint: str | None = None, params: Mapping[str, Any] | None = None) -> Reward:
    """Make a reward of `kind`.

    Raises what `check` raises before anything is loaded, what the reward raises, and ValueError for what is no reward.
    """
    factory = check(kind, checkpoint=checkpoint, params=params)
    arguments = dict(params or {})
    if checkpoint is not None:
        arguments["checkpoint"] = checkpoint
    reward = factory(**arguments)
    if not isinstance(reward, Reward):
        lacks = ", ".join(name for name in ("outputs", "media_kind", "score", "to", "close") if not hasattr(reward, name))
        raise ValueError(f"reward '{kind}' is no reward: what it makes, {type(reward).__name__}, has no {lacks}")
    outputs = reward.outputs
    names = list(outputs) if isinstance(outputs, tuple | list) else []
    if not names or len(set(map(str, names))) < len(names) or not all(isinstance(o, str) and o and "/" not in o for o in names):
        raise ValueError(
            f"reward '{kind}' has outputs {outputs!r}; it must be a tuple of names, without '/', for example ('quality',)"
        )
    if reward.media_kind not in get_args(MediaKind):
        raise ValueError(f"reward '{kind}' has media_kind {reward.media_kind!r}; allowed: {', '.join(get_args(MediaKind))}")
    return reward
