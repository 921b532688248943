"""Weight files of other variants beside those that libraries read."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def others(tensors):
    """Other numbers of the same names, shapes and dtypes."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def add_decoys(folder: Path) -> set[str]:
    """Put every other variant that may lie in a component's folder beside its weights; the names of what was added.

    Old shards, a half-precision copy, EMA weights, a ``.bin``, and an index where there is one file or one file where there is
    an index, if the component's library prefers what is there.
    """
    before = {path.name for path in folder.iterdir()}
    stem = "diffusion_pytorch_model" if any(name.startswith("diffusion_pytorch_model") for name in before) else "model"
    wrong = others({name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()})
    names = sorted(wrong)
    shards = {f"{stem}-0000{i + 1}-of-00009.safetensors": names[i::2] for i in range(2)}
    for file, inside in shards.items():
        save_file({name: wrong[name] for name in inside}, folder / file, metadata={"format": "pt"})
    for file in (f"{stem}.fp16.safetensors", "ema.safetensors", "a.safetensors"):
        save_file({name: tensor.half() for name, tensor in wrong.items()}, folder / file, metadata={"format": "pt"})
    torch.save(wrong, folder / ("diffusion_pytorch_model.bin" if stem != "model" else "pytorch_model.bin"))
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists() and stem != "model":
        save_file(wrong, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    elif stem == "model" and not index.exists():
        places = {name: file for file, inside in shards.items() for name in inside}
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return {path.name for path in folder.iterdir()} - before
