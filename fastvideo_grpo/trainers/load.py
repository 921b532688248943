"""From a configuration to the trainer of its model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from fastvideo_grpo.config import Config
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.families import configured_prompts
from fastvideo_grpo.trainers.base import GRPOTrainer, embedding_cache, to_encode

TRAINERS = {
    "flux": ("fastvideo_grpo.trainers.flux", "FluxGRPOTrainer"),
    "hunyuan_video": ("fastvideo_grpo.trainers.hunyuan_video", "HunyuanVideoGRPOTrainer"),
    "skyreels_i2v": ("fastvideo_grpo.trainers.skyreels_i2v", "SkyReelsI2VGRPOTrainer"),
    "wan": ("fastvideo_grpo.trainers.wan", "WanGRPOTrainer"),
    "stable_diffusion": ("fastvideo_grpo.trainers.stable_diffusion", "StableDiffusionGRPOTrainer"),
}


def trainer_class(kind: str) -> type[GRPOTrainer]:
    """The trainer of a ``model.kind``; only its own module is imported."""
    module, name = TRAINERS[kind]
    return getattr(import_module(module), name)


def load_trainer(config: Config, world: World) -> GRPOTrainer:
    """Load the checkpoint. Text encoders stay on disk when every prompt's embedding is cached already."""
    cls = trainer_class(config.model.kind)
    with_text_encoders = True
    if config.prompts.embeddings != "none":
        cache = embedding_cache(config, Path(config.model.path), cls, world)
        with_text_encoders = bool(cache.missing(to_encode(configured_prompts(config), config)))
    return cls(config, world, with_text_encoders=with_text_encoders)  # type: ignore[call-arg]
