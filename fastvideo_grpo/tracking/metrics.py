"""metrics.jsonl: one JSON object per iteration."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from fastvideo_grpo.durable_files import write_atomic


class MetricsLog:
    """Appends one line per iteration, on disk before ``append`` returns."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, metrics: dict[str, Any]) -> None:
        """Write a line; numbers that JSON does not know (NaN, infinity) become null."""
        line = json.dumps({key: _plain(value) for key, value in metrics.items()}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a torn last one (the process was killed while writing) is left out."""
        if not self.path.is_file():
            return []
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            lines.append(json.loads(line))
        return lines

    def cut_back(self, iterations: int) -> None:
        """Keep the first ``iterations`` iterations: a resumed run writes the later ones again."""
        kept = [line for line in self.read() if line["iteration"] < iterations]
        if self.path.is_file():
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
