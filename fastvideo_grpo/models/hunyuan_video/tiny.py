"""Tiny HunyuanVideo checkpoints in the form of hunyuanvideo-community/HunyuanVideo's diffusers folder: same files, same
key names."""

from __future__ import annotations

import math
from functools import cache, partial
from pathlib import Path
from typing import Any

from fastvideo_grpo.tiny.checkpoint_files import PRESETS, TinyCheckpoint, clip_config, clip_keys
from fastvideo_grpo.tiny.target_folder import check_choice
from fastvideo_grpo.tiny.tokenizer_files import (
    LLAMA_LENGTH,
    VIDEO_WORDS,
    clip_vocabulary,
    llama_vocabulary,
    write_clip_tokenizer,
    write_llama_tokenizer,
)

MODEL_INDEX: dict[str, Any] = {
    "_class_name": "HunyuanVideoPipeline",
    "_diffusers_version": "0.32.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "LlamaModel"],
    "text_encoder_2": ["transformers", "CLIPTextModel"],
    # Published: LlamaTokenizerFast, see `write_llama_tokenizer`.
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
}

SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.32.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 7.0,
    "shift_terminal": None,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}

# What differs between the presets. "random" is for tests: x8 latents as in HunyuanVideo, two layers everywhere. "demo" is
# what can be trained in minutes: x4 latents, so that 9 frames of 32x32 pixels are 48 tokens of 2x2 latents.
# The text goes to the transformer from before the last two of Llama's layers: there has to be one more.
_SIZES: dict[str, dict[str, Any]] = {
    "random": {
        "vae_channels": [8, 8, 16, 16],
        "vae_groups": 4,
        "latent_channels": 4,
        "refiner_layers": 2,
        "clip": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
        "llama": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
    },
    "demo": {
        "vae_channels": [8, 16, 16],
        "vae_groups": 4,
        "latent_channels": 8,
        "refiner_layers": 1,
        "clip": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1},
        "llama": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
    },
}


@cache
def prompt_template() -> str:
    """The text that HunyuanVideo's pipelines put around a prompt, with {} in the prompt's place."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    return str(DEFAULT_PROMPT_TEMPLATE["template"])


def configs(preset: str) -> dict[str, dict[str, Any]]:
    """The config.json of each component with weights, with the keys that the published files have.

    Raises ValueError for an unknown preset.
    """
    check_choice("HunyuanVideo", "preset", preset, tuple(_SIZES))
    sizes = _SIZES[preset]
    levels = len(sizes["vae_channels"])
    llama_tokens = llama_vocabulary(VIDEO_WORDS, prompt_template())
    return {
        "transformer": {
            "_class_name": "HunyuanVideoTransformer3DModel",
            "_diffusers_version": "0.32.0.dev0",
            "attention_head_dim": 16,
            "guidance_embeds": True,
            "in_channels": sizes["latent_channels"],
            "mlp_ratio": 4.0,
            "num_attention_heads": 4,
            "num_layers": 2,
            "num_refiner_layers": sizes["refiner_layers"],
            "num_single_layers": 2,
            "out_channels": sizes["latent_channels"],
            "patch_size": 2,
            "patch_size_t": 1,
            "pooled_projection_dim": sizes["clip"]["hidden_size"],
            "qk_norm": "rms_norm",
            "rope_axes_dim": [4, 6, 6],
            "rope_theta": 256.0,
            "text_embed_dim": sizes["llama"]["hidden_size"],
        },
        "vae": {
            "_class_name": "AutoencoderKLHunyuanVideo",
            "_diffusers_version": "0.32.0.dev0",
            "act_fn": "silu",
            "block_out_channels": sizes["vae_channels"],
            "down_block_types": ["HunyuanVideoDownBlock3D"] * levels,
            "in_channels": 3,
            "latent_channels": sizes["latent_channels"],
            "layers_per_block": 1,
            "mid_block_add_attention": True,
            "norm_num_groups": sizes["vae_groups"],
            "out_channels": 3,
            "scaling_factor": 0.476986,
            "spatial_compression_ratio": 2 ** (levels - 1),
            "temporal_compression_ratio": 4,
            "up_block_types": ["HunyuanVideoUpBlock3D"] * levels,
        },
        "text_encoder": {
            "architectures": ["LlamaModel"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": llama_tokens["<|begin_of_text|>"],
            "eos_token_id": llama_tokens["<|end_of_text|>"],
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": LLAMA_LENGTH,
            "mlp_bias": False,
            "model_type": "llama",
            "pad_token_id": llama_tokens["<pad>"],
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            # Where transformers 4 wrote it. transformers 5 reads it here too but writes it elsewhere, where FastVideo does
            # not look.
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "transformers_version": "4.46.3",
            "use_cache": True,
            # Published: rounded up too, 128259 tokens and 128320 rows.
            "vocab_size": 64 * math.ceil(len(llama_tokens) / 64),
            **sizes["llama"],
        },
        "text_encoder_2": clip_config(
            sizes["clip"], tokens=len(clip_vocabulary(VIDEO_WORDS)[0]), transformers_version="4.46.3"
        ),
    }


def checkpoint(preset: str = "random") -> TinyCheckpoint:
    """The checkpoint of a preset: "random" (for tests; float32; sizes divisible by 16 pixels) or "demo" (as the demo's
    checkpoint, float16; 9 frames of 32x32 pixels). Frames are 4 k + 1 as for HunyuanVideo. Raises ValueError for an unknown
    preset.
    """
    return TinyCheckpoint(
        model="HunyuanVideo",
        index=MODEL_INDEX,
        scheduler=SCHEDULER,
        configs=configs(preset),
        processors={
            "tokenizer": partial(write_llama_tokenizer, words=VIDEO_WORDS, text=prompt_template()),
            "tokenizer_2": partial(write_clip_tokenizer, words=VIDEO_WORDS),
        },
        dtype=PRESETS[preset],
        published_keys={"text_encoder_2": clip_keys},
        shards={"transformer": 3, "text_encoder": 2},
    )


def write_hunyuan_video(folder: str | Path, *, seed: int = 0, preset: str = "random", overwrite: bool = False) -> Path:
    """Write a complete HunyuanVideo folder with random weights and return its path; see `checkpoint` and
    `TinyCheckpoint.write_random`."""
    return checkpoint(preset).write_random(folder, seed=seed, overwrite=overwrite)
