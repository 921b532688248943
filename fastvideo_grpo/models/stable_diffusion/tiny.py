"""Tiny Stable Diffusion checkpoints in the form of CompVis/stable-diffusion-v1-4's diffusers folder: same files, same key
names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastvideo_grpo.tiny import checkpoint_files
from fastvideo_grpo.tiny.checkpoint_files import Component, clip_config, clip_keys, randomize
from fastvideo_grpo.tiny.clip import write_image_processor
from fastvideo_grpo.tiny.shapes import SIZE
from fastvideo_grpo.tiny.tokenizer_files import clip_vocabulary, write_clip_tokenizer

from .family import PUBLISHED

if TYPE_CHECKING:
    from torch import nn

PredictionType = Literal["epsilon", "v_prediction"]
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction")

MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.2.2",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

_V1_4 = PUBLISHED["scheduler"]
SCHEDULER: dict[str, Any] = {"_class_name": _V1_4["_class_name"], "_diffusers_version": "0.7.0.dev0", **_V1_4}
# What stabilityai/stable-diffusion-2 says otherwise; its network predicts v.
_V_PREDICTION: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    "prediction_type": "v_prediction",
}

# What differs between the presets. "random" is for tests: x8 latents as in v1-4, and a safety checker, so that the folder
# is complete. "demo" is what can be trained in minutes: 32x32 pixels, x4 latents, no safety checker.
_SIZES: dict[str, dict[str, Any]] = {
    "random": {
        "vae_channels": [8, 8, 16, 16], "vae_groups": 4, "pixels": 64,
        "unet_channels": [16, 32], "unet_groups": 4, "heads": 2, "unet_layers": 1,
        "clip": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
        "vision": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
                   "image_size": 16, "patch_size": 8},
    },
    "demo": {
        "vae_channels": [16, 16, 32], "vae_groups": 8, "pixels": SIZE,
        "unet_channels": [32, 48], "unet_groups": 8, "heads": 4, "unet_layers": 1,
        "clip": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1},
        "vision": None,
    },
}  # fmt: skip
PRESETS = tuple(_SIZES)

LATENT_CHANNELS = 4


def configs(preset: str) -> dict[str, dict[str, Any]]:
    """The config.json of each component with weights, with the keys that the published files have.

    Raises ValueError for an unknown preset.
    """
    if preset not in _SIZES:
        raise ValueError(f"tiny Stable Diffusion has no preset '{preset}'; allowed: {', '.join(PRESETS)}")
    sizes = _SIZES[preset]
    vae_levels, unet_levels = len(sizes["vae_channels"]), len(sizes["unet_channels"])
    config: dict[str, dict[str, Any]] = {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "_diffusers_version": "0.9.0",  # published: 0.2.2, where diffusers takes a sample_size below 64 for a mistake
            "act_fn": "silu",
            "attention_head_dim": sizes["heads"],  # diffusers reads it as the number of heads, here as in v1-4
            "block_out_channels": sizes["unet_channels"],
            "center_input_sample": False,
            "cross_attention_dim": sizes["clip"]["hidden_size"],
            "down_block_types": ["CrossAttnDownBlock2D"] * (unet_levels - 1) + ["DownBlock2D"],
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": LATENT_CHANNELS,
            "layers_per_block": sizes["unet_layers"],
            "mid_block_scale_factor": 1,
            "norm_eps": 1e-05,
            "norm_num_groups": sizes["unet_groups"],
            "out_channels": LATENT_CHANNELS,
            "sample_size": sizes["pixels"] // 2 ** (vae_levels - 1),
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (unet_levels - 1),
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": "0.2.2",
            "act_fn": "silu",
            "block_out_channels": sizes["vae_channels"],
            "down_block_types": ["DownEncoderBlock2D"] * vae_levels,
            "in_channels": 3,
            "latent_channels": LATENT_CHANNELS,
            "layers_per_block": 1,
            "norm_num_groups": sizes["vae_groups"],
            "out_channels": 3,
            "sample_size": sizes["pixels"],
            "up_block_types": ["UpDecoderBlock2D"] * vae_levels,
        },
        "text_encoder": clip_config(sizes["clip"], tokens=len(clip_vocabulary()[0]), transformers_version="4.21.0.dev0"),
    }
    if preset == "demo":
        config["vae"]["scaling_factor"] = 0.18215  # the published file leaves it out, and this is what diffusers takes then
    if sizes["vision"]:
        config["safety_checker"] = {
            "architectures": ["StableDiffusionSafetyChecker"],
            "initializer_factor": 1.0,
            "logit_scale_init_value": 2.6592,
            "model_type": "clip",
            "projection_dim": sizes["clip"]["hidden_size"],
            "text_config": {"model_type": "clip_text_model", **sizes["clip"]},
            "transformers_version": "4.21.0.dev0",
            "vision_config": {"model_type": "clip_vision_model", **sizes["vision"]},
        }
    return config


def build(preset: str) -> dict[str, nn.Module]:
    """The modules of a preset with the libraries' own initial weights, float32, in evaluation mode."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

    config = configs(preset)
    modules = {
        "unet": UNet2DConditionModel.from_config(config["unet"]),
        "vae": AutoencoderKL.from_config(config["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
    }
    if "safety_checker" in config:
        modules["safety_checker"] = StableDiffusionSafetyChecker(CLIPConfig(**config["safety_checker"]))
    return {name: module.eval() for name, module in modules.items()}


def write_stable_diffusion(
    folder: str | Path,
    *,
    seed: int = 0,
    preset: str = "random",
    prediction_type: PredictionType = "epsilon",
    overwrite: bool = False,
) -> Path:
    """Write a complete Stable Diffusion folder with random weights and return its path.

    preset: "random" (for tests; float32; sizes divisible by 16 pixels) or "demo" (the shape of the demo's checkpoint,
    float16; 32x32 pixels). prediction_type: what the scheduler's configuration says that the network predicts; "epsilon" as
    in Stable Diffusion 1, "v_prediction" as in 2. The weights are the same. The same seed writes the same bytes.

    Raises ValueError for an unknown preset or prediction type, FileExistsError when the folder holds something and
    `overwrite` is False, or holds something else than a Stable Diffusion checkpoint.
    """
    prepare(folder, prediction_type=prediction_type, overwrite=overwrite)
    modules = build(preset)
    for index, name in enumerate(sorted(modules)):
        randomize(modules[name], 1000 * seed + index)
    _follow_input(modules["unet"])
    if "safety_checker" in modules:
        _never_object(modules["safety_checker"])
    dtype = torch.float32 if preset == "random" else torch.float16
    return write(folder, modules, preset=preset, dtype=dtype, prediction_type=prediction_type, overwrite=overwrite)


def prepare(folder: str | Path, *, prediction_type: str = "epsilon", overwrite: bool = False) -> None:
    """Raise ValueError for an unknown prediction type, and FileExistsError unless a checkpoint may be written to `folder`;
    see `write_stable_diffusion`."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"tiny Stable Diffusion has no prediction_type '{prediction_type}'; allowed: {', '.join(PREDICTION_TYPES)}"
        )
    checkpoint_files.prepare(folder, "Stable Diffusion", MODEL_INDEX["_class_name"], overwrite=overwrite)


def write(
    folder: str | Path,
    modules: dict[str, nn.Module],
    *,
    preset: str,
    dtype: torch.dtype,
    prediction_type: PredictionType = "epsilon",
    vae_config: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `modules` (as `build` makes them) in `dtype` as a complete checkpoint and return its path.

    vae_config: values to put in place of the preset's, for the measured scaling factor. The folder appears when it is
    complete. Raises what `write_stable_diffusion` raises.
    """
    prepare(folder, prediction_type=prediction_type, overwrite=overwrite)
    config = configs(preset)
    config["vae"].update(vae_config or {})
    states = {name: module.state_dict() for name, module in modules.items()}
    states["text_encoder"] = clip_keys(states["text_encoder"])
    states["vae"] = {_published_vae_key(key): value for key, value in states["vae"].items()}
    scheduler = SCHEDULER if prediction_type == "epsilon" else {**SCHEDULER, **_V_PREDICTION}
    index = {**MODEL_INDEX, "scheduler": ["diffusers", scheduler["_class_name"]]}
    processors: dict[str, Callable[[Path], None]] = {"tokenizer": write_clip_tokenizer}
    if "safety_checker" in states:
        # transformers 4 has the vision tower in a module of its own, as the text encoder's.
        states["safety_checker"] = {
            key.replace("vision_model.", "vision_model.vision_model."): value
            for key, value in states["safety_checker"].items()
        }
        image_size = config["safety_checker"]["vision_config"]["image_size"]
        processors["feature_extractor"] = partial(write_image_processor, image_size=image_size)
    else:
        index.update(feature_extractor=[None, None], safety_checker=[None, None], requires_safety_checker=False)
    return checkpoint_files.write(
        folder, index, scheduler, dtype=dtype, processors=processors,
        components={name: Component(config[name], state) for name, state in states.items()},
    )  # fmt: skip


# The names that attention in the autoencoder had when v1-4 was published; diffusers still reads them.
_ATTENTION_KEYS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def _published_vae_key(key: str) -> str:
    for new, old in _ATTENTION_KEYS.items():
        key = key.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return key


@torch.no_grad()
def _follow_input(unet: Any, others: float = 0.2) -> None:
    """Let a random UNet's output be about its input scaled to size 1, and its own output `others` times as large.

    The noise that a trained UNet predicts is most of its input. A prediction that has nothing to do with it is divided by
    alpha, 0.07 at the first step, and latents grow to tens or hundreds of times their size in a few DDIM steps.
    """
    channels = LATENT_CHANNELS
    # Each latent beside its negative: their mean is 0, so that group norms only scale them, and
    # silu(x) - silu(-x) = x. The rows are those of the first skip connection, which the last block reads.
    signs = torch.eye(channels).repeat_interleave(2, dim=0)
    signs[1::2] *= -1
    rows = slice(0, 2 * channels)
    centre = torch.zeros_like(unet.conv_in.weight[rows])
    centre[:, :, 1, 1] = signs
    unet.conv_in.weight[rows] = centre
    unet.conv_in.bias[rows] = 0
    last = unet.up_blocks[-1]
    for layer in (last.resnets[-1].conv2, last.resnets[-1].conv_shortcut, last.attentions[-1].proj_out):
        layer.weight[rows] *= others
        layer.bias[rows] *= others
    skip = last.resnets[-1].conv_shortcut.in_channels - unet.conv_in.out_channels
    for row in range(2 * channels):
        last.resnets[-1].conv_shortcut.weight[row, skip + row] += 1
    unet.conv_out.weight *= others
    unet.conv_out.bias *= others
    unet.conv_out.weight[:, rows, 1, 1] += signs.T


@torch.no_grad()
def _never_object(safety_checker: Any) -> None:
    """Thresholds that no similarity exceeds: a random checker would blacken random pictures."""
    safety_checker.concept_embeds_weights.fill_(1)
    safety_checker.special_care_embeds_weights.fill_(1)
