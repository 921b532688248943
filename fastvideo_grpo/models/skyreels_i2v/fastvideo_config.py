"""SkyReels-V1-I2V for FastVideo, which does not know it: HunyuanVideo's network with the image's latents beside the noise."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastvideo.configs.models.dits.base import DiTArchConfig, DiTConfig
from fastvideo.configs.models.dits.hunyuanvideo import HunyuanVideoArchConfig, HunyuanVideoConfig
from fastvideo.configs.pipelines.hunyuan import HunyuanConfig


@dataclass
class SkyReelsI2VArchConfig(HunyuanVideoArchConfig):
    """The network reads ``in_channels``, half of them noise, half the image's latents; its state is the noise alone."""

    in_channels: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_channels_latents = self.in_channels // 2


@dataclass
class SkyReelsI2VDiTConfig(HunyuanVideoConfig):
    """The transformer's configuration."""

    arch_config: DiTArchConfig = field(default_factory=SkyReelsI2VArchConfig)


@dataclass
class SkyReelsI2VConfig(HunyuanConfig):
    """The pipeline's configuration: HunyuanVideo's, with the VAE's encoder loaded for the image."""

    dit_config: DiTConfig = field(default_factory=SkyReelsI2VDiTConfig)
    embedded_cfg_scale: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vae_config.load_encoder = True


def register() -> None:
    """Let FastVideo find this configuration by a checkpoint's name or pipeline, before its own HunyuanVideo does."""
    from fastvideo import registry

    registry.register_configs(
        sampling_param_cls=None,
        pipeline_config_cls=SkyReelsI2VConfig,
        workload_types=(),
        hf_model_paths=["Skywork/SkyReels-V1-Hunyuan-I2V"],
        model_detectors=[lambda name: "skyreelsimagetovideo" in name or ("skyreels" in name and "i2v" in name)],
        model_family="hunyuan",
    )
    # Of several that fit FastVideo takes the first, and its HunyuanVideo fits every name with "hunyuan" in it.
    registry._MODEL_NAME_DETECTORS.insert(0, registry._MODEL_NAME_DETECTORS.pop())
