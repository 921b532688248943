"""What holds for all tests: what the workers of a session share, who runs which files, which tests are skipped, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests import fork_server

# Files that take long, the longest first: a worker that got one of them last would let the other wait. The first two train in
# the workers themselves: who then asks for the fork server waits for it alone.
LONGEST = (
    "tests/trainer/test_commands.py",
    "tests/trainer/test_stable_diffusion.py",
    "tests/promises/test_processes.py",
    "tests/promises/test_resume.py",
    "tests/promises/test_ratio_one.py",
    "tests/trainer/test_slurm.py",
    "tests/test_engines_distributed.py",
    "tests/test_reward_placement.py",
    "tests/promises",
    "tests/trainer",
    "tests/test_config.py",
    "tests/test_tiny",
)


def pytest_configure(config: pytest.Config) -> None:
    """A folder for what all workers use: the fork server, checkpoints that are only read."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="fastvideo-grpo-tests-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ[fork_server.SESSION_VARIABLE] = folder.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: next((n for n, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked and "torch" not in sys.modules:
        return
    import torch

    if not torch.cuda.is_available():
        # Asked whether there is one, as FastVideo's layers ask in every call, torch looks for a driver anew each time; not so
        # where none may be used.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class FilesAndModels(LoadScopeScheduling):
    """A worker gets a file at a time, in the order of the items; of a promise's file one model at a time."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        model = re.search(r"\[(\w+)", test) if file.startswith("tests/promises/") else None
        return f"{file} {model[1]}" if model else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    config.option.loadscopereorder = False  # by numbers of tests
    return FilesAndModels(config, log)


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """What a shell starts in the background has SIGINT ignored, and so have its children: also those that tests interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
