"""Writing a diffusers folder as published ones are laid out: what the tiny checkpoints of all models have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvideo_grpo.tiny.target_folder import check_writable, replacing
from fastvideo_grpo.tiny.tokenizer_files import CLIP_LENGTH, write_json

if TYPE_CHECKING:
    from torch import nn

State = dict[str, torch.Tensor]

PRESETS = {"random": torch.float32, "demo": torch.float16}
"""Preset -> the dtype of its weights. "random" is for tests, "demo" is what a demo trains."""


@dataclass(frozen=True)
class TinyCheckpoint:
    """One tiny checkpoint of a model that is published as a diffusers folder.

    Attributes:
        model: the published model, for errors.
        index: model_index.json, with the library and class of each component; a component of which there is no configuration,
            scheduler or processor gets [None, None].
        scheduler: scheduler_config.json.
        configs: component with weights -> its config.json, with the keys that the published file has.
        processors: component that prepares text or images -> what makes the given folder and writes its files.
        dtype: of the written weights.
        published_keys: component -> from diffusers' and transformers' names of today to those of the published file, where they
            differ.
        shards: component -> in how many files its weights lie, where there are several.
        after_drawing: what is done to random weights, by component.
    """

    model: str
    index: dict[str, Any]
    scheduler: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    processors: dict[str, Callable[[Path], Any]]
    dtype: torch.dtype = torch.float32
    published_keys: Mapping[str, Callable[[State], State]] = field(default_factory=dict)
    shards: Mapping[str, int] = field(default_factory=dict)
    after_drawing: Mapping[str, Callable[[Any], None]] = field(default_factory=dict)

    def with_config(self, component: str, **values: Any) -> TinyCheckpoint:
        """The same with other values in the configuration of `component`: what a pretraining has measured."""
        return replace(self, configs={**self.configs, component: {**self.configs[component], **values}})

    def build(self) -> dict[str, nn.Module]:
        """The modules with the libraries' own initial weights, float32, in evaluation mode."""
        return {name: self._build(name, config).eval() for name, config in self.configs.items()}

    def _build(self, component: str, config: dict[str, Any]) -> nn.Module:
        library, name = self.index[component]
        if library == "diffusers":
            return getattr(import_module("diffusers"), name).from_config(config)
        # A pipeline's own module stands under the pipeline's name.
        cls: Any = getattr(import_module(library if library == "transformers" else f"diffusers.pipelines.{library}"), name)
        return cls(cls.config_class(**config))

    def write_random(self, folder: str | Path, *, seed: int = 0, overwrite: bool = False) -> Path:
        """Write it with random weights and return its path. The same seed writes the same bytes.

        Raises FileExistsError as `prepare` does.
        """
        self.prepare(folder, overwrite=overwrite)
        modules = self.build()
        for index, name in enumerate(sorted(modules)):
            randomize(modules[name], 1000 * seed + index)
            if name in self.after_drawing:
                self.after_drawing[name](modules[name])
        return self.write(folder, modules, overwrite=overwrite)

    def prepare(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Raise FileExistsError unless it may be written to `folder`: nothing is there, or with `overwrite` one like it."""
        check_writable(Path(folder), f"a {self.model} checkpoint", self._is_one, overwrite=overwrite)

    def _is_one(self, folder: Path) -> bool:
        index = folder / "model_index.json"
        return index.is_file() and json.loads(index.read_text()).get("_class_name") == self.index["_class_name"]

    def write(self, folder: str | Path, modules: Mapping[str, nn.Module], *, overwrite: bool = False) -> Path:
        """Write it with the weights of `modules` (as `build` makes them) and return its path; it appears when it is complete.

        Raises FileExistsError as `prepare` does.
        """
        folder = Path(folder)
        self.prepare(folder, overwrite=overwrite)
        with replacing(folder) as unfinished:
            unfinished.mkdir(parents=True)
            write_json(unfinished / "model_index.json", self._index())
            (unfinished / "scheduler").mkdir()
            write_json(unfinished / "scheduler" / "scheduler_config.json", self.scheduler)
            for name, write_processor in self.processors.items():
                write_processor(unfinished / name)
            for name, module in modules.items():
                self._write_component(unfinished / name, module.state_dict())
        return folder

    def _index(self) -> dict[str, Any]:
        written = {"scheduler", *self.processors, *self.configs}
        return {
            name: [None, None] if isinstance(value, list) and name not in written else value
            for name, value in self.index.items()
        }

    def _write_component(self, folder: Path, state: State) -> None:
        name, config, stem = folder.name, self.configs[folder.name], "diffusion_pytorch_model"
        if self.index[name][0] != "diffusers":
            stem = "model"
            # transformers 5 loads in this dtype, diffusers in float32 whatever the files hold: they have to agree.
            config = {**config, "torch_dtype": "float32"}
        if name in self.published_keys:
            state = self.published_keys[name](state)
        folder.mkdir()
        write_json(folder / "config.json", dict(sorted(config.items())))
        _write_weights(folder, stem, state, self.shards.get(name, 1), self.dtype)


def _write_weights(folder: Path, stem: str, state: State, shards: int, dtype: torch.dtype) -> None:
    """Safetensors of about equal size, with an index when there is more than one."""
    from safetensors.torch import save_file

    state = {key: value.detach().to(dtype).contiguous() for key, value in sorted(state.items())}
    total = sum(value.nbytes for value in state.values())
    parts: list[State] = [{} for _ in range(shards)]
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


def clip_keys(state: State) -> State:
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


def t5_keys(state: State) -> State:
    """The embedding stands in a published file once, as `shared.weight`."""
    return {key: value for key, value in state.items() if key != "encoder.embed_tokens.weight"}
