"""What belongs to the whole training process, and not to a reward in it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

_TORCH: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    *(
        (partial(getattr, torch.backends.cudnn, name), partial(setattr, torch.backends.cudnn, name))
        for name in ("allow_tf32", "benchmark", "deterministic")
    ),
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class _Settings:
    """The process's working directory and torch's settings, as they are."""

    def __init__(self) -> None:
        self._folder = os.open(".", os.O_PATH | os.O_DIRECTORY)
        self._values = [_value(get) for get, _ in _TORCH]

    def restore(self) -> None:
        os.fchdir(self._folder)
        for (get, set_), value in zip(_TORCH, self._values, strict=True):
            if value is not None and _value(get) != value:
                set_(value)

    def close(self) -> None:
        os.close(self._folder)


def _value(get: Callable[[], Any]) -> Any:
    """A setting; None where torch does not say, since it was set by its newer names for the precision of products."""
    with contextlib.suppress(RuntimeError):
        return get()
    return None


_lock = threading.Lock()
_inside = 0
_before: _Settings | None = None
"""From when nobody was inside: what one reward has changed is not what another one found."""


@contextmanager
def process_settings_kept() -> Iterator[None]:
    """Afterwards what a run goes by is as it was: the working directory (its paths may be relative), torch's default dtype and
    device, number of threads, grad mode, determinism and TF32 (its sums depend on them), and who listens to Ctrl-C and to the
    other signals that end a run. Of several threads that are inside at once each puts back what was before the first came."""
    global _inside, _before
    grad_mode, device = torch.is_grad_enabled(), torch.get_default_device()  # of this thread, unlike the others
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    with _lock:
        if _before is None:
            _before = _Settings()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            _before.restore()
            if _inside == 0:
                _before.close()
                _before = None
        torch.set_grad_enabled(grad_mode)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        if threading.current_thread() is threading.main_thread():  # in another one nobody can change them
            for number, handler in handlers.items():
                if handler is not None and signal.getsignal(number) != handler:
                    signal.signal(number, handler)
