"""Tiny FLUX checkpoints in the form of black-forest-labs/FLUX.1-dev's diffusers folder: same files, same key names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvideo_grpo.tiny import checkpoint_files
from fastvideo_grpo.tiny.checkpoint_files import Component, clip_config, clip_keys, randomize, t5_config, t5_keys
from fastvideo_grpo.tiny.shapes import SIZE
from fastvideo_grpo.tiny.tokenizer_files import (
    clip_vocabulary,
    t5_pieces,
    t5_sentinels,
    write_clip_tokenizer,
    write_t5_tokenizer,
)

if TYPE_CHECKING:
    from torch import nn

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
PRESETS = tuple(_SIZES)


def configs(preset: str) -> dict[str, dict[str, Any]]:
    """The config.json of each component with weights, with the keys that the published files have.

    Raises ValueError for an unknown preset.
    """
    if preset not in _SIZES:
        raise ValueError(f"tiny FLUX has no preset '{preset}'; allowed: {', '.join(PRESETS)}")
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


def build(preset: str) -> dict[str, nn.Module]:
    """The four modules of a preset with the libraries' own initial weights, float32, in evaluation mode."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    config = configs(preset)
    modules = {
        "transformer": FluxTransformer2DModel.from_config(config["transformer"]),
        "vae": AutoencoderKL.from_config(config["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
        "text_encoder_2": T5EncoderModel(T5Config(**config["text_encoder_2"])),
    }
    return {name: module.eval() for name, module in modules.items()}


def write_flux(folder: str | Path, *, seed: int = 0, preset: str = "random", overwrite: bool = False) -> Path:
    """Write a complete FLUX folder with random weights and return its path.

    preset: "random" (for tests; float32; sizes divisible by 16 pixels) or "demo" (the shape of the demo's checkpoint,
    float16; 32x32 pixels). The same seed writes the same bytes.

    Raises ValueError for an unknown preset, FileExistsError when the folder holds something and `overwrite` is False,
    or holds something else than a FLUX checkpoint.
    """
    prepare(folder, overwrite=overwrite)
    modules = build(preset)
    for index, name in enumerate(sorted(modules)):
        randomize(modules[name], 1000 * seed + index)
    return write(folder, modules, preset=preset, dtype=torch.float32 if preset == "random" else torch.float16,
                 overwrite=overwrite)


def prepare(folder: str | Path, *, overwrite: bool = False) -> None:
    """Raise FileExistsError unless a checkpoint may be written to `folder`; see `write_flux`."""
    checkpoint_files.prepare(folder, "FLUX", MODEL_INDEX["_class_name"], overwrite=overwrite)


def write(folder: str | Path, modules: dict[str, nn.Module], *, preset: str, dtype: torch.dtype,
          vae_config: dict[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Write `modules` (as `build` makes them) in `dtype` as a complete checkpoint and return its path.

    vae_config: values to put in place of the preset's, for the measured scaling and shift factors. The folder appears
    when it is complete. Raises what `write_flux` raises.
    """
    prepare(folder, overwrite=overwrite)
    config = configs(preset)
    config["vae"].update(vae_config or {})
    states = {name: module.state_dict() for name, module in modules.items()}
    states["text_encoder"] = clip_keys(states["text_encoder"])
    states["text_encoder_2"] = t5_keys(states["text_encoder_2"])
    shards = {"transformer": 3, "text_encoder_2": 2}
    return checkpoint_files.write(
        folder, MODEL_INDEX, SCHEDULER, dtype=dtype,
        processors={"tokenizer": write_clip_tokenizer, "tokenizer_2": write_t5_tokenizer},
        components={name: Component(config[name], state, shards.get(name, 1)) for name, state in states.items()})
