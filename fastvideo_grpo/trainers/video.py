"""What the trainers of video models share: latents of a causal video VAE, which decodes clip by clip."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.trainers.fastvideo import FastVideoGRPOTrainer  # first: it checks FastVideo's patches

from fastvideo.configs.pipelines.base import PipelineConfig  # isort: skip
from fastvideo.pipelines.stages import DecodingStage  # isort: skip


class VideoGRPOTrainer(FastVideoGRPOTrainer):
    """First base of a trainer whose states are latents ``[B, C, (frames - 1) / k + 1, height / s, width / s]``.

    (The compressions k and s and the channels are read from the checkpoint. One frame is an image.)
    """

    # Some VAEs take no more (the attention mask of HunyuanVideo's has no batch dimension), nor does memory.
    decodes_one_at_a_time: ClassVar[bool] = True

    @classmethod
    def pipeline_config(cls, config: Config) -> PipelineConfig:
        pipeline = super().pipeline_config(config)
        pipeline.vae_tiling = pipeline.vae_config.use_tiling = config.sample.vae_tiling
        # It exchanges tiles between all processes of the run, and here the leaders alone decode.
        pipeline.vae_sp = pipeline.vae_config.use_parallel_tiling = False
        return pipeline

    def pixels(self, latents: Tensor) -> Tensor:
        """Of latents ``[1, C, F, H, W]``, ``[1, 3, frames, H, W]``."""
        vae = self.get_module("vae")
        scaled = DecodingStage(vae)._denormalize_latents(latents, self.fastvideo_args)
        return vae.decode(scaled.to(next(vae.parameters()).dtype)).float() / 2 + 0.5
