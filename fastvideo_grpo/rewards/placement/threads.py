"""Work that is done in a thread, one piece after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from fastvideo_grpo.errors import Escape

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
        """Its result, or what it raises, which is an `Exception` always (`Escape` stands for what is none); `cancel()` works
        as long as it has not begun."""
        if self._closed:
            raise RuntimeError(f"{self._name} was closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        answer: Future[T] = Future()
        self._calls.put((call, answer))
        return answer

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """No more calls; those before are still worked off."""
        self._closed = True
        self._calls.put(None)

    def _work(self) -> None:
        while (entry := self._calls.get()) is not None:
            self._answer(*entry)
            del entry  # the thread waits for the next call, and holds nothing of this one

    def _answer(self, call: Callable[[], Any], answer: Future[Any]) -> None:
        if not answer.set_running_or_notify_cancel():
            return
        try:
            if self._start is not None:
                self._start()
                self._start = None  # where it raises, the next call tries again
            result = call()
        except Exception as error:
            answer.set_exception(error)
        except BaseException as error:  # Ctrl-C is raised in the main thread alone: this is the call's own doing
            answer.set_exception(Escape(error))
        else:
            answer.set_result(result)
        finally:
            del call, answer  # an error leads to this frame: in a circle with it, its tensors would stay until collected
