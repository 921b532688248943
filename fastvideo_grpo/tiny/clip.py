"""Tiny random CLIPs in the forms in which reward models are published: open_clip's folder, transformers', and HPS's file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from fastvideo_grpo.tiny.tokenizer_files import CLIP_LENGTH, clip_vocabulary, write_clip_tokenizer, write_json

Layout = Literal["open_clip", "transformers"]
LAYOUTS: tuple[Layout, ...] = ("open_clip", "transformers")

WIDTH = 128
EMBEDDING = 64
LAYERS = 2
HEADS = 2  # of 64 channels as in most published models, and more than one, so that mixed up heads show
PATCH = 8
GRID = 4
IMAGE_SIZE = GRID * PATCH
LOGIT_SCALE = 4.6

_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def open_clip_weights(vocabulary: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float32 weights under open_clip's names, for `vocabulary` tokens; norms, biases and projections are random too,
    since a mapping that mixes up ones and zeros would not show."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, mean: float = 0.0, std: float = 0.1) -> torch.Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    weights = {
        "positional_embedding": draw(CLIP_LENGTH, WIDTH),
        "text_projection": draw(WIDTH, EMBEDDING),
        "logit_scale": torch.tensor(LOGIT_SCALE),
        "visual.class_embedding": draw(WIDTH),
        "visual.positional_embedding": draw(GRID**2 + 1, WIDTH),
        "visual.proj": draw(WIDTH, EMBEDDING),
        "visual.conv1.weight": draw(WIDTH, 3, PATCH, PATCH),
        "token_embedding.weight": draw(vocabulary, WIDTH, std=1.0),
    }
    norms = ["ln_final", "visual.ln_pre", "visual.ln_post"]
    for tower in ("", "visual."):
        for layer in range(LAYERS):
            block = f"{tower}transformer.resblocks.{layer}."
            norms += [block + "ln_1", block + "ln_2"]
            weights[block + "attn.in_proj_weight"] = draw(3 * WIDTH, WIDTH)
            weights[block + "attn.in_proj_bias"] = draw(3 * WIDTH)
            for linear, rows, columns in (
                ("attn.out_proj", WIDTH, WIDTH),
                ("mlp.c_fc", 4 * WIDTH, WIDTH),
                ("mlp.c_proj", WIDTH, 4 * WIDTH),
            ):
                weights[f"{block}{linear}.weight"] = draw(rows, columns)
                weights[f"{block}{linear}.bias"] = draw(rows)
    for norm in norms:
        weights[norm + ".weight"] = draw(WIDTH, mean=1.0)
        weights[norm + ".bias"] = draw(WIDTH)
    return weights


def open_clip_config(vocabulary: int, *, quick_gelu: bool = True) -> dict[str, Any]:
    """open_clip_config.json with the keys of apple/DFN5B-CLIP-ViT-H-14-378."""
    config: dict[str, Any] = {
        "embed_dim": EMBEDDING,
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": LAYERS,
            "width": WIDTH,
            "head_width": WIDTH // HEADS,
            "patch_size": PATCH,
        },
        "text_cfg": {
            "context_length": CLIP_LENGTH,
            "vocab_size": vocabulary,
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
        },
    }
    preprocess = {"mean": _MEAN, "std": _STD, "interpolation": "bicubic", "resize_mode": "squash"}
    return {"model_cfg": config, "preprocess_cfg": preprocess}


def write_clip(
    folder: str | Path, *, layout: Layout = "open_clip", seed: int = 0, quick_gelu: bool = True, overwrite: bool = False
) -> Path:
    """Write a complete CLIP folder with random weights, about 3 MB, and return its path.

    layout: "open_clip" as apple/DFN5B-CLIP-ViT-H-14-378 is published, "transformers" as yuvalkirstain/PickScore_v1 and
    openai/clip-vit-large-patch14 are. Both are the same model for the same seed. quick_gelu: its activation.

    Raises ValueError for an unknown layout, FileExistsError when the folder holds something and `overwrite` is False, or
    holds something else than a CLIP.
    """
    folder = Path(folder)
    if layout not in LAYOUTS:
        raise ValueError(f"tiny CLIP has no layout '{layout}'; allowed: {', '.join(LAYOUTS)}")
    _may_write(folder, overwrite)
    vocabulary = len(clip_vocabulary()[0])
    weights = open_clip_weights(vocabulary, seed=seed)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_clip_tokenizer(unfinished)
    if layout == "open_clip":
        write_json(unfinished / "open_clip_config.json", open_clip_config(vocabulary, quick_gelu=quick_gelu))
        torch.save(weights, unfinished / "open_clip_pytorch_model.bin")
    else:
        from fastvideo_grpo.rewards.models.open_clip_weights import clip_model

        clip_model(weights, quick_gelu=quick_gelu).save_pretrained(unfinished)
        write_json(unfinished / "preprocessor_config.json", image_processor_config(IMAGE_SIZE))
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    return folder


def image_processor_config(image_size: int) -> dict[str, Any]:
    """preprocessor_config.json as openai/clip-vit-large-patch14 has it, for square pictures of `image_size` pixels a side."""
    return {
        "crop_size": image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": _MEAN,
        "image_std": _STD,
        "resample": 3,
        "size": image_size,
    }


def write_image_processor(folder: Path, image_size: int) -> None:
    """Write preprocessor_config.json as CompVis/stable-diffusion-v1-4 has it in `feature_extractor`."""
    folder.mkdir(parents=True)
    write_json(folder / "preprocessor_config.json", {**image_processor_config(image_size), "do_convert_rgb": True})


def write_hps(path: str | Path, tokenizer: str | Path, *, seed: int = 0) -> Path:
    """Write a random HPS checkpoint in the form of HPS_v2.1_compressed.pt, in half precision, for the vocabulary of the
    `tokenizer` folder, and return its path."""
    vocabulary = len(json.loads(Path(tokenizer, "vocab.json").read_text(encoding="utf-8")))
    weights = {name: tensor.half() for name, tensor in open_clip_weights(vocabulary, seed=seed).items()}
    torch.save({"state_dict": weights}, path)
    return Path(path)


def _may_write(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder, or pass --overwrite")
    config = folder / "config.json"
    transformers = config.is_file() and json.loads(config.read_text()).get("model_type") == "clip"
    if not transformers and not (folder / "open_clip_config.json").is_file():
        raise FileExistsError(
            f"{folder} holds something else than a CLIP, so it is not overwritten; choose another folder, or empty this one "
            "yourself"
        )
