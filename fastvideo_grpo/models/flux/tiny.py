"""Tiny FLUX checkpoints in the form of black-forest-labs/FLUX.1-dev's diffusers folder: same files, same key names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvideo_grpo.tiny.checkpoint_files import PRESETS, TinyCheckpoint, clip_config, clip_keys, t5_config, t5_keys
from fastvideo_grpo.tiny.shapes import SIZE
from fastvideo_grpo.tiny.target_folder import check_choice
from fastvideo_grpo.tiny.tokenizer_files import (
    clip_vocabulary,
    t5_pieces,
    t5_sentinels,
    write_clip_tokenizer,
    write_t5_tokenizer,
)

MODEL_INDEX: dict[str, Any] = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}

# What differs between the presets. "random" is for tests: x8 latents as in FLUX.1-dev, two layers everywhere. "demo" is
# what can be trained in minutes: 32x32 pixels and x4 latents, 16 tokens of 2x2 latents.
_SIZES: dict[str, dict[str, Any]] = {
    "random": {
        "vae_channels": [8, 8, 16, 16], "vae_groups": 4, "latent_channels": 4, "pixels": 64,
        "clip": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2},
    },
    "demo": {
        "vae_channels": [16, 16, 32], "vae_groups": 8, "latent_channels": 4, "pixels": SIZE,
        "clip": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1},
        "t5": {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_heads": 2, "num_layers": 1},
    },
}


def configs(preset: str) -> dict[str, dict[str, Any]]:
    """The config.json of each component with weights, with the keys that the published files have.

    Raises ValueError for an unknown preset.
    """
    check_choice("FLUX", "preset", preset, tuple(_SIZES))
    sizes = _SIZES[preset]
    levels = len(sizes["vae_channels"])
    return {
        "transformer": {
            "_class_name": "FluxTransformer2DModel",
            "_diffusers_version": "0.30.0.dev0",
            "attention_head_dim": 16,
            "axes_dims_rope": [4, 6, 6],  # not in the published file: its heads have the default 16 + 56 + 56
            "guidance_embeds": True,
            "in_channels": 4 * sizes["latent_channels"],
            "joint_attention_dim": sizes["t5"]["d_model"],
            "num_attention_heads": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "patch_size": 1,
            "pooled_projection_dim": sizes["clip"]["hidden_size"],
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": "0.30.0.dev0",
            "act_fn": "silu",
            "block_out_channels": sizes["vae_channels"],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "force_upcast": True,
            "in_channels": 3,
            "latent_channels": sizes["latent_channels"],
            "latents_mean": None,
            "latents_std": None,
            "layers_per_block": 1,
            "mid_block_add_attention": True,
            "norm_num_groups": sizes["vae_groups"],
            "out_channels": 3,
            "sample_size": sizes["pixels"],
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        },
        "text_encoder": clip_config(sizes["clip"], tokens=len(clip_vocabulary()[0]), transformers_version="4.43.3"),
        "text_encoder_2": t5_config(
            sizes["t5"], model="T5EncoderModel", tokens=len(t5_pieces()) + len(t5_sentinels()), transformers_version="4.43.3"
        ),
    }


def checkpoint(preset: str = "random") -> TinyCheckpoint:
    """The checkpoint of a preset: "random" (for tests; float32; sizes divisible by 16 pixels) or "demo" (as the demo's
    checkpoint, float16; 32x32 pixels). Raises ValueError for an unknown preset.
    """
    return TinyCheckpoint(
        model="FLUX",
        index=MODEL_INDEX,
        scheduler=SCHEDULER,
        configs=configs(preset),
        processors={"tokenizer": write_clip_tokenizer, "tokenizer_2": write_t5_tokenizer},
        dtype=PRESETS[preset],
        published_keys={"text_encoder": clip_keys, "text_encoder_2": t5_keys},
        shards={"transformer": 3, "text_encoder_2": 2},
    )


def write_flux(folder: str | Path, *, seed: int = 0, preset: str = "random", overwrite: bool = False) -> Path:
    """Write a complete FLUX folder with random weights and return its path; see `checkpoint` and
    `TinyCheckpoint.write_random`."""
    return checkpoint(preset).write_random(folder, seed=seed, overwrite=overwrite)
