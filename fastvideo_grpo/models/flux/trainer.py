"""FLUX.1 text to image: what is particular to it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvideo_grpo.prompts.embeddings import Conditioning
from fastvideo_grpo.sampling.schedules import Level
from fastvideo_grpo.trainers.fastvideo import FastVideoGRPOTrainer  # first: it checks FastVideo's patches

from fastvideo.configs.pipelines.base import PipelineConfig  # isort: skip
from fastvideo.configs.pipelines.flux import FluxPipelineConfig  # isort: skip
from fastvideo.pipelines.basic.flux.flux_pipeline import FluxPipeline  # isort: skip
from .sharding import shard_sequence  # isort: skip
from fastvideo.pipelines.stages.flux_stages import (  # isort: skip
    FluxDecodingStage,
    _pack_latents,
    _prepare_latent_image_ids,
    _unpack_latents,
)


class FluxGRPOTrainer(FastVideoGRPOTrainer, FluxPipeline):
    """GRPO on FLUX: packed latents ``[B, height/16 x width/16, 64]``, embedded guidance; classifier-free
    guidance on request.

    (16 is twice the VAE's spatial compression, 64 four times its latent channels; both are read from the checkpoint.)
    """

    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    pipeline_config_class: ClassVar[type[PipelineConfig]] = FluxPipelineConfig

    def initialize_pipeline(self, fastvideo_args: Any) -> None:
        """Repair what FastVideo's loader leaves different from the checkpoint (each would change the result)."""
        pipeline = fastvideo_args.pipeline_config
        transformer, vae = self.get_module("transformer"), self.get_module("vae")
        # Latent preparation reads the channels, and the decoder its compression, from the pipeline's configuration.
        pipeline.dit_config.arch_config.in_channels = transformer.fastvideo_config.arch_config.in_channels
        pipeline.vae_config.arch_config.spatial_compression_ratio = 2 ** (len(vae.config.block_out_channels) - 1)
        t5 = self.get_module("text_encoder_2")
        if t5 is not None:
            # diffusers' FLUX shows T5 no mask.
            t5.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
            )

    def prepare_transformer(self, transformer: nn.Module) -> None:
        if self.fastvideo_args.sp_size > 1:
            shard_sequence(transformer)

    def text_settings(self) -> dict[str, dict[str, Any]]:
        """CLIP's pooled embedding ``[1, 768]`` and T5's sequence ``[1, text_length, 4096]``."""
        lengths = {"pooled_projections": 77, "encoder_hidden_states": self.config.prompts.text_length}
        return {name: {"max_length": length, "padding": "max_length"} for name, length in lengths.items()}

    def pack(self, latents: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, H/2 x W/2, 4 C]``, as latent preparation does."""
        return _pack_latents(latents, *latents.shape)

    def network_output(self, sample: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
        """The velocity at packed ``sample`` ``[B, tokens, channels]``."""
        dtype, device = self.dtype, sample.device
        text = conditioning["encoder_hidden_states"].to(device, dtype)
        _, height, width = self.latent_shape()
        guidance = None
        if self.get_module("transformer").fastvideo_config.arch_config.guidance_embeds:
            guidance = torch.full((len(sample),), self.config.sample.guidance_scale, device=device)
        return self.network(
            hidden_states=sample.to(dtype),
            encoder_hidden_states=text,
            pooled_projections=conditioning["pooled_projections"].to(device, dtype),
            timestep=(level.timestep / 1000).to(device),
            guidance=guidance,
            txt_ids=torch.zeros(text.shape[1], 3, dtype=torch.long, device=device),
            img_ids=_prepare_latent_image_ids(height // 2, width // 2, device),
            return_dict=False,
        )[0]

    def pixels(self, latents: Tensor) -> Tensor:
        """Of packed latents, ``[B, 3, 1, H, W]``."""
        channels, height, width = self.latent_shape()
        vae = self.get_module("vae")
        unpacked = _unpack_latents(latents.float(), len(latents), channels, height, width)
        decoded = vae.decode(FluxDecodingStage._denormalize_latents(unpacked, vae).to(next(vae.parameters()).dtype))
        return (getattr(decoded, "sample", decoded).float() / 2 + 0.5).unsqueeze(2)
