"""FLUX.1 text to image: what is particular to it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvideo_grpo.config import Config
from fastvideo_grpo.prompts.embeddings import Conditioning
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.sampling.schedules import Level
from fastvideo_grpo.trainers.fastvideo import FastVideoGRPOTrainer  # first: it checks FastVideo's patches

from fastvideo.configs.pipelines.flux import FluxPipelineConfig  # isort: skip
from fastvideo.pipelines.basic.flux.flux_pipeline import FluxPipeline  # isort: skip
from fastvideo.pipelines.pipeline_batch_info import ForwardBatch  # isort: skip
from fastvideo_grpo.trainers.flux_sharding import shard_sequence  # isort: skip
from fastvideo.pipelines.stages.flux_stages import (  # isort: skip
    FluxDecodingStage,
    _pack_latents,
    _prepare_latent_image_ids,
    _unpack_latents,
)


class FluxGRPOTrainer(FastVideoGRPOTrainer, FluxPipeline):
    """GRPO on FLUX: packed latents ``[B, height/16 x width/16, 64]``, embedded guidance, no CFG.

    (16 is twice the VAE's spatial compression, 64 four times its latent channels; both are read from the checkpoint.)
    """

    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")

    @classmethod
    def pipeline_config(cls, config: Config) -> FluxPipelineConfig:
        """FastVideo's FLUX configuration; CLIP always runs in float32, T5 in the model's precision."""
        pipeline = FluxPipelineConfig()
        pipeline.dit_precision = config.model.precision
        pipeline.vae_precision = config.model.vae_precision
        pipeline.text_encoder_precisions = ("fp32", config.model.precision)
        return pipeline

    def initialize_pipeline(self, fastvideo_args: Any) -> None:
        """Repair what FastVideo's loader leaves different from the checkpoint (each would change the result)."""
        pipeline = fastvideo_args.pipeline_config
        transformer, vae = self.get_module("transformer"), self.get_module("vae")
        # Latent preparation reads the channels, and the decoder its compression, from the pipeline's configuration.
        pipeline.dit_config.arch_config.in_channels = transformer.fastvideo_config.arch_config.in_channels
        pipeline.vae_config.arch_config.spatial_compression_ratio = 2 ** (len(vae.config.block_out_channels) - 1)
        t5 = self.get_module("text_encoder_2")
        if t5 is not None:
            # Loading resets T5's tokenizer arguments (28 tokens for the real model); and diffusers' FLUX shows T5 no mask.
            # On CPUs FastVideo keeps T5's norms in float32, which then meet bf16 weights.
            t5.to(next(t5.parameters()).dtype)
            pipeline.text_encoder_configs[1].tokenizer_kwargs.update(padding="max_length", truncation=True)
            t5.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
            )

    def prepare_transformer(self, transformer: nn.Module) -> None:
        if self.fastvideo_args.sp_size > 1:
            shard_sequence(transformer)

    def encode(self, prompts: list[Prompt]) -> list[Conditioning]:
        """CLIP's pooled embedding ``[1, 768]`` and T5's sequence ``[1, text_length, 4096]`` of each prompt."""
        lengths = {0: 77, 1: self.config.prompts.text_length}
        encoded = []
        for prompt in prompts:
            # One prompt at a time: a prompt's embedding must not depend on what it was batched with.
            pooled, sequence = (
                self.text_stage.encode_text(
                    prompt.text, self.fastvideo_args, encoder_index=i, max_length=length, padding="max_length"
                )[0]
                for i, length in lengths.items()
            )
            encoded.append({"pooled_projections": pooled, "encoder_hidden_states": sequence})
        return encoded

    def latent_shape(self) -> tuple[int, ...]:
        """Unpacked latents ``(channels, height, width)``: what FastVideo's latent preparation packs."""
        pipeline = self.fastvideo_args.pipeline_config
        ratio = pipeline.vae_config.arch_config.spatial_compression_ratio
        channels = pipeline.dit_config.arch_config.in_channels // 4
        return channels, self.config.sample.height // ratio, self.config.sample.width // ratio

    def pack(self, latents: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, H/2 x W/2, 4 C]``, as latent preparation does."""
        return _pack_latents(latents, *latents.shape)

    def forward_batch(self, conditioning: Conditioning, initial: Tensor) -> ForwardBatch:
        count = len(initial)
        return ForwardBatch(
            data_type="image",
            prompt="",  # not read, since embeddings are given
            num_videos_per_prompt=count,
            prompt_embeds=[conditioning["pooled_projections"], conditioning["encoder_hidden_states"]],
            latents=initial,
            height=self.config.sample.height,
            width=self.config.sample.width,
            num_inference_steps=self.config.sample.steps,
            guidance_scale=self.config.sample.guidance_scale,
            use_embedded_guidance=True,  # without it a scale above 1 would ask for a negative prompt
            seed=0,  # the stages draw nothing: the noise is given
        )

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

    def decode(self, latents: Tensor, differentiable: bool = False) -> Tensor:
        """Packed latents -> uint8 ``[B, 1, H, W, 3]``, or with gradients float ``[B, 1, H, W, 3]`` in [0, 1]."""
        channels, height, width = self.latent_shape()
        vae = self.get_module("vae")
        with torch.set_grad_enabled(differentiable), self.vae_on_device():
            unpacked = _unpack_latents(latents.float(), len(latents), channels, height, width)
            scaled = FluxDecodingStage._denormalize_latents(unpacked, vae)
            decoded = vae.decode(scaled.to(next(vae.parameters()).dtype))
            pixels = (getattr(decoded, "sample", decoded).float() / 2 + 0.5).clamp(0, 1).unsqueeze(2)
        return pixels.permute(0, 2, 3, 4, 1) if differentiable else self.to_media(pixels)
