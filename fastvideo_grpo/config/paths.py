"""``~`` and ``$VARIABLE`` in paths, as a shell would have them: programs are handed ``run.dir=~/runs`` as it stands."""

from __future__ import annotations

import os
import re

from fastvideo_grpo.characters import unusable

_VARIABLE = re.compile(r"\$(?:(\$)|\{([^}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


def expanded(path: str) -> str:
    """``path`` with a leading ``~`` or ``~USER`` as that home, and ``$NAME`` or ``${NAME}`` as the environment has them; ``$$``
    is a dollar sign, and ``./~`` a folder of that name.

    Raises:
        ValueError: it is empty or cannot be written, or there is no such home or variable; says which.
    """

    def value(match: re.Match[str]) -> str:
        if match[1]:
            return "$"
        name = match[2] if match[2] is not None else match[3]
        found = os.environ.get(name, "")
        if not found:
            state = "empty" if name in os.environ else "not set"
            raise ValueError(f"the variable {match[0]} is {state}; set it, or write $$ for a dollar sign")
        return found

    if not path:
        raise ValueError("a path cannot be empty")
    problem = unusable(path)
    if problem is not None:
        raise ValueError(f"a path cannot hold {problem}")
    home, separator, rest = path.partition("/")
    if home.startswith("~"):
        found = os.path.expanduser(home)
        if found.startswith("~") or (home == "~" and os.environ.get("HOME") == ""):
            raise ValueError(f"there is no home {home}; write the folder out, or ./{home} for one of that name")
        home = found
    else:
        home = _VARIABLE.sub(value, home)
    return home + separator + _VARIABLE.sub(value, rest)


def as_typed(path: str | os.PathLike[str]) -> str:
    """What :func:`expanded` makes ``path`` of."""
    text = os.fspath(path)
    return ("./" if text.startswith("~") else "") + text.replace("$", "$$")
