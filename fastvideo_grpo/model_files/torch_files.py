"""What ``torch.save`` wrote, read without running anything in it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from fastvideo_grpo.model_files.pointers import refuse_pointer

# How the format of torch before 1.6 begins, a pickled number.
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, if it is made of tensors and plain containers only. Raises ValueError otherwise.

    Mapped where the format allows it: the processes of a machine then read it once, and only one copy of the weights is
    ever in memory.
    """
    found = f"{path.stat().st_size} bytes"
    with path.open("rb") as file:
        start = file.read(64)
    mapped = zipfile.is_zipfile(path)
    if not mapped and not start.startswith(_OLD_TORCH):
        refuse_pointer(start, "a torch file")
        if start.startswith(b"PK"):
            # The list of contents is at the end.
            raise ValueError(f"expected a torch file, found the beginning of one ({found}): it is not complete")
        raise ValueError(f"expected a torch file, found {found} beginning with {start[:16]!r}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises RuntimeError, pickle and zip errors; its advice is to trust the file
        raise ValueError(
            f"expected a torch file of tensors, found {found} that torch.load refuses ({type(error).__name__})"
        ) from error
