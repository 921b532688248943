"""Fixtures: random tiny checkpoints, and trainers on them. A folder's conftest.py imports those that its tests use."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from fastvideo_grpo.models.registry import FAMILIES
from tests import fork_server


def writer(kind: str) -> Callable[..., Path]:
    """What writes a random checkpoint of ``model.kind`` to the folder it is given."""
    return resolve_name(FAMILIES[kind].tiny.writer)


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Callable[..., Path]:
    """``tiny_checkpoint(kind, **arguments)`` -> a random checkpoint of ``model.kind`` in the published on-disk form.

    ``arguments`` are its writer's; equal ones are written once for all workers of the session, to be read only.
    """

    def write(kind: str, **arguments: Any) -> Path:
        words = [kind, *(f"{key}={value}" for key, value in sorted(arguments.items()))]
        checkpoints = Path(os.environ[fork_server.SESSION_VARIABLE]) / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        folder = checkpoints / " ".join(words)
        with (checkpoints / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                writer(kind)(checkpoints / "unfinished" / f"tiny-{kind}", overwrite=True, **arguments)
                (checkpoints / "unfinished").rename(folder)
        return folder / f"tiny-{kind}"

    return write


@pytest.fixture
def make_trainer(tiny_checkpoint, tmp_path) -> Iterator[Callable[..., Any]]:
    """``make_trainer(section__key=value, ...)`` -> a trainer (FLUX unless ``model__kind`` says so) in this process, ready to
    train. It is closed when it has trained, as ``fastvideo-grpo train`` does, or with the test."""
    made = ExitStack()

    def make(train: bool = True, **overrides: Any) -> Any:
        import torch

        from fastvideo_grpo.engines.parallel import World
        from fastvideo_grpo.models import run_config
        from fastvideo_grpo.trainers.load import load_trainer
        from tests import counted_operations
        from tests.trainer import runs

        counted_operations.share()
        # Thread counts change sums; the forked runs use one thread, too.
        torch.set_num_threads(overrides.get("run__threads", 1))
        empty = tmp_path / "empty.yaml"
        empty.write_text("{}")
        checkpoint = overrides.get("model__path") or tiny_checkpoint(overrides.get("model__kind", "flux"))
        config = run_config.load(empty, runs.settings(tmp_path, checkpoint, **overrides))
        trainer = made.enter_context(closing(load_trainer(config, World.current())))
        train_open = trainer.train

        def train_and_close(stop: Any = None) -> bool:
            with closing(trainer):
                return train_open(stop)

        with ExitStack() as setting_up:
            setting_up.callback(trainer.close)
            if train:
                trainer.setup_training()
            setting_up.pop_all()
        trainer.train = train_and_close
        return trainer

    with made:
        yield make
