"""metrics.jsonl: one JSON object per iteration.

Lines that are none (a disk that was full or lost its power, an editor) are named and left out when the file is read, and
moved into metrics.jsonl.set_aside when a run goes on.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo_grpo.disk.durable_files import append_line, write_atomic

logger = logging.getLogger(__name__)

_NAMED = 3
"""So many bad lines are named; the others are counted."""


@dataclass(frozen=True)
class _BadLine:
    """A line that does not count: where it stands (from 1), what it is, why not."""

    number: int
    content: bytes
    why: str


class MetricsLog:
    """Appends one line per iteration, on disk before ``append`` returns."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._named: set[tuple[int, bytes]] = set()

    @property
    def set_aside(self) -> Path:
        """Lines that were found bad when the run went on, as they were."""
        return self.path.with_name(f"{self.path.name}.set_aside")

    def append(self, metrics: dict[str, Any]) -> None:
        """Write a line; numbers that JSON does not know (NaN, infinity) become null.

        Raises:
            OSError: the disk refused; nothing of the line is in the file.
        """
        append_line(self.path, json.dumps({key: _plain(value) for key, value in metrics.items()}).encode())

    def read(self) -> list[dict[str, Any]]:
        """The lines by rising iteration, of several of one iteration the last. Those that do not count are left out, and
        named in a warning, each once."""
        lines, bad = self._parse()
        self._name(bad, "left out")
        return lines

    def cut_back(self, iterations: int) -> None:
        """Keep the first ``iterations`` iterations: a resumed run writes the later ones again. What does not count goes
        into ``set_aside``; with 0 all lines do, since a run that starts over need not be the one that wrote them.

        Raises:
            OSError: the disk refused; the file is as it was.
        """
        lines, bad = self._parse()
        kept = "".join(json.dumps(line) + "\n" for line in lines if line["iteration"] < iterations).encode()
        if not self.path.is_file() or kept == self.path.read_bytes():
            return
        before = [] if iterations else [json.dumps(line).encode() for line in lines]
        for content in [line.content for line in bad] + before:
            append_line(self.set_aside, content)  # before it leaves the file: a crash in between leaves it in both
        write_atomic(self.path, kept)
        self._name(bad, f"set aside in {self.set_aside}")

    def _parse(self) -> tuple[list[dict[str, Any]], list[_BadLine]]:
        """What :meth:`read` returns, and the lines that do not count."""
        if not self.path.is_file():
            return [], []
        contents = self.path.read_bytes().split(b"\n")
        if not contents[-1]:
            contents.pop()  # behind the last line break
        bad = []
        found: dict[int, tuple[int, dict[str, Any]]] = {}
        for number, content in enumerate(contents, start=1):
            line = _line(content)
            if isinstance(line, str):
                bad.append(_BadLine(number, content, line))
                continue
            iteration = line["iteration"]
            if iteration in found:
                first = found[iteration][0]
                bad.append(_BadLine(first, contents[first - 1], f"line {number} has iteration {iteration}, too, and is later"))
            found[iteration] = number, line
        return [found[iteration][1] for iteration in sorted(found)], sorted(bad, key=lambda line: line.number)

    def _name(self, bad: list[_BadLine], what: str) -> None:
        new = [line for line in bad if (line.number, line.content) not in self._named]
        self._named.update((line.number, line.content) for line in new)
        if new:
            named = "; ".join(f"line {line.number}: {line.why}" for line in new[:_NAMED])
            more = f"; and {len(new) - _NAMED} more" if len(new) > _NAMED else ""
            logger.warning("%s: bad lines: %d, %s (%s%s)", self.path, len(new), what, named, more)


def _line(content: bytes) -> dict[str, Any] | str:
    """An iteration's metrics, or why these bytes are none."""
    if not content.strip():
        return "it is blank"
    if b"\0" in content:
        return "it holds NUL bytes"
    try:
        line = json.loads(content.decode("utf-8-sig"))  # an editor may have put a mark at the beginning
    except UnicodeDecodeError:
        return "it is not UTF-8"
    except (ValueError, RecursionError):
        return "it is torn, or not JSON"
    if not isinstance(line, dict):
        return "it is no JSON object"
    iteration = line.get("iteration")
    if type(iteration) is not int or iteration < 0:
        return "it has no iteration" if iteration is None else f"its iteration is {iteration!r}"
    return line


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
