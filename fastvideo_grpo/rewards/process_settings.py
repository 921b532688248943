"""What belongs to the whole training process, and not to a reward in it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_TORCH: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def process_settings_kept() -> Iterator[None]:
    """Afterwards what a run goes by is as it was: the working directory (its paths may be relative), torch's default dtype,
    number of threads, grad mode and determinism (its sums depend on them), and who listens to Ctrl-C and the other signals
    that end a run."""
    folder = os.open(".", os.O_PATH | os.O_DIRECTORY)
    values = [get() for get, _ in _TORCH]
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        os.fchdir(folder)
        os.close(folder)
        for (get, set_), value in zip(_TORCH, values, strict=True):
            if get() != value:
                set_(value)
        if threading.current_thread() is threading.main_thread():  # in another one nobody can change them
            for number, handler in handlers.items():
                if handler is not None and signal.getsignal(number) != handler:
                    signal.signal(number, handler)
