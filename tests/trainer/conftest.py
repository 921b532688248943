"""The tiny random checkpoints, and trainers on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import make_trainer, tiny_checkpoint  # noqa: F401  (fixtures)


@pytest.fixture(scope="session")
def tiny_flux(tiny_checkpoint) -> Path:  # noqa: F811
    return tiny_checkpoint("flux")


@pytest.fixture(scope="session")
def tiny_hunyuan_video(tiny_checkpoint) -> Path:  # noqa: F811
    return tiny_checkpoint("hunyuan_video")


@pytest.fixture(scope="session")
def tiny_skyreels_i2v(tiny_checkpoint) -> Path:  # noqa: F811
    return tiny_checkpoint("skyreels_i2v")


@pytest.fixture(scope="session")
def tiny_wan(tiny_checkpoint) -> Path:  # noqa: F811
    return tiny_checkpoint("wan")


@pytest.fixture(scope="session")
def tiny_stable_diffusion(tiny_checkpoint) -> Path:  # noqa: F811
    return tiny_checkpoint("stable_diffusion")
