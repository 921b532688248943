"""Tiny SkyReels-V1-I2V checkpoints: HunyuanVideo's diffusers folder with Skywork/SkyReels-V1-Hunyuan-I2V's transformer in it,
which reads twice as many channels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastvideo_grpo.models.hunyuan_video import tiny as hunyuan_video
from fastvideo_grpo.tiny.checkpoint_files import TinyCheckpoint

MODEL_INDEX: dict[str, Any] = {**hunyuan_video.MODEL_INDEX, "_class_name": "HunyuanSkyreelsImageToVideoPipeline"}


def configs() -> dict[str, dict[str, Any]]:
    """The config.json of each component with weights: those of the random HunyuanVideo, with the image's channels."""
    config = hunyuan_video.configs("random")
    transformer = config["transformer"]
    return {**config, "transformer": {**transformer, "in_channels": 2 * transformer["in_channels"]}}


def checkpoint() -> TinyCheckpoint:
    """Float32; sizes divisible by 16 pixels, frames 4 k + 1."""
    return replace(hunyuan_video.checkpoint("random"), model="SkyReels-V1-I2V", index=MODEL_INDEX, configs=configs())


def write_skyreels_i2v(folder: str | Path, *, seed: int = 0, overwrite: bool = False) -> Path:
    """Write a complete SkyReels-V1-I2V folder with random weights and return its path; see `checkpoint` and
    `TinyCheckpoint.write_random`."""
    return checkpoint().write_random(folder, seed=seed, overwrite=overwrite)
