"""A checkpoint's folder with nothing in it but what is to be read, for libraries that read what they find."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastvideo_grpo.errors import UserError
from fastvideo_grpo.model_files.json_files import is_marked, unmarked
from fastvideo_grpo.model_files.selection import unread


@contextmanager
def clean_folder(checkpoint: Path, components: Iterable[str]) -> Iterator[Path]:
    """A temporary folder like ``checkpoint``, of links: of each component's weight files those that are read
    (:mod:`~fastvideo_grpo.model_files.selection`), JSON without byte order marks.

    FastVideo loads every ``*.safetensors`` of a folder, in the order of the file system. What was loaded (or mapped) stays when
    the folder goes, at the end of the block.

    Raises:
        UserError: there is nowhere to make it.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="fastvideo-grpo-")
    except OSError as error:
        raise UserError(f"no temporary folder can be made ({error}); set TMPDIR to a folder that can be written to") from error
    with made as name:
        folder = Path(name)
        _fill(folder, [path for path in checkpoint.iterdir() if path.suffix == ".json"])
        for component in components:
            left_out = unread(checkpoint / component)
            (folder / component).mkdir()
            _fill(folder / component, [path for path in (checkpoint / component).iterdir() if path.name not in left_out])
        yield folder


def _fill(folder: Path, paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_file():
            place(path, folder / path.name)


def place(source: Path, target: Path) -> None:
    """Link a file, or write it anew where it is JSON that begins with a byte order mark."""
    if not write_unmarked(source, target):
        target.symlink_to(source.resolve())


def write_unmarked(source: Path, target: Path) -> bool:
    """Whether ``source`` is JSON with a byte order mark; then it is written to ``target`` without."""
    if source.suffix != ".json" or not is_marked(source):
        return False
    target.write_bytes(unmarked(source))
    shutil.copystat(source, target)
    return True
