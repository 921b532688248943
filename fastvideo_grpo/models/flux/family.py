"""FLUX.1, text to image: what is known of it before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastvideo_grpo.config.keys import Config, SampleConfig
from fastvideo_grpo.model_files.downloads import Source
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.family import Activations
from fastvideo_grpo.models.image import ImageFamily
from fastvideo_grpo.models.text_readers import MOST_T5_TOKENS, pooled_clip, text_length_key
from fastvideo_grpo.prompts.cut import TextReader
from fastvideo_grpo.tiny.checkpoint import TinyCheckpoint

from .kohya import kohya_layer

PUBLISHED: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": 128,
        "guidance_embeds": True,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "patch_size": 1,
        "pooled_projection_dim": 768,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True,
        "latent_channels": 16,
        "layers_per_block": 2,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
    "text_encoder_2": {"d_model": 4096, "num_layers": 24},
}
"""black-forest-labs/FLUX.1-dev: the keys this project reads."""

SOURCE = Source.of(
    "black-forest-labs/FLUX.1-dev",
    "checkpoints/FLUX.1-dev",
    33.7,
    57.9,
    exclude=("flux1-dev.safetensors", "ae.safetensors"),
    gated=True,
)


class Flux(ImageFamily):
    def size_multiple(self, facts: ModelFacts) -> int:
        return max(2 * facts.spatial_compression, 16)  # packing takes 2x2 latents; FastVideo's FLUX asks for multiples of 16

    def latent_shape(self, facts: ModelFacts, sample: SampleConfig) -> tuple[int, ...]:
        ratio = facts.spatial_compression
        return int(facts.denoiser["in_channels"]) // 4, sample.height // ratio, sample.width // ratio

    def image_tokens(self, facts: ModelFacts, sample: SampleConfig) -> int:
        _, height, width = self.latent_shape(facts, sample)
        return height // 2 * (width // 2)

    def text_readers(self, config: Config, facts: ModelFacts) -> tuple[TextReader, ...]:
        length = config.prompts.text_length
        t5 = TextReader("T5", "text_encoder_2", "tokenizer_2", length, key=text_length_key(config, MOST_T5_TOKENS))
        return pooled_clip("text_encoder", "tokenizer"), t5

    def problems(self, config: Config, facts: ModelFacts) -> Iterator[str]:
        yield from super().problems(config, facts)
        if config.prompts.text_length > MOST_T5_TOKENS:
            yield f"prompts.text_length is {config.prompts.text_length}; FLUX reads at most {MOST_T5_TOKENS} tokens"


FAMILY = Flux(
    kind="flux",
    name="FLUX.1-dev",
    pipeline="FluxPipeline",
    trainer=f"{__package__}.trainer:FluxGRPOTrainer",
    tiny=TinyCheckpoint(
        f"{__package__}.tiny:write_flux",
        "tiny-flux",
        pretraining=f"{__package__}.pretrain:pretrain_flux",
        pretrained_folder="tiny-flux-shapes",
        pretrained_on="pictures of coloured shapes, 40 % of the captions' colours wrong on purpose (about 5 minutes)",
    ),
    fastvideo_config="fastvideo.configs.pipelines.flux:FluxPipelineConfig",
    diffusers_names=True,
    kohya_layer=kohya_layer,
    folders=("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
    configs=PUBLISHED,
    source=SOURCE,
    sequence_encoder=("text_encoder_2", "d_model"),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    activations={"fp32": Activations(25, 21, (4, 2), 18), "bf16": Activations(29, 25, (4.5, 2.5), 24)},
    lora_activations={
        "fp32": Activations(14, 12, (1.2, 1.2), 18, adapters=(4, 3)),
        "bf16": Activations(16, 14, (1.3, 1.3), 24, adapters=(4, 3)),
    },
    reference_images={"sample": {"steps": 28, "shift": 3.0, "guidance_scale": 3.5}, "prompts": {"text_length": 512}},
    decode=6,
    decode_kept=45,
    parameters={"vae": 83.8e6, "text_encoder": 123e6, "text_encoder_2": 4.762e9},
)
