"""Where a suite's time goes: `python -m pytest -p tests.cpu_seconds` ends with the seconds of a core that each file took.

Those of processes that a test starts are included. A busy machine gives nearly the numbers of an idle one. On one worker only
(no ``-n``): workers share the server that forks processes, and nobody could say whose they are. What is done once, such as
starting that server and importing FastVideo, is counted with the file that asks for it first.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

_spent: collections.Counter[str] = collections.Counter()
_tests: collections.Counter[str] = collections.Counter()


def _seconds() -> float:
    """Of this process, and of all that descend from it, those that have ended included."""
    spent = sum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        try:
            spent += sum(child.cpu_times()[:4])
        except psutil.Error:  # it has ended meanwhile
            continue
    return spent


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before, file = _seconds(), item.nodeid.partition("::")[0]
    yield
    _spent[file] += _seconds() - before
    _tests[file] += 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("seconds of a core")
    for file, seconds in _spent.most_common():
        terminalreporter.write_line(f"{seconds:8.1f}  {_tests[file]:4d} tests  {file}")
    terminalreporter.write_line(f"{sum(_spent.values()):8.1f}  {sum(_tests.values()):4d} tests")
