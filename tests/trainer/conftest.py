"""The tiny random FLUX, and trainers on it, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import runs


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory) -> Path:
    """A random FLUX in the published on-disk form."""
    from fastvideo_grpo.tiny.flux import write_flux

    return write_flux(tmp_path_factory.mktemp("checkpoints") / "tiny-flux")


@pytest.fixture(scope="session")
def tiny_hunyuan_video(tmp_path_factory) -> Path:
    """A random HunyuanVideo in the published on-disk form."""
    from fastvideo_grpo.tiny.hunyuan_video import write_hunyuan_video

    return write_hunyuan_video(tmp_path_factory.mktemp("checkpoints") / "tiny-hunyuan-video")


@pytest.fixture(scope="session")
def tiny_skyreels_i2v(tmp_path_factory) -> Path:
    """A random SkyReels-V1-I2V in the published on-disk form."""
    from fastvideo_grpo.tiny.skyreels_i2v import write_skyreels_i2v

    return write_skyreels_i2v(tmp_path_factory.mktemp("checkpoints") / "tiny-skyreels-i2v")


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory) -> Path:
    """A random Wan 2.1 in the published on-disk form."""
    from fastvideo_grpo.tiny.wan import write_wan

    return write_wan(tmp_path_factory.mktemp("checkpoints") / "tiny-wan")


@pytest.fixture(scope="session")
def tiny_stable_diffusion(tmp_path_factory) -> Path:
    """A random Stable Diffusion in the published on-disk form."""
    from fastvideo_grpo.tiny.stable_diffusion import write_stable_diffusion

    return write_stable_diffusion(tmp_path_factory.mktemp("checkpoints") / "tiny-stable-diffusion")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Thread counts change sums; the forked runs use one thread too."""
    torch.set_num_threads(1)


@pytest.fixture
def make_trainer(request, tmp_path) -> Iterator[Callable[..., Any]]:
    """``make_trainer(section__key=value, ...)`` -> a trainer (FLUX unless ``model__kind`` says so) in this process, ready to
    train. It is closed when it has trained, as ``fastvideo-grpo train`` does, or with the test."""
    made = ExitStack()

    def make(train: bool = True, **overrides: Any) -> Any:
        from fastvideo_grpo import config as configuration
        from fastvideo_grpo.engines.parallel import World
        from fastvideo_grpo.trainers.load import load_trainer

        empty = tmp_path / "empty.yaml"
        empty.write_text("{}")
        checkpoint = request.getfixturevalue("tiny_" + overrides.get("model__kind", "flux"))
        config = configuration.load(empty, runs.settings(tmp_path, checkpoint, **overrides))
        trainer = made.enter_context(closing(load_trainer(config, World.current())))
        train_open = trainer.train

        def train_and_close(stop: Any = None) -> bool:
            with closing(trainer):
                return train_open(stop)

        with ExitStack() as setting_up:
            setting_up.callback(trainer.close)
            trainer.setup_training() if train else trainer.setup_rewards()
            setting_up.pop_all()
        trainer.train = train_and_close
        return trainer

    with made:
        yield make
