"""Wan 2.1, text to video and to image: what is known of it before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.model_files.downloads import Source
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.family import Activations, no_embedded_guidance
from fastvideo_grpo.models.text_readers import MOST_T5_TOKENS, text_length_key
from fastvideo_grpo.models.video import VideoFamily
from fastvideo_grpo.prompts.cut import TextReader
from fastvideo_grpo.tiny.offer import TinyOffer

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
"""The VAE of all Wan 2.1 models."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": 128,
        "cross_attn_norm": True,
        "eps": 1e-06,
        "ffn_dim": 8960,
        "freq_dim": 256,
        "image_dim": None,
        "in_channels": 16,
        "num_attention_heads": 12,
        "num_layers": 30,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": 4096,
    },
    "vae": VAE,
    "text_encoder": {"d_model": 4096, "num_layers": 24},
}
"""Wan-AI/Wan2.1-T2V-1.3B-Diffusers: the keys this project reads."""

SOURCE = Source.of(
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "checkpoints/Wan2.1-T2V-1.3B-Diffusers",
    28.9,
    exclude=("assets/*", "examples/*"),
)


def _clean(text: str) -> str:
    """As Wan's texts are cleaned: mojibake, HTML, spaces."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return str(prompt_clean(text))


class Wan(VideoFamily):
    def text_readers(self, config: Config, facts: ModelFacts) -> tuple[TextReader, ...]:
        length, key = config.prompts.text_length, text_length_key(config, MOST_T5_TOKENS)
        return (TextReader("UMT5", "text_encoder", "tokenizer", length, key=key, prepare=_clean),)

    def patch(self, facts: ModelFacts) -> tuple[int, int, int]:
        frames, height, width = facts.denoiser["patch_size"]
        return frames, height, width

    def block_parameters(self, facts: ModelFacts) -> float:
        # Attention to itself and to the text, 4 D^2 each, and the MLP.
        width = facts.hidden_width
        return 8.0 * width**2 + 2.0 * width * int(facts.denoiser["ffn_dim"])

    def problems(self, config: Config, facts: ModelFacts) -> Iterator[str]:
        yield from super().problems(config, facts)
        yield from no_embedded_guidance(config)
        if config.sample.vae_tiling:
            yield (
                "sample.vae_tiling is true, but wan's VAE decodes a latent frame after the other, whole: what it holds does "
                "not grow with the clip; leave it out"
            )
        if config.prompts.text_length > MOST_T5_TOKENS:
            yield f"prompts.text_length is {config.prompts.text_length}; Wan reads at most {MOST_T5_TOKENS} tokens"
        if (Path(config.model.path) / "transformer_2").is_dir() or facts.vae.get("is_residual"):
            yield f"model.path={config.model.path} is a Wan 2.2; model.kind=wan trains Wan 2.1, whose network is one"


FAMILY = Wan(
    kind="wan",
    name="Wan 2.1 T2V 1.3B",
    pipeline="WanPipeline",
    trainer=f"{__package__}.trainer:WanGRPOTrainer",
    tiny=TinyOffer(f"{__package__}.tiny:write_wan", "tiny-wan"),
    fastvideo_config="fastvideo.configs.pipelines.wan:WanT2V480PConfig",
    folders=("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
    configs=PUBLISHED,
    source=SOURCE,
    sequence_encoder=("text_encoder", "d_model"),
    lora_targets=("to_q", "to_k", "to_v", "to_out"),  # of the attention to itself and to the text
    blocks=("WanTransformerBlock",),
    activations={
        "fp32": Activations(23, 0, (4, 4), 19, mlp=2, text=4),
        "bf16": Activations(30, 0, (6, 4), 29, mlp=2, text=5),
    },
    lora_activations={
        "fp32": Activations(15, 0, (1.5, 1), 19, mlp=1, text=3, adapters=(6, 0)),
        "bf16": Activations(21, 0, (3, 1), 29, mlp=1, text=4, adapters=(6, 0)),
    },
    decode=18,
    decode_kept=77,
    clip_decode=13.3,
    clip_decode_kept=55,
    parameters={"vae": 126.9e6, "text_encoder": 5.681e9},
    decodes_singly=True,
    decodes_frames=4,
    defaults={"sample": {"cfg_scale": 5.0}, "grpo": {"updates_per_iteration": 1}},
)
