"""Things of one sort by name: this project's own, and those that installed packages offer under an entry point group.

Rewards, transitions, objectives and models are such sorts (docs/extending.md). A package is not imported before one of its
names is asked for.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Generic, TypeVar

from fastvideo_grpo.errors import one_line

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one sort by name.

    Args:
        what: the sort, for messages ("transition").
        group: the entry point group under which packages offer them.
        problem: what is wrong with a thing that a package offers under a name, None where nothing is.
        import_own: imports the files whose import registers this project's own, where nobody else does.
    """

    def __init__(
        self,
        what: str,
        group: str,
        *,
        problem: Callable[[str, Any], str | None],
        import_own: Callable[[], None] = lambda: None,
    ) -> None:
        self.what, self.group = what, group
        self._problem, self._import_own = problem, import_own
        self._registered: dict[str, T] = {}

    def register(self, name: str, thing: T) -> None:
        """Make ``self[name]`` return ``thing``.

        Raises:
            ValueError: the name is something else's (the same class again, as after a reload, is no conflict).
        """
        known = self._registered.get(name)
        if known is not None and _source(known) != _source(thing):
            raise ValueError(
                f"{self.what} '{name}' is registered twice, by {_source(known)} and by {_source(thing)}; rename one of them"
            )
        self._registered[name] = thing

    def names(self) -> list[str]:
        """All names in alphabetical order, those of other packages included."""
        self._import_own()
        return sorted({*self._registered, *(point.name for point in entry_points(self.group))})

    def own(self) -> dict[str, T]:
        """This project's things by name; no package is imported for them."""
        self._import_own()
        return dict(self._registered)

    def usable(self) -> dict[str, T]:
        """All things by name, without those of other packages that cannot be had (told when one is asked for)."""
        found = {}
        for name in self.names():
            try:
                found[name] = self[name]
            except ValueError:
                continue
        return found

    def __getitem__(self, name: str) -> T:
        """The thing called ``name``.

        Raises:
            ValueError: an unknown name (says the nearest and all), one that is offered more than once, an entry point that
                cannot be imported, or that gives something else than this sort.
        """
        self._import_own()
        points = [point for point in entry_points(self.group) if point.name == name]
        own = name in self._registered
        if own + len(points) > 1:
            owners = [_source(self._registered[name])] if own else []
            owners += [_offer(point) for point in points]
            raise ValueError(f"{self.what} '{name}' is offered more than once: {', '.join(owners)}; uninstall or rename one")
        if own:
            return self._registered[name]
        if not points:
            known = self.names()
            raise ValueError(f"unknown {self.what} '{name}'{nearest(name, known)}; known: {', '.join(known)}")
        offered = f"{self.what} '{name}' is offered by the entry point {_offer(points[0])}"
        try:
            thing = points[0].load()
        except (Exception, SystemExit) as error:  # whatever a package does while it is imported
            raise ValueError(f"{offered}, which cannot be imported: {one_line(error)}") from error
        problem = self._problem(name, thing)
        if problem is not None:
            raise ValueError(f"{offered}, {problem}")
        return thing


def not_callable(name: str, offered: Any) -> str | None:
    """What is wrong with a thing that is no class and no function, for a :class:`Registry` of what makes things."""
    return None if callable(offered) else f"which is no class and no function, but a {type(offered).__name__}"


def entry_points(group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    """What installed packages offer under ``group``."""
    return _installed(group, tuple(sys.path))


@cache  # reading every package's metadata takes up to 0.2 s, and a configuration asks several times
def _installed(group: str, path: tuple[str, ...]) -> tuple[importlib.metadata.EntryPoint, ...]:
    # A distribution found twice on sys.path lists its entry points twice.
    return tuple({(point.name, point.value): point for point in importlib.metadata.entry_points(group=group)}.values())


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'NAME'?)"`` with the known name nearest to ``name``, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _offer(point: importlib.metadata.EntryPoint) -> str:
    return f"'{point.value}'" + (f" of {point.dist.name} {point.dist.version}" if point.dist is not None else "")


def _source(thing: Any) -> str:
    """Where a class, a function or an object's class is defined."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"
