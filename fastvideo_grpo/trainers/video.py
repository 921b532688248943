"""What the trainers of video models share: latents of a causal video VAE, which decodes clip by clip."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo_grpo.config import Config
from fastvideo_grpo.trainers.fastvideo import FastVideoGRPOTrainer  # first: it checks FastVideo's patches

from fastvideo.configs.pipelines.base import PipelineConfig  # isort: skip
from fastvideo.fastvideo_args import FastVideoArgs  # isort: skip
from fastvideo.pipelines.stages import DecodingStage  # isort: skip


class SamplewiseDecodingStage(DecodingStage):
    """FastVideo's decoding, one sample at a time: some VAEs take no more (the attention mask of HunyuanVideo's has no batch
    dimension), and a clip at a time is what memory allows anyway."""

    def decode(self, latents: Tensor, fastvideo_args: FastVideoArgs) -> Tensor:
        return torch.cat([super(SamplewiseDecodingStage, self).decode(one[None], fastvideo_args).cpu() for one in latents])


class VideoGRPOTrainer(FastVideoGRPOTrainer):
    """First base of a trainer whose states are latents ``[B, C, (frames - 1) / k + 1, height / s, width / s]``.

    (The compressions k and s and the channels are read from the checkpoint. One frame is an image.)
    """

    @classmethod
    def pipeline_config(cls, config: Config) -> PipelineConfig:
        pipeline = super().pipeline_config(config)
        pipeline.vae_tiling = pipeline.vae_config.use_tiling = config.sample.vae_tiling
        # It exchanges tiles between all processes of the run, and here the leaders alone decode.
        pipeline.vae_sp = pipeline.vae_config.use_parallel_tiling = False
        return pipeline

    def create_pipeline_stages(self, fastvideo_args: FastVideoArgs) -> None:
        super().create_pipeline_stages(fastvideo_args)
        self.decoding_stage.stage = SamplewiseDecodingStage(self.get_module("vae"))

    def decode(self, latents: Tensor, differentiable: bool = False) -> Tensor:
        """Latents ``[B, C, F, H, W]`` -> uint8 ``[B, frames, H, W, 3]``, or with gradients float in [0, 1]."""
        vae, stage = self.get_module("vae"), self.decoding_stage.stage
        with torch.set_grad_enabled(differentiable), self.vae_on_device():
            dtype = next(vae.parameters()).dtype
            scaled = stage._denormalize_latents(latents, self.fastvideo_args).to(dtype)
            decoded = torch.cat([vae.decode(one[None]) for one in scaled])
            pixels = (decoded.float() / 2 + 0.5).clamp(0, 1)
        return pixels.permute(0, 2, 3, 4, 1) if differentiable else self.to_media(pixels)
