"""Worker processes, each of which makes one run after the other.

Nothing here imports torch: a worker sets its number of threads first.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """A run to make, or to find made.

    Attributes:
        name: for a person: study, arm and seed of who asked first.
        folder: ``run.dir``, named by all that the run depends on.
        values: the configuration, as :func:`fastvideo_grpo.models.run_config.build` reads it.
        trained: False measures the untrained model.
        iterations, cost: how many there are, and network evaluations of each.
    """

    name: str
    folder: Path
    seed: int
    values: dict[str, Any]
    trained: bool
    iterations: int
    cost: int

    @property
    def result_file(self) -> Path:
        """Written last, so that what is there is complete."""
        return self.folder / "result.json"

    @property
    def log_file(self) -> Path:
        """What the run printed."""
        return self.folder / "log.txt"

    def result(self) -> dict[str, Any] | None:
        """What was measured, if the run is complete."""
        return json.loads(self.result_file.read_text()) if self.result_file.is_file() else None


@dataclass(frozen=True)
class Finished:
    """A job that ended: with what it returned, or with why not and the file that has the rest."""

    job: Job
    seconds: float
    result: Any = None
    error: str | None = None
    log: Path | None = None


def run_jobs(jobs: Sequence[Job], workers: int, work: Callable[[Job], Any]) -> Iterator[Finished]:
    """Do ``work(job)`` for each job in ``workers`` processes; yields each as it ends.

    What a job prints goes to ``log.txt`` in its folder, a traceback included. A job that raises, or takes its process with
    it, is told and leaves the others alone. The processes end with the iterator, or with the process that has it.

    Args:
        work: importable by name; what it returns must pickle.
    """
    # Spawned: a fork of a process that has torch loaded may hang, and each imports the heavy libraries once anyway.
    context = multiprocessing.get_context("spawn")
    waiting = deque(jobs)
    running: dict[Connection, tuple[Any, Job, float]] = {}
    idle: list[tuple[Any, Connection]] = []

    def start() -> tuple[Any, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        process.start()
        theirs.close()  # else its end is never seen
        return process, ours

    try:
        while waiting or running:
            while waiting and len(running) < workers:
                process, connection = idle.pop() if idle else start()
                try:
                    connection.send(waiting[0])
                except BrokenPipeError:  # it died while it was idle; the next one is another
                    process.join()
                    continue
                running[connection] = (process, waiting.popleft(), time.monotonic())
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                process, job, since = running.pop(ready)
                try:
                    result, error = ready.recv()
                    idle.append((process, ready))
                except EOFError:
                    process.join()
                    code = process.exitcode
                    why = (
                        f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"left with code {code}"
                    )
                    result, error = None, f"its process {why}"
                yield Finished(job, time.monotonic() - since, result, error, job.log_file if error else None)
    finally:
        for _, connection in idle:
            connection.close()  # it leaves by itself
        for connection, (process, _, _) in running.items():
            connection.close()
            process.terminate()
        for process in [process for process, _ in idle] + [process for process, _, _ in running.values()]:
            process.join()


def _serve(connection: Connection, work: Callable[[Job], Any]) -> None:
    """In a worker: jobs until nobody sends any more."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: every core has a worker of its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        job.folder.mkdir(parents=True, exist_ok=True)
        with job.log_file.open("w") as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
            answer: tuple[Any, str | None]
            try:
                answer = (work(job), None)
            except Exception as error:
                traceback.print_exc()
                answer = (None, f"{type(error).__name__}: {error}")
            sys.stdout.flush()
            sys.stderr.flush()
        connection.send(answer)


def _leave_with_parent() -> None:
    """A study that is started again must not meet runs of the one that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
