"""Tiny HunyuanVideo checkpoints in the form of hunyuanvideo-community/HunyuanVideo's diffusers folder: same files, same
key names."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvideo_grpo.tiny import checkpoint_files
from fastvideo_grpo.tiny.checkpoint_files import Component, clip_config, clip_keys, randomize
from fastvideo_grpo.tiny.tokenizer_files import (
    LLAMA_LENGTH,
    VIDEO_WORDS,
    clip_vocabulary,
    llama_vocabulary,
    write_clip_tokenizer,
    write_llama_tokenizer,
)

if TYPE_CHECKING:
    from torch import nn

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
PRESETS = tuple(_SIZES)


@cache
def prompt_template() -> str:
    """The text that HunyuanVideo's pipelines put around a prompt, with {} in the prompt's place."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    return str(DEFAULT_PROMPT_TEMPLATE["template"])


def configs(preset: str) -> dict[str, dict[str, Any]]:
    """The config.json of each component with weights, with the keys that the published files have.

    Raises ValueError for an unknown preset.
    """
    if preset not in _SIZES:
        raise ValueError(f"tiny HunyuanVideo has no preset '{preset}'; allowed: {', '.join(PRESETS)}")
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


def build(preset: str) -> dict[str, nn.Module]:
    """The four modules of a preset; see `build_from`."""
    return build_from(configs(preset))


def build_from(config: dict[str, dict[str, Any]]) -> dict[str, nn.Module]:
    """The four modules of `configs` with the libraries' own initial weights, float32, in evaluation mode."""
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    modules = {
        "transformer": HunyuanVideoTransformer3DModel.from_config(config["transformer"]),
        "vae": AutoencoderKLHunyuanVideo.from_config(config["vae"]),
        "text_encoder": LlamaModel(LlamaConfig(**config["text_encoder"])),
        "text_encoder_2": CLIPTextModel(CLIPTextConfig(**config["text_encoder_2"])),
    }
    return {name: module.eval() for name, module in modules.items()}


def write_hunyuan_video(folder: str | Path, *, seed: int = 0, preset: str = "random", overwrite: bool = False) -> Path:
    """Write a complete HunyuanVideo folder with random weights and return its path.

    preset: "random" (for tests; float32; sizes divisible by 16 pixels) or "demo" (the shape of the demo's checkpoint,
    float16; 9 frames of 32x32 pixels). Frames are 4 k + 1 as for HunyuanVideo. The same seed writes the same bytes.

    Raises ValueError for an unknown preset, FileExistsError when the folder holds something and `overwrite` is False,
    or holds something else than a HunyuanVideo checkpoint.
    """
    prepare(folder, overwrite=overwrite)
    modules = build(preset)
    for index, name in enumerate(sorted(modules)):
        randomize(modules[name], 1000 * seed + index)
    return write(
        folder, modules, preset=preset, dtype=torch.float32 if preset == "random" else torch.float16, overwrite=overwrite
    )


def prepare(folder: str | Path, *, overwrite: bool = False) -> None:
    """Raise FileExistsError unless a checkpoint may be written to `folder`; see `write_hunyuan_video`."""
    checkpoint_files.prepare(folder, "HunyuanVideo", MODEL_INDEX["_class_name"], overwrite=overwrite)


def write(
    folder: str | Path, modules: dict[str, nn.Module], *, preset: str, dtype: torch.dtype, overwrite: bool = False
) -> Path:
    """Write `modules` (as `build` makes them) in `dtype` as a complete checkpoint and return its path.

    The folder appears when it is complete. Raises what `write_hunyuan_video` raises.
    """
    prepare(folder, overwrite=overwrite)
    return write_modules(folder, MODEL_INDEX, configs(preset), modules, dtype=dtype)


def write_modules(
    folder: str | Path,
    model_index: dict[str, Any],
    config: dict[str, dict[str, Any]],
    modules: dict[str, nn.Module],
    *,
    dtype: torch.dtype,
) -> Path:
    """Write `modules` (as `build_from` makes them of `config`) as a complete checkpoint, in place of what is there."""
    states = {name: module.state_dict() for name, module in modules.items()}
    states["text_encoder_2"] = clip_keys(states["text_encoder_2"])
    shards = {"transformer": 3, "text_encoder": 2}
    return checkpoint_files.write(
        folder,
        model_index,
        SCHEDULER,
        dtype=dtype,
        processors=tokenizers(),
        components={name: Component(config[name], state, shards.get(name, 1)) for name, state in states.items()},
    )


def tokenizers() -> dict[str, Callable[[Path], None]]:
    """The two functions that write a tokenizer into a folder, by component."""
    return {
        "tokenizer": partial(write_llama_tokenizer, words=VIDEO_WORDS, text=prompt_template()),
        "tokenizer_2": partial(write_clip_tokenizer, words=VIDEO_WORDS),
    }
