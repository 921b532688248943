"""Tiny FLUX checkpoints in the form of black-forest-labs/FLUX.1-dev's diffusers folder: same files, same key names."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvideo_grpo.tiny.shapes import SIZE
from fastvideo_grpo.tiny.tokenizer_files import (
    CLIP_LENGTH,
    clip_vocabulary,
    t5_pieces,
    t5_sentinels,
    write_clip_tokenizer,
    write_json,
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
    clip_tokens = len(clip_vocabulary()[0])
    t5_tokens = len(t5_pieces()) + len(t5_sentinels())
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
        "text_encoder": {
            "architectures": ["CLIPTextModel"],
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "dropout": 0.0,
            # As published: 2 is not the id of the end token, and tells transformers to pool at the largest id instead.
            "eos_token_id": 2,
            "hidden_act": "quick_gelu",
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": CLIP_LENGTH,
            "model_type": "clip_text_model",
            "pad_token_id": 1,
            "projection_dim": sizes["clip"]["hidden_size"],
            "transformers_version": "4.43.3",
            "vocab_size": clip_tokens,
            **sizes["clip"],
        },
        "text_encoder_2": {
            "architectures": ["T5EncoderModel"],
            "classifier_dropout": 0.0,
            "decoder_start_token_id": 0,
            "dense_act_fn": "gelu_new",
            "dropout_rate": 0.1,
            "eos_token_id": 1,
            "feed_forward_proj": "gated-gelu",
            "initializer_factor": 1.0,
            "is_encoder_decoder": True,
            "is_gated_act": True,
            "layer_norm_epsilon": 1e-06,
            "model_type": "t5",
            "num_decoder_layers": sizes["t5"]["num_layers"],
            "output_past": True,
            "pad_token_id": 0,
            "relative_attention_max_distance": 128,
            "relative_attention_num_buckets": 32,
            "tie_word_embeddings": False,
            "transformers_version": "4.43.3",
            "use_cache": True,
            # Published T5s round their embedding up too: 32100 tokens, 32128 rows.
            "vocab_size": 64 * math.ceil(t5_tokens / 64),
            **sizes["t5"],
        },
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


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    """Draw all weights so that signals keep their size from layer to layer: nothing in the output is trivially small,
    as it is with the libraries' own initial weights (zeros in places)."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(part.weight) for part in module.modules() if isinstance(part, torch.nn.Embedding)}
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in tables:
            parameter.copy_(noise)
        elif parameter.ndim > 1:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            if name.endswith("SelfAttention.q.weight"):
                parameter.div_(4)  # T5 does not scale its attention scores: its queries are small instead
        else:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))


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
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder, or pass --overwrite")
    index = folder / "model_index.json"
    if not index.is_file() or json.loads(index.read_text()).get("_class_name") != MODEL_INDEX["_class_name"]:
        raise FileExistsError(f"{folder} holds something else than a FLUX checkpoint, so it is not overwritten; "
                              "choose another folder, or empty this one yourself")


def write(folder: str | Path, modules: dict[str, nn.Module], *, preset: str, dtype: torch.dtype,
          vae_config: dict[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Write `modules` (as `build` makes them) in `dtype` as a complete checkpoint and return its path.

    vae_config: values to put in place of the preset's, for the measured scaling and shift factors. The folder appears
    when it is complete. Raises what `write_flux` raises.
    """
    folder = Path(folder)
    prepare(folder, overwrite=overwrite)
    config = configs(preset)
    config["vae"].update(vae_config or {})
    for name in ("text_encoder", "text_encoder_2"):
        # transformers 5 loads in this dtype, diffusers in float32 whatever the files hold: they have to agree.
        config[name]["torch_dtype"] = "float32"
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_json(unfinished / "model_index.json", MODEL_INDEX)
    (unfinished / "scheduler").mkdir()
    write_json(unfinished / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_clip_tokenizer(unfinished / "tokenizer")
    write_t5_tokenizer(unfinished / "tokenizer_2")
    for name, module in modules.items():
        (unfinished / name).mkdir()
        write_json(unfinished / name / "config.json", dict(sorted(config[name].items())))
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        shards = {"transformer": 3, "text_encoder_2": 2}.get(name, 1)
        _write_weights(unfinished / name, stem, _published_keys(name, module.state_dict()), shards, dtype)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    return folder


def _published_keys(name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published text encoders were saved by transformers 4: CLIP's keys start with `text_model.`, which transformers 5
    dropped, and T5's embedding stands there once, as `shared.weight`."""
    if name == "text_encoder":
        return {"text_model." + key.removeprefix("text_model."): value for key, value in state.items()}
    return {key: value for key, value in state.items() if key != "encoder.embed_tokens.weight"}


def _write_weights(folder: Path, stem: str, state: dict[str, torch.Tensor], shards: int, dtype: torch.dtype) -> None:
    """Safetensors of about equal size, with an index when there is more than one."""
    from safetensors.torch import save_file

    state = {key: value.detach().to(dtype).contiguous() for key, value in sorted(state.items())}
    total = sum(value.nbytes for value in state.values())
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    before = 0
    for key, value in state.items():
        parts[before * shards // total][key] = value
        before += value.nbytes
    if shards == 1:
        save_file(parts[0], folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    files = [f"{stem}-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, folder / file, metadata={"format": "pt"})
    places = {key: file for file, part in zip(files, parts, strict=True) for key in part}
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
