"""Handing weights on: a run's checkpoint as diffusers loads it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo_grpo.checkpoints.kohya_names import kohya_lora
from fastvideo_grpo.config.keys import LoRAConfig
from fastvideo_grpo.disk.room import refusal
from fastvideo_grpo.engines.sharded_loading import CheckpointReader
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.model_files.clean_folder import write_unmarked
from fastvideo_grpo.model_files.json_files import read_json
from fastvideo_grpo.model_files.selection import unread
from fastvideo_grpo.models.diffusers_names import DiffusersNames, check_shapes, denoiser_names, tensor_shapes
from fastvideo_grpo.models.family import Family
from fastvideo_grpo.models.networks import diffusers_denoiser
from fastvideo_grpo.models.registry import FAMILIES

# Without these a folder is not taken for a pipeline or a model.
_MAKES_WHOLE = ("config.json", "model_index.json")

KOHYA_FILE = "kohya_lora.safetensors"

# What --link links; the rest are small files that people edit.
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")


def model_names(family: Family, config: dict[str, Any]) -> DiffusersNames:
    """The trained network's names against diffusers', for a ``transformer/config.json`` or ``unet/config.json``."""
    module = diffusers_denoiser(config)
    return denoiser_names(family, config["_class_name"], tensor_shapes(module.state_dict()))


def check_out(out: Path) -> None:
    """Raise UserError unless ``out`` is a folder that can be written and holds nothing, or is not there."""
    answer = refusal(out)
    if answer is not None:
        repair = "free space there" if answer.full else "repair it"
        raise UserError(f"--out {out} cannot be written: {answer.reason}; {repair}, or choose another folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; choose another folder")


def shard_bytes(size: str) -> int:
    """The bytes of a size such as "10GB" or "500MB"; raises UserError for what is none."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])B", size.strip().upper(), re.ASCII)
    largest = int(float(found[1]) * 1000 ** (1 + "KMGT".index(found[2]))) if found and len(found[1]) < 20 else 0
    if largest < 1:
        raise UserError(f"--max-shard-size {size} is no size; use for example 10GB or 500MB")
    return largest


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes ``out`` at the end of the block; after an exception nothing of it is left.

    Raises:
        UserError: ``out`` holds something already, or the disk refused.
    """
    from safetensors import SafetensorError

    check_out(out)
    target = out.resolve()
    unfinished = target.with_name(target.name + ".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
        unfinished.mkdir(parents=True)
        yield unfinished
        if not target.exists():
            unfinished.rename(target)
        else:  # an empty folder, which may be the one the user stands in: what makes it a checkpoint comes last
            for entry in sorted(unfinished.iterdir(), key=lambda entry: (entry.name in _MAKES_WHOLE, entry.name)):
                entry.rename(target / entry.name)
    except (OSError, SafetensorError) as failure:
        raise UserError(f"--out {out} cannot be written ({failure}); free space there, or choose another folder") from failure
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_denoiser(
    weights: Mapping[str, Tensor],
    config: dict[str, Any],
    out: Path,
    dtype: torch.dtype,
    shard_size: str = "10GB",
) -> None:
    """Write full weights as ``out/`` in diffusers' layout (``config.json``, sharded safetensors with an index).

    Memory holds one file's tensors in ``dtype`` beyond what ``weights`` itself holds.

    Args:
        weights: complete, under diffusers' names; each is asked for once.
        config: the network's ``config.json`` in the checkpoint that training started from.
        dtype: of the files.
        shard_size: of the largest file, such as "10GB" or "500MB".

    Raises:
        UserError: names or shapes are not those of the model, or the size is none.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    module = diffusers_denoiser(config)
    shapes = tensor_shapes(module.state_dict())
    check_shapes({name: shapes.get(name, ()) for name in weights}, shapes)  # the shapes themselves are checked below
    planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    plan = split_torch_state_dict_into_shards(
        planned, filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size=shard_bytes(shard_size)
    )
    module.save_config(out)
    for file, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            weight = weights[name]
            check_shapes({name: tuple(weight.shape)}, {name: shapes[name]})
            tensors[name] = weight.to(dtype).contiguous()
        save_file(tensors, out / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (out / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_lora(
    adapters: Mapping[str, Tensor], lora: LoRAConfig, pipeline: str, denoiser: str, out: Path, dtype: torch.dtype
) -> None:
    """Write adapters as ``out/pytorch_lora_weights.safetensors``, which diffusers' ``load_lora_weights`` reads.

    The scale alpha / rank is folded into lora_B, and the file's metadata says alpha = rank: a reader that looks at the
    tensors alone adds the same B A to the weights as one that reads the metadata.

    Args:
        adapters: under diffusers' names, see :meth:`DiffusersNames.lora_to_diffusers`.
        pipeline: diffusers' pipeline class, such as "FluxPipeline".
        denoiser: the component that they are for, "transformer" or "unet".
        dtype: of the file.
    """
    import diffusers

    layers = {f"{name}.weight": tensor.to(dtype).contiguous() for name, tensor in fold_scale(adapters, lora).items()}
    targets = sorted({name.rpartition(".lora_")[0] for name in adapters})
    metadata = {"r": lora.rank, "lora_alpha": lora.rank, "target_modules": targets}
    getattr(diffusers, pipeline).save_lora_weights(
        str(out), **{f"{denoiser}_lora_layers": layers, f"{denoiser}_lora_adapter_metadata": metadata}
    )


def write_kohya_lora(
    adapters: Mapping[str, Tensor], lora: LoRAConfig, names: DiffusersNames, family: Family, out: Path, dtype: torch.dtype
) -> None:
    """Write adapters as ``out/kohya_lora.safetensors``, see :mod:`.kohya_names`.

    Raises:
        UserError: that format knows no such network, or layer.
    """
    from safetensors.torch import save_file

    if family.kohya_layer is None:
        known = " and ".join(other.name for other in FAMILIES.usable().values() if other.kohya_layer is not None)
        raise UserError(
            f"--lora-format kohya is for {known}; {family.name} has no names there: leave the option out, ComfyUI reads "
            "diffusers' format, too"
        )
    tensors = kohya_lora(fold_scale(adapters, lora), names.diffusers_shapes, family.kohya_layer)
    save_file({name: t.to(dtype).contiguous() for name, t in tensors.items()}, out / KOHYA_FILE, metadata={"format": "pt"})


def fold_scale(adapters: Mapping[str, Tensor], lora: LoRAConfig) -> dict[str, Tensor]:
    """Adapters whose B A is all that they add: lora_B times alpha / rank, in float32; none shares its memory."""
    scale = lora.alpha / lora.rank
    return {
        name: tensor.float() * scale if name.endswith(".lora_B") else tensor.float().clone()  # a fused layer's parts share A
        for name, tensor in adapters.items()
    }


class MergedLoRA(Mapping[str, Tensor]):
    """Full weights ``W + (alpha / rank) B A``, read and added when asked for; nothing is kept.

    The tensors are float32 where there is an adapter, elsewhere in the file's dtype.

    Args:
        base: the weights that training started from.
        adapters: under diffusers' names, see :meth:`DiffusersNames.lora_to_diffusers`.

    Raises:
        UserError: ``base`` lacks a layer that has an adapter.
    """

    def __init__(self, base: CheckpointReader, adapters: Mapping[str, Tensor], lora: LoRAConfig) -> None:
        self.base, self.adapters, self.scale = base, adapters, lora.alpha / lora.rank
        for name in adapters:
            weight = f"{name.rpartition('.')[0]}.weight"
            if weight not in base.shapes:
                raise UserError(f"{base.path} has no {weight}, which has an adapter; use the checkpoint it was trained on")

    def __getitem__(self, name: str) -> Tensor:
        weight = self.base.read(name)
        layer = name.removesuffix(".weight")
        if not name.endswith(".weight") or f"{layer}.lora_A" not in self.adapters:
            return weight
        down, up = self.adapters[f"{layer}.lora_A"], self.adapters[f"{layer}.lora_B"]
        return weight.float() + self.scale * (up.float() @ down.float())

    def __iter__(self) -> Iterator[str]:
        return iter(self.base.shapes)

    def __len__(self) -> int:
        return len(self.base.shapes)


def copy_components(checkpoint: Path, out: Path, denoiser: str, *, link: bool = False) -> None:
    """Copy everything but the component ``denoiser``, so that the folder loads with one ``from_pretrained``: of weight files
    those that training read, JSON without byte order marks, and in model_index.json no component that is not there (Stable
    Diffusion's safety checker, which many leave out).

    Args:
        link: hard links instead of copies of weight files; what symbolic links point at is linked.

    Raises:
        UserError: the file system makes no hard link there.
    """

    def place(source: str, target: str) -> str:
        if write_unmarked(Path(source), Path(target)):
            return target
        if not link or Path(source).suffix not in _WEIGHT_FILES:
            return str(shutil.copy2(source, target))
        try:
            os.link(os.path.realpath(source), target)
        except OSError as failure:
            raise UserError(
                f"--link: {source} cannot be hard-linked into {out.parent} ({failure.strerror}); put --out on the file "
                "system of the checkpoint, or leave --link out to copy"
            ) from failure
        return target

    for entry in sorted(checkpoint.iterdir()):
        if entry.name == denoiser or entry.name.startswith("."):
            continue
        if entry.is_dir():
            shutil.copytree(entry, out / entry.name, copy_function=place, ignore=lambda folder, _: unread(Path(folder)))
        elif entry.suffix == ".json":
            place(str(entry), str(out / entry.name))
    index = read_json(checkpoint / "model_index.json")
    absent = [name for name, part in index.items() if isinstance(part, list) and part[:1] != [None] and name != denoiser]
    absent = [name for name in absent if not (checkpoint / name).is_dir()]
    if absent:
        index |= {name: [None, None] for name in absent}
        (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
