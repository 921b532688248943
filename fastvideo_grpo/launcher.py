"""What torchrun, or another launcher, says of a process in its environment. A variable that is set to nothing is not set."""

from __future__ import annotations

import os

from fastvideo_grpo.errors import UserError

_COUNTS = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "MASTER_PORT": 0}
"""The numbers, and the least that each can be."""


def number(variable: str, otherwise: int) -> int:
    """A variable as a number, ``otherwise`` where it is not set.

    Raises:
        UserError: it is none, or too small.
    """
    text, least = os.environ.get(variable, "").strip(), _COUNTS[variable]
    if not text:
        return otherwise
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise UserError(
            f"the environment has {variable}={text!r}, which a launcher sets to a whole number of at least {least}: start the "
            f"command with torchrun, or unset {variable} to run one process"
        )
    return int(text)


def rank() -> int:
    """Index of this process among all; raises what :func:`number` does."""
    return number("RANK", 0)


def world_size() -> int:
    """Number of processes; raises what :func:`number` does."""
    return number("WORLD_SIZE", 1)


def check(*, complete: bool = False) -> None:
    """Take variables that are set to nothing out of the environment, since libraries read them, too; check the others.

    Args:
        complete: this process is about to meet the others, for which it has to know them.

    Raises:
        UserError: a variable is no number, two of them cannot both be, or some are missing.
    """
    for variable in (*_COUNTS, "MASTER_ADDR"):
        if not os.environ.get(variable, "set").strip():
            del os.environ[variable]
    for variable in _COUNTS:
        number(variable, 0)
    for index, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if size in os.environ and number(index, 0) >= number(size, 1):
            raise UserError(
                f"the environment has {index}={number(index, 0)} and {size}={number(size, 1)}, but the first counts from 0 to "
                f"{number(size, 1) - 1}: start the command with torchrun, or unset both to run one process"
            )
    missing = [variable for variable in ("RANK", "MASTER_ADDR", "MASTER_PORT") if variable not in os.environ]
    if complete and "WORLD_SIZE" in os.environ and missing:
        raise UserError(
            f"the environment has WORLD_SIZE={os.environ['WORLD_SIZE']}, but not {', '.join(missing)}: start the command with "
            "torchrun, or unset WORLD_SIZE to run one process"
        )
