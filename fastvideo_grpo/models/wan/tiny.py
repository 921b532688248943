"""Tiny Wan 2.1 checkpoints in the form of Wan-AI/Wan2.1-T2V-1.3B-Diffusers: same files, same key names."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from fastvideo_grpo.tiny.checkpoint_files import TinyCheckpoint, t5_config, t5_keys
from fastvideo_grpo.tiny.tokenizer_files import UMT5_SPECIAL, VIDEO_WORDS, t5_pieces, t5_sentinels, write_t5_tokenizer

from .family import VAE

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


def checkpoint() -> TinyCheckpoint:
    """Float32; sizes divisible by 16 pixels, frames 4 k + 1."""
    return TinyCheckpoint(
        model="Wan 2.1",
        index=MODEL_INDEX,
        scheduler=SCHEDULER,
        configs=configs(),
        # Published with 300 sentinels.
        processors={"tokenizer": partial(write_t5_tokenizer, words=VIDEO_WORDS, special=UMT5_SPECIAL)},
        published_keys={"text_encoder": t5_keys},
        shards={"transformer": 2, "text_encoder": 2},
    )


def write_wan(folder: str | Path, *, seed: int = 0, overwrite: bool = False) -> Path:
    """Write a complete Wan 2.1 folder with random weights and return its path; see `checkpoint` and
    `TinyCheckpoint.write_random`."""
    return checkpoint().write_random(folder, seed=seed, overwrite=overwrite)
