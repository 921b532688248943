"""SkyReels-V1-I2V, image to video: what is known of it before it is loaded. It is HunyuanVideo with another transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastvideo_grpo.config.keys import Config, SampleConfig
from fastvideo_grpo.model_files.downloads import Download, Source
from fastvideo_grpo.models.facts import ModelFacts, read_config
from fastvideo_grpo.models.hunyuan_video import family as hunyuan_video
from fastvideo_grpo.models.hunyuan_video.family import SHARED, HunyuanVideo
from fastvideo_grpo.tiny.offer import TinyOffer

PUBLISHED: dict[str, dict[str, Any]] = {
    **hunyuan_video.PUBLISHED,
    "transformer": {**hunyuan_video.PUBLISHED["transformer"], "in_channels": 32},
}
"""Skywork/SkyReels-V1-Hunyuan-I2V (a transformer) with HunyuanVideo's other parts: the keys this project reads."""

_FOLDER = "checkpoints/SkyReels-V1-I2V"
SOURCE = Source(
    (
        Download(hunyuan_video.REPOSITORY, _FOLDER, 16.2, hunyuan_video.GIGABYTES, exclude=("transformer/*",)),
        Download("Skywork/SkyReels-V1-Hunyuan-I2V", _FOLDER, 25.6, include=("*.json", "*.safetensors"), inside="transformer"),
    ),
    edit='sed -i \'s/"HunyuanVideoPipeline"/"HunyuanSkyreelsImageToVideoPipeline"/\' {folder}/model_index.json',
)


def _reads_image_latents(transformer: Mapping[str, Any]) -> bool:
    """Whether it is SkyReels': HunyuanVideo's network, which reads an image's latents beside the noise it answers for."""
    found, answered = transformer.get("in_channels"), transformer.get("out_channels", 16)
    is_hunyuan = transformer.get("_class_name") == "HunyuanVideoTransformer3DModel"
    return is_hunyuan and isinstance(answered, int) and found == 2 * answered


class SkyReelsI2V(HunyuanVideo):
    def claims(self, checkpoint: Path, advice: str) -> str | None:
        """Its folder is HunyuanVideo's with another transformer in it; people forget to say so in model_index.json."""
        file = checkpoint / "transformer" / "config.json"
        if not file.is_file() or not _reads_image_latents(read_config(file, advice)):
            return None
        return "the transformer of SkyReels-V1-I2V (it reads twice the channels it answers for)"

    def latent_shape(self, facts: ModelFacts, sample: SampleConfig) -> tuple[int, ...]:
        channels, *rest = super().latent_shape(facts, sample)
        return channels // 2, *rest  # the network reads the noise and the image's latents, and answers for the noise

    def conditioning_shapes(self, facts: ModelFacts, sample: SampleConfig, text_length: int) -> dict[str, tuple[int, ...]]:
        channels, _, height, width = self.latent_shape(facts, sample)
        shapes = super().conditioning_shapes(facts, sample, text_length)
        return {**shapes, "image_latents": (channels, 1, height, width)}

    def problems(self, config: Config, facts: ModelFacts) -> Iterator[str]:
        yield from super().problems(config, facts)
        found, latents = int(facts.denoiser["in_channels"]), int(facts.vae["latent_channels"])
        if found != 2 * latents:
            yield (
                f"model.path={config.model.path}: the transformer reads {found} channels, but image to video needs "
                f"{2 * latents}, the noise and the image's latents: is it a text-to-video model?"
            )
        if config.sample.frames == 1:
            yield "sample.frames is 1, but skyreels_i2v makes clips from an image; use 4k + 1 of them, for example 53"


FAMILY = SkyReelsI2V(
    kind="skyreels_i2v",
    name="SkyReels-V1-I2V",
    pipeline="HunyuanSkyreelsImageToVideoPipeline",
    trainer=f"{__package__}.trainer:SkyReelsI2VGRPOTrainer",
    tiny=TinyOffer(f"{__package__}.tiny:write_skyreels_i2v", "tiny-skyreels-i2v"),
    fastvideo_config=f"{__package__}.fastvideo_config:SkyReelsI2VConfig",
    configs=PUBLISHED,
    source=SOURCE,
    reads_images=True,
    # With classifier-free guidance the paper makes one update per iteration.
    defaults={"sample": {"guidance_scale": 1.0, "cfg_scale": 5.0}, "grpo": {"updates_per_iteration": 1}},
    **SHARED,
)
