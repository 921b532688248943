"""Git LFS pointers: what a clone without Git LFS leaves in place of large files."""

from __future__ import annotations

from pathlib import Path

_BEGINNING = b"version https://git-lfs"


def is_pointer(path: Path) -> bool:
    """Whether the file is a pointer."""
    with path.open("rb") as file:
        return file.read(len(_BEGINNING)) == _BEGINNING


def refuse_pointer(start: bytes, expected: str) -> None:
    """Raise ValueError if a file that begins with `start` is a pointer, where `expected` should be."""
    if start.startswith(_BEGINNING):
        raise ValueError(f"expected {expected}, found a Git LFS pointer, which stands for the file until it is fetched")
