"""What a run is doing and how it ended, for the next start: ``status.json``.

A process that is killed, runs out of memory, or is ended from within by a library or a reward (``os._exit``, a crash) says
nothing on its way out. What it was doing stands in this file, and the next start tells.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fastvideo_grpo.disk.durable_files import write_atomic
from fastvideo_grpo.errors import one_line

logger = logging.getLogger(__name__)

FILE = "status.json"

_PHASES = {
    "rollout": "sampling",
    "reward": "scoring",
    "exchange": "exchanging trajectories",
    "update": "updating the weights",
    "evaluation": "evaluating",
}


class RunStatus:
    """Keeps ``folder/status.json`` up to date from ``__enter__`` to ``__exit__``; the run's folder is this process's.

    The file is on disk before ``__enter__`` returns. A change after it takes some microseconds, and outlives the process,
    not the machine. A disk that refuses is told once, and the run goes on without.

    Args:
        folder: of the run; None: nothing is kept (all ranks but the first).

    Attributes:
        before: how the run that was here before ended, if that was not as it should: a line for the user.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.before: str | None = None
        self._path = None if folder is None else folder / FILE
        self._file: int | None = None
        self._lock = threading.Lock()  # rewards begin and end in their threads
        self._state: dict[str, Any] = {"ended": None, "doing": "setting up", "iteration": None, "rewards": []}

    def __enter__(self) -> RunStatus:
        if self._path is None:
            return self
        self.before = how_it_ended(self._path.parent)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        self._state = {"pid": os.getpid(), "host": socket.gethostname(), "started": started, **self._state}
        try:
            write_atomic(self._path, self._content())
            self._file = os.open(self._path, os.O_WRONLY)
        except OSError as error:
            logger.error("%s was not written: %s; the run goes on without it", self._path, error)
            with suppress(OSError):
                self._path.unlink(missing_ok=True)  # what it says is of another run
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end("closed")
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def doing(self, what: str) -> None:
        """What the run does from now on: a phase of :class:`~fastvideo_grpo.tracking.statistics.Clock`, or in words."""
        self._change(doing=_PHASES.get(what, what))

    def iteration(self, number: int) -> None:
        """An iteration begins; the first one is 1."""
        self._change(iteration=number)

    def rewards(self, names: Collection[str]) -> None:
        """The rewards that are at work in this process, from now on."""
        self._change(rewards=sorted(names))

    def end(self, how: str) -> None:
        """The run has ended as it should ("finished", "stopped"); what is said of its end first counts."""
        if self._state["ended"] is None:
            self._change(ended=how)

    def failed(self, error: BaseException) -> None:
        """The run ends with an error, or by Ctrl-C."""
        self.end("interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {one_line(error)[:500]}")

    def _change(self, **changes: Any) -> None:
        with self._lock:
            if all(self._state[key] == value for key, value in changes.items()):
                return
            self._state.update(changes)
            if self._file is None:
                return
            try:
                content = self._content()  # in place: it stays within the block that the disk has given already
                os.ftruncate(self._file, os.pwrite(self._file, content, 0))
            except OSError as error:
                logger.error("%s was not written: %s; the run goes on without it", self._path, error)
                os.close(self._file)
                self._file = None

    def _content(self) -> bytes:
        state = {**self._state, "rewards": [name[:50] for name in self._state["rewards"][:10]]}
        return json.dumps(state, indent=1, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def how_it_ended(folder: Path) -> str | None:
    """How the last run in ``folder`` ended, a line; None where there was none, or it ended as it should, or nothing is known.

    To be asked by who holds the folder's lock: no other run is going on there.
    """
    try:
        # The first object: behind it the end of a longer one may stand, if the process was ended between two calls.
        state, _ = json.JSONDecoder().raw_decode((folder / FILE).read_text(encoding="utf-8"))
        where = f"while {state['doing']}"
        if state["iteration"] is not None:
            where = f"in iteration {int(state['iteration'])}, {where}"
        rewards = [str(name) for name in state["rewards"]]
        if rewards:
            where += f"{' with' if state['doing'] == 'scoring' else ', at work'} reward {' and '.join(rewards)}"
        who = f"the last run in {folder} (process {state['pid']} on {state['host']}, started {state['started']})"
        ended = state["ended"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):  # there is none, or it is no such file
        return None
    if ended is None:
        apart = "".join(f"; rewards.models.{name}.placement=process keeps such a reward apart" for name in rewards[:1])
        by = "killed, out of memory, or ended by a reward or a library from within" if rewards else "killed or out of memory"
        return f"{who} ended without a word {where}: {by}{apart}"
    if str(ended).startswith("failed"):
        return f"{who} {ended.replace('failed', f'failed {where}', 1)}"
    return f"{who} was interrupted {where}" if ended == "interrupted" else None
