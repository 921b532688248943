"""HunyuanVideo, text to video and (one latent frame) text to image: what is particular to it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvideo_grpo.config import Config, ConfigError
from fastvideo_grpo.prompts.embeddings import Conditioning
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.sampling.schedules import Level
from fastvideo_grpo.trainers.base import split_guidance
from fastvideo_grpo.trainers.fastvideo import FastVideoGRPOTrainer  # first: it checks FastVideo's patches

from fastvideo.attention.backends.sdpa import SDPAMetadata  # isort: skip
from fastvideo.configs.pipelines.hunyuan import HunyuanConfig, prompt_template_video  # isort: skip
from fastvideo.fastvideo_args import FastVideoArgs  # isort: skip
from fastvideo.forward_context import set_forward_context  # isort: skip
from fastvideo.pipelines.basic.hunyuan.hunyuan_pipeline import HunyuanVideoPipeline  # isort: skip
from fastvideo.pipelines.pipeline_batch_info import ForwardBatch  # isort: skip
from fastvideo.pipelines.stages import DecodingStage  # isort: skip


class SamplewiseDecodingStage(DecodingStage):
    """FastVideo's decoding, one sample at a time: the VAE's attention mask has no batch dimension, and a clip at a time is
    what memory allows anyway."""

    def decode(self, latents: Tensor, fastvideo_args: FastVideoArgs) -> Tensor:
        return torch.cat([super(SamplewiseDecodingStage, self).decode(one[None], fastvideo_args).cpu() for one in latents])


class HunyuanVideoGRPOTrainer(FastVideoGRPOTrainer, HunyuanVideoPipeline):
    """GRPO on HunyuanVideo: latents ``[B, 16, (frames - 1) / 4 + 1, height / 8, width / 8]``, embedded guidance.

    (The compression and the channels are read from the checkpoint.)
    """

    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    pipeline_config_class: ClassVar[type[HunyuanConfig]] = HunyuanConfig

    @classmethod
    def pipeline_config(cls, config: Config) -> HunyuanConfig:
        """FastVideo's configuration; CLIP always runs in float32, Llama in the model's precision."""
        pipeline = cls.pipeline_config_class()
        pipeline.dit_precision = config.model.precision
        pipeline.vae_precision = config.model.vae_precision
        pipeline.text_encoder_precisions = (config.model.precision, "fp32")
        pipeline.vae_tiling = pipeline.vae_config.use_tiling = config.sample.vae_tiling
        # It exchanges tiles between all processes of the run, and here the leaders alone decode.
        pipeline.vae_sp = pipeline.vae_config.use_parallel_tiling = False
        return pipeline

    def create_pipeline_stages(self, fastvideo_args: FastVideoArgs) -> None:
        super().create_pipeline_stages(fastvideo_args)
        self.decoding_stage.stage = SamplewiseDecodingStage(self.get_module("vae"))

    @staticmethod
    def read_tokenizers(checkpoint: Path) -> dict[str, Any]:
        """Llama's, from its tokenizer.json: of a tokenizer declared as LlamaTokenizerFast, as the published one is,
        transformers 5 ignores that file and makes one of Llama 2's kind."""
        from transformers import PreTrainedTokenizerFast

        folder = checkpoint / "tokenizer"
        if not (folder / "tokenizer.json").is_file():
            raise ConfigError(f"{folder} has no tokenizer.json; that of HunyuanVideo's own repository is needed")
        return {"tokenizer": PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)}

    def initialize_pipeline(self, fastvideo_args: Any) -> None:
        """Repair what FastVideo's loader leaves different from the checkpoint, and check what the cropping rests on.

        Raises:
            ConfigError: the tokenizer cuts the prompt template into another number of tokens than are cut off again.
        """
        llama = self.get_module("text_encoder")
        if llama is not None:
            prefix, crop = prompt_template_video["template"].split("{}")[0], prompt_template_video["crop_start"]
            found = len(self.get_module("tokenizer")(prefix)["input_ids"])
            if found != crop:
                raise ConfigError(
                    f"{self.model_path}/tokenizer makes {found} tokens of the prompt template, but {crop} are cut off "
                    "the embeddings: prompts would be read wrongly. The tokenizer.json of HunyuanVideo's own repository is "
                    "needed"
                )
            # On CPUs FastVideo keeps norms in float32, which then meet bf16 weights.
            llama.to(next(llama.parameters()).dtype)

    def encode(self, prompts: list[Prompt]) -> list[Conditioning]:
        """Llama's sequence ``[1, tokens, 4096]`` and CLIP's pooled embedding ``[1, 768]`` of each prompt.

        Llama reads the prompt inside FastVideo's template, whose tokens are cut off again; at most ``prompts.text_length``
        tokens are kept, and no padding: the network has no mask.
        """
        longest = prompt_template_video["crop_start"] + self.config.prompts.text_length
        settings: tuple[dict[str, Any], ...] = (
            {"max_length": longest, "padding": False},
            {"max_length": 77, "padding": "max_length"},
        )
        encoded = []
        for prompt in prompts:
            # One prompt at a time: FastVideo's Llama takes one, and an embedding must not depend on its neighbours.
            sequence, pooled = (
                self.text_stage.encode_text(prompt.text, self.fastvideo_args, encoder_index=i, truncation=True, **kwargs)[0]
                for i, kwargs in enumerate(settings)
            )
            encoded.append({"encoder_hidden_states": sequence, "pooled_projections": pooled})
        return encoded

    def join(self, first: Conditioning, second: Conditioning) -> Conditioning:
        """The shorter text is filled up with zeros, which :meth:`forward_context` hides."""
        lengths = [part["encoder_hidden_states"].shape[1] for part in (first, second)]
        joined = []
        for part, length in zip((first, second), lengths, strict=True):
            filled = torch.nn.functional.pad(part["encoder_hidden_states"], (0, 0, 0, max(lengths) - length))
            joined.append({**part, "encoder_hidden_states": filled})
        return super().join(*joined)

    def forward_context(self, conditioning: Conditioning | None = None) -> AbstractContextManager[Any]:
        """With both texts of classifier-free guidance in one pass, the mask ``[2 B, tokens]`` of what :meth:`join` filled up.

        (It holds for the backward pass, too, in which checkpointed blocks run again.)
        """
        mask = None
        if conditioning is not None and self.config.model.cfg_batched:
            positive, negative = split_guidance(conditioning)
            if negative is not None:
                texts = [negative["encoder_hidden_states"], positive["encoder_hidden_states"]]
                mask = _text_mask(texts)
        metadata = None if mask is None else SDPAMetadata(current_timestep=0, attn_mask=mask)  # FlashAttention reads it, too
        return set_forward_context(current_timestep=0, attn_metadata=metadata)

    def latent_shape(self) -> tuple[int, ...]:
        """``(channels, latent frames, latent height, latent width)``."""
        vae, transformer, sample = self.get_module("vae"), self.get_module("transformer"), self.config.sample
        return (
            transformer.num_channels_latents,
            (sample.frames - 1) // vae.temporal_compression_ratio + 1,
            sample.height // vae.spatial_compression_ratio,
            sample.width // vae.spatial_compression_ratio,
        )

    def forward_batch(self, conditioning: Conditioning, initial: Tensor) -> ForwardBatch:
        return ForwardBatch(
            data_type="video",
            prompt="",  # not read, since embeddings are given
            num_videos_per_prompt=len(initial),
            prompt_embeds=[conditioning["encoder_hidden_states"], conditioning["pooled_projections"]],
            latents=initial,
            num_frames=self.config.sample.frames,
            height=self.config.sample.height,
            width=self.config.sample.width,
            num_inference_steps=self.config.sample.steps,
            guidance_scale=1.0,  # a higher one would ask for a negative prompt; the embedded guidance is given in predict
            seed=0,  # the stages draw nothing: the noise is given
        )

    def network_output(self, sample: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
        """The velocity at ``sample`` ``[B, C, F, H, W]``; the network counts time and guidance in thousandths."""
        device = sample.device
        guidance = None
        if self.get_module("transformer").guidance_embeds:
            guidance = torch.full((len(sample),), 1000.0 * self.config.sample.guidance_scale, device=device)
        return self.network(
            sample.to(self.dtype),
            [conditioning[name].to(device, self.dtype) for name in ("encoder_hidden_states", "pooled_projections")],
            level.timestep.to(device),
            guidance=guidance,
        )

    def decode(self, latents: Tensor, differentiable: bool = False) -> Tensor:
        """Latents ``[B, C, F, H, W]`` -> uint8 ``[B, frames, H, W, 3]``, or with gradients float in [0, 1]."""
        vae = self.get_module("vae")
        with torch.set_grad_enabled(differentiable), self.vae_on_device():
            dtype = next(vae.parameters()).dtype
            decoded = torch.cat([vae.decode((one[None] / vae.scaling_factor).to(dtype)) for one in latents])
            pixels = (decoded.float() / 2 + 0.5).clamp(0, 1)
        return pixels.permute(0, 2, 3, 4, 1) if differentiable else self.to_media(pixels)


def _text_mask(texts: list[Tensor]) -> Tensor | None:
    """Which tokens of texts ``[B, tokens, width]``, filled up to the longest and stacked, are theirs; None: all of them."""
    lengths = torch.cat([torch.full((len(text),), text.shape[1], device=text.device) for text in texts])
    longest = max(text.shape[1] for text in texts)
    if all(text.shape[1] == longest for text in texts):
        return None
    return torch.arange(longest, device=lengths.device) < lengths[:, None]
