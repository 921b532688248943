"""Handing weights on: a run's checkpoint as diffusers loads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo_grpo.config import LoRAConfig
from fastvideo_grpo.errors import UserError

# Module names that only say how a layer was wrapped (activation checkpointing, our LoRA layer).
_WRAPPERS = ("_checkpoint_wrapped_module.",)


def plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what activation checkpointing put into them."""
    plain = {}
    for name, weight in weights.items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        plain[name] = weight
    return plain


def empty_transformer(transformer_config: dict[str, Any]) -> Any:
    """diffusers' transformer of this ``config.json``, on the meta device."""
    import diffusers

    cls = getattr(diffusers, transformer_config["_class_name"])
    with torch.device("meta"):
        return cls.from_config(transformer_config)


def write_transformer(
    weights: Mapping[str, Tensor], checkpoint: Path, out: Path, dtype: torch.dtype | None, shard_size: str = "10GB"
) -> None:
    """Write full weights as ``out/`` in diffusers' layout (``config.json``, sharded safetensors with an index).

    Args:
        weights: names as diffusers has them (FastVideo's FLUX has the same), complete.
        checkpoint: the folder training started from; its ``transformer/config.json`` describes the model.
        dtype: of the files; None keeps the weights'.

    Raises:
        UserError: names or shapes are not those of the model.
    """
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())
    module = empty_transformer(config)
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if found != expected:
        wrong = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
        raise UserError(
            f"these weights are not those of {checkpoint / 'transformer'}: {len(wrong)} names or shapes differ, first "
            f"{wrong[0]}: {found.get(wrong[0])} instead of {expected.get(wrong[0])}"
        )
    module.load_state_dict({n: t.to(dtype or t.dtype).contiguous() for n, t in weights.items()}, assign=True)
    module.save_pretrained(out, max_shard_size=shard_size)


def write_lora(weights: Mapping[str, Tensor], lora: LoRAConfig, out: Path, dtype: torch.dtype | None) -> None:
    """Write adapters as ``out/pytorch_lora_weights.safetensors``, which diffusers' ``load_lora_weights`` reads.

    Rank and alpha go into the file's metadata, so that diffusers scales the adapters as training did.
    """
    from diffusers import FluxPipeline

    layers = {f"{name}.weight": t.to(dtype or t.dtype).contiguous() for name, t in weights.items()}
    targets = sorted({name.rpartition(".lora_")[0] for name in weights})
    metadata = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": targets}
    FluxPipeline.save_lora_weights(
        str(out),
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=metadata,
    )


def merge_lora(base: Mapping[str, Tensor], weights: Mapping[str, Tensor], lora: LoRAConfig) -> dict[str, Tensor]:
    """Full weights ``W + (alpha / rank) B A`` in float32 where there is an adapter."""
    merged = {name: t.float() for name, t in base.items()}
    for name, down in weights.items():
        layer, _, kind = name.rpartition(".")
        if kind == "lora_A":
            up = weights[f"{layer}.lora_B"]
            merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + lora.alpha / lora.rank * (up.float() @ down.float())
    return merged


def read_transformer(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of ``checkpoint/transformer``, all shards, on the CPU."""
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in sorted((checkpoint / "transformer").glob("*.safetensors")):
        weights.update(load_file(file))
    return weights


def copy_components(checkpoint: Path, out: Path) -> None:
    """Copy everything but the transformer, so that the folder loads with one ``from_pretrained``."""
    for entry in sorted(checkpoint.iterdir()):
        if entry.name == "transformer" or entry.name.startswith("."):
            continue
        if entry.is_dir():
            shutil.copytree(entry, out / entry.name, dirs_exist_ok=True)
        elif entry.suffix == ".json":
            shutil.copy2(entry, out / entry.name)
