"""Writing a diffusers folder as published ones are laid out: what the tiny checkpoints of all models have in common."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastvideo_grpo.tiny.tokenizer_files import CLIP_LENGTH, write_json

if TYPE_CHECKING:
    from torch import nn


# Components that are models of transformers', whose files have other names than diffusers'.
TRANSFORMERS_MODELS = ("text_encoder", "text_encoder_2", "safety_checker")


class Component(NamedTuple):
    """A component with weights: its config.json, its tensors under their published names, in how many files."""

    config: dict[str, Any]
    state: dict[str, torch.Tensor]
    shards: int = 1


def prepare(folder: str | Path, model: str, pipeline: str, *, overwrite: bool = False) -> None:
    """Raise FileExistsError unless a checkpoint of `model` may be written to `folder`.

    It may when nothing is there, and with `overwrite` when there is a checkpoint of the diffusers class `pipeline`.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder, or pass --overwrite")
    index = folder / "model_index.json"
    if not index.is_file() or json.loads(index.read_text()).get("_class_name") != pipeline:
        raise FileExistsError(
            f"{folder} holds something else than a {model} checkpoint, so it is not overwritten; "
            "choose another folder, or empty this one yourself"
        )


def write(
    folder: str | Path,
    model_index: dict[str, Any],
    scheduler: dict[str, Any],
    *,
    dtype: torch.dtype,
    processors: dict[str, Callable[[Path], None]],
    components: dict[str, Component],
) -> Path:
    """Write a complete checkpoint in place of what is there and return its path; it appears when it is complete.

    processors: of text and of images; by component, a function that makes the given folder and writes the files. dtype: of
    the weights.
    """
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_json(unfinished / "model_index.json", model_index)
    (unfinished / "scheduler").mkdir()
    write_json(unfinished / "scheduler" / "scheduler_config.json", scheduler)
    for name, write_processor in processors.items():
        write_processor(unfinished / name)
    for name, (config, state, shards) in components.items():
        (unfinished / name).mkdir()
        stem = "diffusion_pytorch_model"
        if name in TRANSFORMERS_MODELS:
            stem = "model"
            # transformers 5 loads in this dtype, diffusers in float32 whatever the files hold: they have to agree.
            config = {**config, "torch_dtype": "float32"}
        write_json(unfinished / name / "config.json", dict(sorted(config.items())))
        _write_weights(unfinished / name, stem, state, shards, dtype)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    return folder


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


# --- CLIP, which all of these models have


def clip_config(sizes: dict[str, int], *, tokens: int, transformers_version: str) -> dict[str, Any]:
    """config.json of a text encoder as openai/clip-vit-large-patch14 has it, of `sizes` and with `tokens` tokens."""
    return {
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
        "projection_dim": sizes["hidden_size"],
        "transformers_version": transformers_version,
        "vocab_size": tokens,
        **sizes,
    }


def clip_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published encoders were saved by transformers 4: their keys start with `text_model.`, which transformers 5
    dropped."""
    return {"text_model." + key.removeprefix("text_model."): value for key, value in state.items()}


# --- T5, which FLUX and Wan have


def t5_config(sizes: dict[str, int], *, model: str, tokens: int, transformers_version: str, **more: Any) -> dict[str, Any]:
    """config.json of a published encoder of T5's kind, of `sizes` and with `tokens` tokens.

    model: the class, "T5EncoderModel" or "UMT5EncoderModel". more: keys that only this one has.
    """
    return {
        "architectures": [model],
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
        "model_type": model.removesuffix("EncoderModel").lower(),
        "num_decoder_layers": sizes["num_layers"],
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "transformers_version": transformers_version,
        "use_cache": True,
        # Published ones round their embedding up too: 32100 tokens, 32128 rows.
        "vocab_size": 64 * math.ceil(tokens / 64),
        **more,
        **sizes,
    }


def t5_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The embedding stands in a published file once, as `shared.weight`."""
    return {key: value for key, value in state.items() if key != "encoder.embed_tokens.weight"}
