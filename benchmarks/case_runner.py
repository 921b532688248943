"""Cases of a benchmark, each in a process of its own, and the table of what they said."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from machine import Machine

LEAST_SECONDS = 45
GIB = 2**30


@dataclass
class Row:
    """What a case said: numbers, or why there are none.

    Attributes:
        output: the end of what it printed, if it failed.
        left_out: it was not tried.
    """

    case: str
    numbers: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    output: str = ""
    left_out: bool = False


def run_case(case: str, command: Sequence[str], device: str, seconds: float) -> Row:
    """The case by a Python command that calls ``print_numbers``; it may take so many seconds."""
    if seconds < LEAST_SECONDS:
        return Row(case, error="left out: no time left (--minutes)", left_out=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "FASTVIDEO_LOGGING_LEVEL": "WARNING",
    }
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        # What is freed goes back to the system, so that resident memory says what is held.
        environment.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    # A case that is stopped leaves its temporary files.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as environment["TMPDIR"]:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as late:
            _stop(process)
            printed = (late.output or b"").decode(errors="replace")  # before; torchrun ends with pages of its own
            return Row(case, error=f"stopped after {seconds:.0f} s", output=printed[-3000:])
        except KeyboardInterrupt:  # it is in a session of its own
            _stop(process)
            raise
    # The line alone: a traceback may quote what prints it.
    said = re.search(r"RESULT (\{.*\})$", output, re.MULTILINE)
    if said is None:
        return Row(case, error=f"exit code {process.returncode}", output=output[-3000:])
    return Row(case, json.loads(said[1]))


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()  # torchrun ends its workers, which are in sessions of their own
    try:
        process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def print_numbers(numbers: dict[str, Any]) -> None:
    """Of the case that this process is, for ``run_case``."""
    print("RESULT " + json.dumps(numbers), flush=True)


class Results:
    """A table of what cases said, printed row by row."""

    def __init__(
        self,
        name: str,
        machine: Machine,
        about: str,
        header: Sequence[str],
        cells: Callable[[dict[str, Any]], Sequence[str]],
        out: Path | None,
    ) -> None:
        """
        Args:
            name: of the script and of the files.
            about: what holds for all rows.
            header: of the columns behind the case; ``cells`` makes them of a case's numbers.
            out: folder of the files; None: there are none.
        """
        self.name, self.machine, self.about, self.columns, self.cells, self.out = name, machine, about, len(header), cells, out
        self.rows: list[Row] = []
        self.lines = [
            f"`python benchmarks/{name}.py`; {machine}. {about}:",
            "",
            f"| case | {' | '.join(header)} |",
            "|---" * (1 + len(header)) + "|",
        ]
        print("\n".join(self.lines), flush=True)

    def add(self, row: Row) -> None:
        """Print the row, write all that there are."""
        cells = [row.error, *[""] * (self.columns - 1)] if row.error else self.cells(row.numbers)
        self.rows.append(row)
        self.lines.append(f"| {row.case} | {' | '.join(cells)} |")
        print(self.lines[-1], flush=True)
        if row.output:
            print(f"the end of what {row.case} printed:\n{row.output}", file=sys.stderr, flush=True)
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
            results = [{"case": each.case, "error": each.error, "output": each.output, **each.numbers} for each in self.rows]
            found = {"machine": asdict(self.machine), "about": self.about, "results": results}
            (self.out / f"{self.name}.json").write_text(json.dumps(found, indent=1) + "\n")
            (self.out / f"{self.name}.md").write_text("\n".join(self.lines) + "\n")

    def exit_code(self, tolerance: float = 0.0) -> int:
        """1, and why on stderr, where a "ratio deviation" is above the tolerance, a case failed or none ran."""
        # Not `> tolerance`: NaN is wrong, too.
        drifted = [row.case for row in self.rows if not row.error and not row.numbers["ratio deviation"] <= tolerance]
        failed = [row.case for row in self.rows if row.error and not row.left_out]
        if drifted:
            print(f"the ratio before the first optimiser step is not 1: {'; '.join(drifted)}", file=sys.stderr)
        if failed:
            print(f"failed: {'; '.join(failed)}", file=sys.stderr)
        if all(row.left_out for row in self.rows):
            print("no case ran", file=sys.stderr)
            return 1
        return 1 if drifted or failed else 0


def format_gib(measured: float | None, estimated: float) -> str:
    """A cell: bytes on a GPU (None: they were not measured) and their estimate, in GiB."""
    return f"{'-' if measured is None else format(measured / GIB, '.3g')} / {estimated / GIB:.3g}"
