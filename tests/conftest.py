"""Tests marked `gpu` are skipped where there is no CUDA device; Ctrl-C is what it is at a terminal."""

from __future__ import annotations

import signal

import pytest


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
