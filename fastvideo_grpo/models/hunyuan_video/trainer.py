"""HunyuanVideo, text to video and (one latent frame) text to image: what is particular to it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.prompts.embeddings import Conditioning
from fastvideo_grpo.prompts.tokenizers import load_tokenizer
from fastvideo_grpo.sampling.schedules import Level
from fastvideo_grpo.trainers.conditioning import split_guidance
from fastvideo_grpo.trainers.video import VideoGRPOTrainer  # first: it checks FastVideo's patches

from fastvideo.attention.backends.sdpa import SDPAMetadata  # isort: skip
from fastvideo.configs.pipelines.base import PipelineConfig  # isort: skip
from fastvideo.configs.pipelines.hunyuan import HunyuanConfig, prompt_template_video  # isort: skip
from fastvideo.forward_context import set_forward_context  # isort: skip
from fastvideo.pipelines.basic.hunyuan.hunyuan_pipeline import HunyuanVideoPipeline  # isort: skip


class HunyuanVideoGRPOTrainer(VideoGRPOTrainer, HunyuanVideoPipeline):
    """GRPO on HunyuanVideo: latents ``[B, 16, (frames - 1) / 4 + 1, height / 8, width / 8]``, embedded guidance.

    (The compression and the channels are read from the checkpoint.)
    """

    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    pipeline_config_class: ClassVar[type[PipelineConfig]] = HunyuanConfig

    @classmethod
    def read_tokenizers(cls, checkpoint: Path) -> dict[str, Any]:
        """Llama's from its tokenizer.json alone, whatever is there besides."""
        return {name: load_tokenizer(checkpoint / name, from_json=name == "tokenizer") for name in cls.tokenizers}

    def initialize_pipeline(self, fastvideo_args: Any) -> None:
        """Check what the cropping of embeddings rests on.

        Raises:
            ConfigError: the tokenizer cuts the prompt template into another number of tokens than are cut off again.
        """
        if self.get_module("text_encoder") is not None:
            prefix, crop = prompt_template_video["template"].split("{}")[0], prompt_template_video["crop_start"]
            found = len(self.get_module("tokenizer")(prefix)["input_ids"])
            if found != crop:
                raise ConfigError(
                    f"{self.checkpoint}/tokenizer makes {found} tokens of the prompt template, but {crop} are cut off "
                    "the embeddings: prompts would be read wrongly. The tokenizer.json of HunyuanVideo's own repository is "
                    "needed"
                )

    def text_settings(self) -> dict[str, dict[str, Any]]:
        """Llama's sequence ``[1, tokens, 4096]`` and CLIP's pooled embedding ``[1, 768]``.

        Llama reads the prompt inside FastVideo's template, whose tokens are cut off again; at most ``prompts.text_length``
        tokens are kept, and no padding: the network has no mask.
        """
        longest = prompt_template_video["crop_start"] + self.config.prompts.text_length
        return {
            "encoder_hidden_states": {"max_length": longest, "padding": False},
            "pooled_projections": {"max_length": 77, "padding": "max_length"},
        }

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

    def network_output(self, sample: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
        """The velocity at ``sample`` ``[B, C, F, H, W]``; the network counts time and guidance in thousandths."""
        device = sample.device
        guidance = None
        if self.get_module("transformer").guidance_embeds:
            guidance = torch.full((len(sample),), 1000.0 * self.config.sample.guidance_scale, device=device)
        return self.network(
            sample.to(self.dtype),
            [conditioning[name].to(device, self.dtype) for name in self.text_settings()],
            level.timestep.to(device),
            guidance=guidance,
        )


def _text_mask(texts: list[Tensor]) -> Tensor | None:
    """Which tokens of texts ``[B, tokens, width]``, filled up to the longest and stacked, are theirs; None: all of them."""
    lengths = torch.cat([torch.full((len(text),), text.shape[1], device=text.device) for text in texts])
    longest = max(text.shape[1] for text in texts)
    if all(text.shape[1] == longest for text in texts):
        return None
    return torch.arange(longest, device=lengths.device) < lengths[:, None]
