"""Writing files so that a crash leaves the old content or the new, and a full disk ends no run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that its name shows the old content or the new one, never a part: temporary sibling, fsync,
    rename.

    Raises:
        OSError: the disk refused; the old file is untouched and the temporary one removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_synced(temporary, content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def append_line(path: str | os.PathLike[str], line: bytes) -> None:
    """Append a line, whole and on the disk, or leave the file as it was.

    What a crash left without its end stays a line of its own.

    Args:
        line: without its line break.

    Raises:
        OSError: the disk refused.
    """
    with open(path, "a+b", buffering=0) as file:
        begin = file.seek(0, os.SEEK_END)
        torn = False
        if begin:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        content = memoryview((b"\n" if torn else b"") + line + b"\n")
        try:
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(begin)
            raise


@contextmanager
def keep_going(file: str | os.PathLike[str]) -> Iterator[None]:
    """A full disk must not end a run: what cannot be written is told, and training goes on."""
    try:
        yield
    except OSError as error:
        logger.error("%s was not written: %s; the run goes on without it", file, error)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
