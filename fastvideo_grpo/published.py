"""Configurations of published checkpoints: facts that let a recipe be checked at its real size without the weights."""

from __future__ import annotations

from typing import Any

FLUX_1_DEV: dict[str, dict[str, Any]] = {
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
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    "text_encoder_2": {"d_model": 4096, "num_layers": 24},
}
"""black-forest-labs/FLUX.1-dev: the keys this project reads."""

BY_KIND = {"flux": ("FLUX.1-dev", FLUX_1_DEV)}
