"""What holds for all tests: a folder that the workers of a session share, which tests are skipped, Ctrl-C."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest

from tests import fork_server


def pytest_configure(config: pytest.Config) -> None:
    """A folder for what all workers use: the fork server, checkpoints that are only read."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="fastvideo-grpo-tests-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ[fork_server.SESSION_VARIABLE] = folder.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """What a shell starts in the background has SIGINT ignored, and so have its children: also those that tests interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
