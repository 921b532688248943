"""The folder that a tiny checkpoint is written to: whether it may be, and that it appears when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(folder: Path, what: str, is_one: Callable[[Path], bool], *, overwrite: bool = False) -> None:
    """Raise FileExistsError unless `what`, "a FLUX checkpoint", may be written to `folder`.

    It may when nothing is there, and with `overwrite` when there `is_one`.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder, or pass --overwrite")
    if not is_one(folder):
        raise FileExistsError(
            f"{folder} holds something else than {what}, so it is not overwritten; "
            "choose another folder, or empty this one yourself"
        )


def check_choice(model: str, what: str, choice: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `choice`, of a `what` of the tiny `model`, is one of those `allowed`."""
    if choice not in allowed:
        raise ValueError(f"tiny {model} has no {what} '{choice}'; allowed: {', '.join(allowed)}")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """The path of a folder to make and fill in the block; when it is left without an error, that one takes the place of
    `folder` and of what is in it."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
