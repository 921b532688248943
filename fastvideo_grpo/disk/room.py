"""Whether a disk takes what is going to be written: tried before anything expensive starts."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a full disk, or a quota that is used up, answers."""

REFUSING = (
    *FULL,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
)
"""What disks answer that a person has to look after."""

_PROBE = 1 << 20  # bytes


@dataclass(frozen=True)
class Refusal:
    """Why a disk takes no file: ``reason`` in words; ``full``: there is no room."""

    reason: str
    full: bool

    @classmethod
    def of(cls, failure: OSError) -> Refusal:
        return cls(describe(failure), failure.errno in FULL)


def describe(failure: OSError) -> str:
    """The reason, and the file that it is about."""
    reason = failure.strerror or str(failure)
    return f"{reason} ({failure.filename})" if failure.filename else reason


def nearest_folder(path: Path) -> Path:
    """The folder, or of its parents the nearest that is there: what will be made in it comes to lie on its disk.

    Raises:
        OSError: a file is in the way, a link that points nowhere, or a folder that may not be looked into.
    """
    folder = path.absolute()
    while True:
        try:
            folder.lstat()
            break
        except (FileNotFoundError, NotADirectoryError):
            folder = folder.parent
    if not folder.exists():
        raise NotADirectoryError(errno.ENOTDIR, f"a link to {os.readlink(folder)}, which is not there", str(folder))
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file, not a folder", str(folder))
    return folder


def refusal(path: Path) -> Refusal | None:
    """Why no file can be written in a folder that is there or will be made; None where one can.

    A file of a MiB is written. It has no name where the file system can do that, and is gone afterwards; no folder is made.
    """
    try:
        folder = nearest_folder(path)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_PROBE))
                file.flush()
                os.fsync(file.fileno())
        except OSError as failure:  # without the file's name, which nobody knows
            raise OSError(failure.errno, failure.strerror, str(folder)) from failure
    except OSError as failure:
        return Refusal.of(failure)
    return None


def refused_file(path: Path) -> Refusal | None:
    """Why a file that is there cannot be written to; None where it can, or is not there."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
        if path.exists():
            with path.open("ab"):
                pass
    except OSError as failure:
        return Refusal.of(failure)
    return None


def free_folder(folder: Path) -> Path:
    """The first of FOLDER, FOLDER-2, FOLDER-3, ... that is not there."""
    number = 2
    candidate = folder
    while os.path.lexists(candidate):
        candidate = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return candidate


def free_bytes(path: Path) -> int:
    """Free bytes on the disk on which a folder lies, or will.

    Raises:
        OSError: see :func:`nearest_folder`.
    """
    return shutil.disk_usage(nearest_folder(path)).free


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; what disappears meanwhile does not count."""
    total = 0
    for entry in folder.rglob("*"):
        try:
            status = entry.lstat()
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(status.st_mode):
            total += status.st_size
    return total
