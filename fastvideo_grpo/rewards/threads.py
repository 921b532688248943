"""Work that is done in a thread, one piece after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class SerialThread:
    """A thread that works off calls in the order they come. It is started by the first one, and does not hold up the end of
    the program, unlike those of `concurrent.futures`: what hangs in it ends with the program.

    start: called in the thread before anything else.
    """

    def __init__(self, name: str, start: Callable[[], object] | None = None) -> None:
        self._name, self._start = name, start
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Its result, or what it raises; `cancel()` works as long as it has not begun."""
        if self._closed:
            raise RuntimeError(f"{self._name} was closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        answer: Future[T] = Future()
        self._calls.put((call, answer))
        return answer

    def close(self) -> None:
        """No more calls; those before are still worked off."""
        self._closed = True
        self._calls.put(None)

    def _work(self) -> None:
        if self._start is not None:
            self._start()
        while (entry := self._calls.get()) is not None:
            call, answer = entry
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:  # Ctrl-C and the like are for who asked
                answer.set_exception(error)
            else:
                answer.set_result(result)
