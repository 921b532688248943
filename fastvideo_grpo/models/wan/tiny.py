"""Tiny Wan 2.1 checkpoints in the form of Wan-AI/Wan2.1-T2V-1.3B-Diffusers: same files, same key names."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvideo_grpo.tiny import checkpoint_files
from fastvideo_grpo.tiny.checkpoint_files import Component, randomize, t5_config, t5_keys
from fastvideo_grpo.tiny.tokenizer_files import UMT5_SPECIAL, VIDEO_WORDS, t5_pieces, t5_sentinels, write_t5_tokenizer

from .family import VAE

if TYPE_CHECKING:
    from torch import nn

MODEL_INDEX: dict[str, Any] = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.33.0.dev0",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}

SCHEDULER: dict[str, Any] = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.33.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}

_LATENT_CHANNELS = 4
_TEXT_ENCODER = {"d_ff": 64, "d_kv": 16, "d_model": 32, "num_heads": 2, "num_layers": 2}


def configs() -> dict[str, dict[str, Any]]:
    """The config.json of each component with weights, with the keys that the published files have.

    x8 latents as in Wan 2.1 (FastVideo reckons with 8 whatever the file says), two layers everywhere.
    """
    tokens = len(t5_pieces(VIDEO_WORDS, UMT5_SPECIAL)) + len(t5_sentinels())
    return {
        "transformer": {
            "_class_name": "WanTransformer3DModel",
            "_diffusers_version": "0.33.0.dev0",
            "added_kv_proj_dim": None,
            "attention_head_dim": 16,
            "cross_attn_norm": True,
            "eps": 1e-06,
            "ffn_dim": 352,
            "freq_dim": 64,
            "image_dim": None,
            "in_channels": _LATENT_CHANNELS,
            "num_attention_heads": 4,
            "num_layers": 2,
            "out_channels": _LATENT_CHANNELS,
            "patch_size": [1, 2, 2],
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
            "text_dim": _TEXT_ENCODER["d_model"],
        },
        "vae": {
            "_class_name": "AutoencoderKLWan",
            "_diffusers_version": "0.33.0.dev0",
            "attn_scales": [],
            "base_dim": 8,
            "dim_mult": [1, 2, 4, 4],
            "dropout": 0.0,
            "latents_mean": VAE["latents_mean"][:_LATENT_CHANNELS],
            "latents_std": VAE["latents_std"][:_LATENT_CHANNELS],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True, True],
            "z_dim": _LATENT_CHANNELS,
        },
        "text_encoder": t5_config(
            _TEXT_ENCODER,
            model="UMT5EncoderModel",
            tokens=tokens,
            transformers_version="4.48.0",
            scalable_attention=True,
            tokenizer_class="T5Tokenizer",
        ),
    }


def build() -> dict[str, nn.Module]:
    """The three modules with the libraries' own initial weights, float32, in evaluation mode."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    config = configs()
    modules = {
        "transformer": WanTransformer3DModel.from_config(config["transformer"]),
        "vae": AutoencoderKLWan.from_config(config["vae"]),
        "text_encoder": UMT5EncoderModel(UMT5Config(**config["text_encoder"])),
    }
    return {name: module.eval() for name, module in modules.items()}


def write_wan(folder: str | Path, *, seed: int = 0, overwrite: bool = False) -> Path:
    """Write a complete Wan 2.1 folder with random weights, float32, and return its path.

    Sizes are divisible by 16 pixels, frames 4 k + 1. The same seed writes the same bytes.

    Raises FileExistsError when the folder holds something and `overwrite` is False, or holds something else than a Wan
    checkpoint.
    """
    checkpoint_files.prepare(folder, "Wan 2.1", MODEL_INDEX["_class_name"], overwrite=overwrite)
    config, modules = configs(), build()
    for index, name in enumerate(sorted(modules)):
        randomize(modules[name], 1000 * seed + index)
    states = {name: module.state_dict() for name, module in modules.items()}
    states["text_encoder"] = t5_keys(states["text_encoder"])
    shards = {"transformer": 2, "text_encoder": 2}
    return checkpoint_files.write(
        folder,
        MODEL_INDEX,
        SCHEDULER,
        dtype=torch.float32,
        # Published with 300 sentinels.
        processors={"tokenizer": partial(write_t5_tokenizer, words=VIDEO_WORDS, special=UMT5_SPECIAL)},
        components={name: Component(config[name], state, shards.get(name, 1)) for name, state in states.items()},
    )
