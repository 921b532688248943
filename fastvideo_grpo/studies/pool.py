"""Worker processes, each of which makes one run after the other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a worker imports torch only after it has set its number of threads
    from fastvideo_grpo.studies.jobs import Job


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
                job = waiting.popleft()
                connection.send(job)
                running[connection] = (process, job, time.monotonic())
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
                yield Finished(job, time.monotonic() - since, result, error, log_file(job) if error else None)
    finally:
        for process, connection in [*idle, *((p, c) for c, (p, _, _) in running.items())]:
            connection.close()
            process.terminate()
            process.join()


def log_file(job: Job) -> Path:
    """What a job printed."""
    return job.folder / "log.txt"


def _serve(connection: Connection, work: Callable[[Job], Any]) -> None:
    """In a worker: jobs until nobody sends any more."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: every core has a worker of its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        job.folder.mkdir(parents=True, exist_ok=True)
        with log_file(job).open("w") as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
            try:
                answer = (work(job), None)
            except Exception as error:
                traceback.print_exc()
                answer = (None, f"{type(error).__name__}: {error}")
            sys.stdout.flush()
            sys.stderr.flush()
        connection.send(answer)
