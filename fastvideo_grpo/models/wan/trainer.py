"""Wan 2.1, text to video and (one latent frame) text to image, with classifier-free guidance: what is particular to it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.prompts.embeddings import Conditioning
from fastvideo_grpo.sampling.schedules import Level
from fastvideo_grpo.trainers.video import VideoGRPOTrainer  # first: it checks FastVideo's patches

from diffusers.pipelines.wan.pipeline_wan import prompt_clean  # isort: skip
from fastvideo.configs.models.encoders import BaseEncoderOutput  # isort: skip
from fastvideo.configs.pipelines.base import PipelineConfig  # isort: skip
from fastvideo.configs.pipelines.wan import WanT2V480PConfig  # isort: skip
from fastvideo.models.vaes.wanvae import WanRMS_norm  # isort: skip
from fastvideo.pipelines.basic.wan.wan_pipeline import WanPipeline  # isort: skip


class WanGRPOTrainer(VideoGRPOTrainer, WanPipeline):
    """GRPO on Wan 2.1: latents ``[B, 16, (frames - 1) / 4 + 1, height / 8, width / 8]``.

    (The channels are read from the checkpoint.)
    """

    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    encoding: ClassVar[dict[str, Any]] = {"tokens": "tokenizer.json"}  # before, <unk> was another token
    pipeline_config_class: ClassVar[type[PipelineConfig]] = WanT2V480PConfig

    @classmethod
    def pipeline_config(cls, config: Config) -> PipelineConfig:
        """FastVideo's configuration, with texts cleaned and padded as diffusers does it."""
        pipeline = super().pipeline_config(config)
        pipeline.preprocess_text_funcs = (prompt_clean,)
        pipeline.postprocess_text_funcs = (_padding_to_zeros,)  # FastVideo's own pads to 512, whatever is asked for
        return pipeline

    def text_settings(self) -> dict[str, dict[str, Any]]:
        """UMT5's sequence ``[1, text_length, 4096]``, zeros behind the text: the network reads them, it has no mask."""
        return {"encoder_hidden_states": {"max_length": self.config.prompts.text_length, "padding": "max_length"}}

    def pixels(self, latents: Tensor) -> Tensor:
        """Of latents ``[1, C, F, H, W]``, ``[1, 3, frames, H, W]``; NaN where the VAE's norms overflow.

        Its layers divide by the length of their input, which in fp16 is infinite from 65,520 on: what they give is 0, and in
        the end a grey clip of finite numbers.
        """
        decoder, finite = self.get_module("vae").decoder, []

        def look(layer: WanRMS_norm, inputs: tuple[Tensor, ...]) -> None:
            length = torch.linalg.vector_norm(inputs[0].detach(), dim=1 if layer.channel_first else -1)
            finite.append(length.isfinite().all())

        with ExitStack() as looking:
            for layer in decoder.modules():
                if isinstance(layer, WanRMS_norm):
                    looking.callback(layer.register_forward_pre_hook(look).remove)
            pixels = super().pixels(latents)
        return torch.where(torch.stack(finite).all(), pixels, torch.nan)

    def network_output(self, sample: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
        """The velocity at ``sample`` ``[B, C, F, H, W]``; the network counts time in thousandths."""
        text = conditioning["encoder_hidden_states"].to(sample.device, self.dtype)
        return self.network(sample.to(self.dtype), text, level.timestep.to(sample.device))


def _padding_to_zeros(outputs: BaseEncoderOutput) -> Tensor:
    """The encoder's sequence ``[B, tokens, width]`` without what it made of the padding."""
    return outputs.last_hidden_state.masked_fill(outputs.attention_mask[..., None] == 0, 0)
