"""A random HPS checkpoint of a few hundred kilobytes, in the published file's form."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WIDTH = 128  # two heads of 64, so that mixed up heads show
EMBEDDING = 64
LAYERS = 2
HEADS = 2
PATCH = 8
GRID = 4
TEXT_LENGTH = 77


def open_clip_weights(vocabulary: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float32 weights under open_clip's names; norms, biases and projections are random too, since a mapping that
    mixes up ones and zeros would not show."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, mean: float = 0.0, std: float = 0.1) -> torch.Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    weights = {
        "positional_embedding": draw(TEXT_LENGTH, WIDTH),
        "text_projection": draw(WIDTH, EMBEDDING),
        "logit_scale": torch.tensor(4.6),
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


def write_tiny_hps(path: Path, tokenizer: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint for the vocabulary of the `tokenizer` folder, in half precision, and return its path."""
    vocabulary = len(json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8")))
    weights = {name: tensor.half() for name, tensor in open_clip_weights(vocabulary, seed=seed).items()}
    torch.save({"state_dict": weights}, path)
    return path
