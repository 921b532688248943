"""Tiny SkyReels-V1-I2V checkpoints: HunyuanVideo's diffusers folder with Skywork/SkyReels-V1-Hunyuan-I2V's transformer in it,
which reads twice as many channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastvideo_grpo.models.hunyuan_video import tiny as hunyuan_video
from fastvideo_grpo.tiny import checkpoint_files
from fastvideo_grpo.tiny.checkpoint_files import randomize

MODEL_INDEX: dict[str, Any] = {**hunyuan_video.MODEL_INDEX, "_class_name": "HunyuanSkyreelsImageToVideoPipeline"}


def configs() -> dict[str, dict[str, Any]]:
    """The config.json of each component with weights: those of the random HunyuanVideo, with the image's channels."""
    config = hunyuan_video.configs("random")
    transformer = config["transformer"]
    return {**config, "transformer": {**transformer, "in_channels": 2 * transformer["in_channels"]}}


def write_skyreels_i2v(folder: str | Path, *, seed: int = 0, overwrite: bool = False) -> Path:
    """Write a complete SkyReels-V1-I2V folder with random weights, float32, and return its path.

    Sizes are divisible by 16 pixels, frames 4 k + 1. The same seed writes the same bytes.

    Raises FileExistsError when the folder holds something and `overwrite` is False, or holds something else than a
    SkyReels-V1-I2V checkpoint.
    """
    checkpoint_files.prepare(folder, "SkyReels-V1-I2V", MODEL_INDEX["_class_name"], overwrite=overwrite)
    config = configs()
    modules = hunyuan_video.build_from(config)
    for index, name in enumerate(sorted(modules)):
        randomize(modules[name], 1000 * seed + index)
    return hunyuan_video.write_modules(folder, MODEL_INDEX, config, modules, dtype=torch.float32)
