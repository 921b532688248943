"""What belongs to the whole training process, and not to a reward in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def process_settings_kept() -> Iterator[None]:
    """Afterwards the working directory, torch's default dtype and its number of threads are what they were: a run reads and
    writes by relative paths, and its sums depend on the other two."""
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    try:
        yield
    finally:
        os.fchdir(folder)
        os.close(folder)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
