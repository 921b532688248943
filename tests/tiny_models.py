"""Fixtures: random tiny checkpoints, and trainers on them. A folder's conftest.py imports those that its tests use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from fastvideo_grpo.models.registry import FAMILIES


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """``tiny_checkpoint(kind, **arguments)`` -> a random checkpoint of ``model.kind`` in the published on-disk form.

    ``arguments`` are its writer's; equal ones are written once.
    """
    folders: dict[str, Path] = {}

    def write(kind: str, **arguments: Any) -> Path:
        key = f"{kind} {sorted(arguments.items())}"
        if key not in folders:
            writer = resolve_name(FAMILIES[kind].tiny.writer)
            folders[key] = writer(tmp_path_factory.mktemp("checkpoints") / f"tiny-{kind}", **arguments)
        return folders[key]

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
        from tests.trainer import runs

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
