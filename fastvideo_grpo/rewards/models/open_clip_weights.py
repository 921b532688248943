"""Weights of open_clip's ViT CLIP models in transformers' `CLIPModel`.

open_clip itself is no dependency of a run: the reward models that are published in its form (HPS, DFN CLIP) need no more of
it than the names of its tensors. The tests compare with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastvideo_grpo.rewards.models.clip_backend import frozen_clip
from fastvideo_grpo.rewards.models.weight_files import some

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

StateDict = Mapping[str, torch.Tensor]

_EMBEDDINGS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "logit_scale": "logit_scale",
}
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # transformers' spelling
    "visual.ln_post": "vision_model.post_layernorm",
}
# open_clip multiplies by these from the right, transformers has linear layers.
_PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_NAMES = {
    **_EMBEDDINGS,
    **_PROJECTIONS,
    **{f"{norm}.{part}": f"{to}.{part}" for norm, to in _NORMS.items() for part in ("weight", "bias")},
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# Models with `custom_text` have their text tower under this prefix.
_TEXT_PREFIX = "text."
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")

# Older versions of open_clip saved the causal mask.
_NOT_WEIGHTS = {"attn_mask"}


class Heads(NamedTuple):
    """Attention heads of the two towers."""

    vision: int
    text: int


def attention_heads(width: int, *, vision: bool) -> int:
    """Heads of a tower of `width` channels: the tensors do not tell.

    64 channels a head, open_clip's default, but for the wider of its published image towers (H, g, bigG and e), which
    have 16 heads each. Raises ValueError for a width that is none of these.
    """
    if vision and width in (1280, 1408, 1664, 1792):
        return 16
    if width % 64 or (vision and width > 1024):
        raise ValueError(
            f"the {'image' if vision else 'text'} tower is {width} wide; open_clip's ViTs are a multiple of 64"
            f"{' up to 1024, or 1280, 1408, 1664 or 1792' if vision else ''}, and the number of attention "
            "heads follows from that: this is another kind of model"
        )
    return width // 64


def clip_config(weights: StateDict, *, quick_gelu: bool = False, heads: Heads | None = None) -> CLIPConfig:
    """The configuration of the `CLIPModel` that has the sizes of open_clip's `weights`.

    quick_gelu: the activation of OpenAI's models and of those with "quickgelu" in their name; the others have GELU.
    heads: attention heads; None are those of the published models of these widths, see `attention_heads`.

    Raises ValueError when the sizes cannot be read: a tensor is missing or has another number of dimensions than a ViT's.
    """
    from transformers import CLIPConfig

    weights = _without_prefix(weights)
    vocabulary, text_width = _shape(weights, "token_embedding.weight", 2)
    context_length, _ = _shape(weights, "positional_embedding", 2)
    vision_width, _, patch, _ = _shape(weights, "visual.conv1.weight", 4)
    positions, _ = _shape(weights, "visual.positional_embedding", 2)
    _, projection = _shape(weights, "visual.proj", 2)
    grid = math.isqrt(positions - 1)
    if grid * grid != positions - 1:
        raise ValueError(
            f"visual.positional_embedding has {positions} positions; a ViT has 1 and a square number, for the "
            "class and the patches"
        )
    activation = "quick_gelu" if quick_gelu else "gelu"
    text = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "intermediate_size": _shape(weights, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": _layers(weights, vision=False),
        "num_attention_heads": heads.text if heads else attention_heads(text_width, vision=False),
        "max_position_embeddings": context_length,
        "hidden_act": activation,
        # CLIP's vocabulary ends with these two; open_clip reads the text at its largest token id, the end of text.
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "projection_dim": projection,
    }
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": _shape(weights, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": _layers(weights, vision=True),
        "num_attention_heads": heads.vision if heads else attention_heads(vision_width, vision=True),
        "image_size": grid * patch,
        "patch_size": patch,
        "hidden_act": activation,
        "projection_dim": projection,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


def to_transformers(weights: StateDict) -> dict[str, torch.Tensor]:
    """open_clip's `weights` under the names and in the shapes of transformers' `CLIPModel`; views, in their own dtype.

    Raises ValueError for names that no ViT of open_clip has, or that `CLIPModel` has no place for (layer scale, a text
    tower from elsewhere).
    """
    mapped: dict[str, torch.Tensor] = {}
    unknown = []
    for name, tensor in _without_prefix(weights).items():
        block = _BLOCK.fullmatch(name)
        if name in _NAMES:
            # The scale is a number, or one in a vector.
            mapped[_NAMES[name]] = tensor.T if name in _PROJECTIONS else tensor.squeeze() if name == "logit_scale" else tensor
        elif block and block[3] == "attn.in_proj":
            for one, part in zip("qkv", tensor.chunk(3), strict=True):
                mapped[f"{_layer(block)}.self_attn.{one}_proj.{block[4]}"] = part
        elif block and block[3] in _IN_BLOCK:
            mapped[f"{_layer(block)}.{_IN_BLOCK[block[3]]}.{block[4]}"] = tensor
        elif name not in _NOT_WEIGHTS:
            unknown.append(name)
    if unknown:
        raise ValueError(f"found tensors that open_clip's ViT CLIP models do not have: {some(unknown)}")
    return mapped


def clip_model(
    weights: StateDict,
    *,
    matrix_dtype: torch.dtype = torch.float32,
    quick_gelu: bool = False,
    heads: Heads | None = None,
) -> CLIPModel:
    """A frozen `CLIPModel` in evaluation mode with open_clip's `weights`, whatever floating-point dtype they have.

    matrix_dtype: see `frozen_clip`. quick_gelu, heads: see `clip_config`. `weights` are copied and may go away.

    Raises ValueError when `weights` are not those of an open_clip ViT CLIP model, all of them and in fitting shapes.
    """
    mapped = to_transformers(weights)
    config = clip_config(weights, quick_gelu=quick_gelu, heads=heads)
    return frozen_clip(config, mapped, matrix_dtype=matrix_dtype, origin=" (as transformers calls it)")


def _without_prefix(weights: StateDict) -> StateDict:
    return {name.removeprefix(_TEXT_PREFIX): tensor for name, tensor in weights.items()}


def _layer(block: re.Match[str]) -> str:
    return f"{'vision_model' if block[1] else 'text_model'}.encoder.layers.{block[2]}"


def _layers(weights: StateDict, *, vision: bool) -> int:
    blocks = [_BLOCK.fullmatch(name) for name in weights]
    return 1 + max(int(block[2]) for block in blocks if block and bool(block[1]) == vision)


def _shape(weights: StateDict, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in weights:
        raise ValueError(f"no tensor '{name}' among {len(weights)}; every ViT CLIP model of open_clip has it")
    shape = tuple(weights[name].shape)
    if len(shape) != dimensions:
        raise ValueError(f"'{name}' is {list(shape)}; in open_clip's ViT CLIP models it has {dimensions} dimensions")
    return shape
