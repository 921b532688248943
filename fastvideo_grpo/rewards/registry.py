"""Rewards by name: the files of this package, and packages that offer one under the entry point group below."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastvideo_grpo.rewards.base import DifferentiableReward, Reward

ENTRY_POINT_GROUP = "fastvideo_grpo.rewards"

Factory = Callable[..., Reward]
F = TypeVar("F", bound=Factory)
_registered: dict[str, Factory] = {}


def register(kind: str) -> Callable[[F], F]:
    """Decorate a reward class, or a function that returns a reward, to make it known as `kind`.

    Its keyword arguments are what `rewards.models.NAME.params` may hold; one called `checkpoint` receives
    `rewards.models.NAME.checkpoint`. Raises ValueError when something else already has that kind.
    """

    def add(factory: F) -> F:
        known = _registered.get(kind)
        if known is not None and _source(known) != _source(factory):
            raise ValueError(
                f"reward kind '{kind}' is registered twice, by {_source(known)} and by {_source(factory)}; rename one of them"
            )
        _registered[kind] = factory
        return factory

    return add


def kinds() -> list[str]:
    """All known kinds in alphabetical order, those of other packages included."""
    _import_own()
    return sorted({*_registered, *(point.name for point in _entry_points())})


def check(kind: str, *, checkpoint: str | None = None, params: Mapping[str, Any] | None = None) -> Factory:
    """Return what makes rewards of `kind`, without making one.

    Raises ValueError for an unknown kind, an unknown or missing parameter, and a checkpoint that is given to a reward
    that has none or missing for one that needs it.
    """
    factory = _find(kind)
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
                f"reward '{kind}' has no parameter '{name}'{_nearest(name, allowed)}; allowed: {', '.join(allowed) or 'none'}"
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


def differentiable(kind: str) -> bool:
    """Whether rewards of `kind` are `DifferentiableReward`s, without making one: what is registered must be the class
    itself, not a function that returns a reward. Raises ValueError for an unknown kind."""
    factory = _find(kind)
    return isinstance(factory, type) and issubclass(factory, DifferentiableReward)


def differentiable_kinds() -> list[str]:
    """All kinds that have gradients, in alphabetical order, without those of other packages that cannot be imported."""

    def usable(kind: str) -> bool:
        try:
            return differentiable(kind)
        except ValueError:  # told when that kind is asked for
            return False

    return [kind for kind in kinds() if usable(kind)]


def create(kind: str, *, checkpoint: str | None = None, params: Mapping[str, Any] | None = None) -> Reward:
    """Make a reward of `kind`. Raises what `check` raises before anything is loaded, and what the reward raises."""
    factory = check(kind, checkpoint=checkpoint, params=params)
    arguments = dict(params or {})
    if checkpoint is not None:
        arguments["checkpoint"] = checkpoint
    return factory(**arguments)


def _find(kind: str) -> Factory:
    _import_own()
    points = [point for point in _entry_points() if point.name == kind]
    if len(points) + (kind in _registered) > 1:
        owners = [_source(_registered[kind])] if kind in _registered else []
        owners += [point.value for point in points]
        raise ValueError(f"reward kind '{kind}' is offered more than once: {', '.join(owners)}; uninstall or rename one")
    if kind in _registered:
        return _registered[kind]
    if points:
        try:
            return points[0].load()
        except Exception as error:
            raise ValueError(
                f"reward kind '{kind}' is offered by the entry point '{points[0].value}', which cannot be "
                f"imported: {type(error).__name__}: {error}"
            ) from error
    known = kinds()
    raise ValueError(f"unknown reward kind '{kind}'{_nearest(kind, known)}; known: {', '.join(known)}")


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    # A distribution found twice on sys.path lists its entry points twice.
    return list(
        {(point.name, point.value): point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}.values()
    )


def _import_own() -> None:
    """Import every file of this package, so that a new reward is one new file. They import heavy libraries late."""
    import fastvideo_grpo.rewards as package

    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)


def _source(factory: Factory) -> str:
    return f"{getattr(factory, '__module__', '?')}.{getattr(factory, '__qualname__', factory)}"


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""
