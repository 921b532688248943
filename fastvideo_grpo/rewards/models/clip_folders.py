"""A published CLIP in a folder: open_clip's layout or transformers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvideo_grpo.model_files.json_files import read_json
from fastvideo_grpo.rewards.media.preprocessing import Preprocessing, open_clip_preprocessing, transformers_preprocessing
from fastvideo_grpo.rewards.models.clip_backend import clean_prompt, frozen_clip
from fastvideo_grpo.rewards.models.open_clip_weights import Heads, clip_model
from fastvideo_grpo.rewards.models.weight_files import (
    OPEN_CLIP,
    OPEN_CLIP_STEMS,
    STEMS,
    describe,
    find_weights,
    naming,
    read_weights,
    some,
)

if TYPE_CHECKING:
    from transformers import CLIPModel

_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the second as transformers 5 saves it

# What the tensors or the code below speak for. Any other key describes a model that `CLIPModel` is not, unless it is off.
_KNOWN = {
    "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "patch_dropout"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}
# Keys that say what is so anyway, and keys of towers from elsewhere, which count only beside a name.
_USUAL = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",),
          "block_type": ("default",)}  # fmt: skip
_IDLE = (
    "attn_pooler_",
    "timm_pool",
    "timm_proj",
    "timm_drop",
    "timm_model_pretrained",
    "hf_model_pretrained",
    "hf_proj_type",
    "hf_pooler_type",
    "pad_id",
    "eos_id",
    "output_tokens",
)


class ClipFolder:
    """A CLIP of `kind`'s found in `folder`, its small files read, its weights not yet.

    open_clip's layout: open_clip_config.json and open_clip_model or open_clip_pytorch_model (.safetensors, .bin, .pt).
    transformers': config.json and model.safetensors or pytorch_model.bin. Both may be sharded, with an index.json; where both
    are there, open_clip's is taken. Prompts are prepared as the layout's library does: open_clip repairs characters and
    resolves HTML entities first.

    advice: where to get such a folder, for errors. Raises FileNotFoundError for a folder or a file that is not there;
    ValueError for a configuration of something else.
    """

    def __init__(self, kind: str, folder: Path, advice: str) -> None:
        self.kind, self.folder, self.advice = kind, folder, advice
        if not folder.is_dir():
            found = "is a file; set it to the folder that the checkpoint's files are in" if folder.is_file() else "is not there"
            raise FileNotFoundError(f"{kind}: the folder {folder} {found}; {advice}")
        own = find_weights(folder, OPEN_CLIP_STEMS)
        if (folder / OPEN_CLIP).is_file() and own:
            self.layout, self.weights, config = "open_clip", own, folder / OPEN_CLIP
        else:
            self.layout, config = "transformers", folder / "config.json"
            found_weights = find_weights(folder, STEMS)
            if not config.is_file() or not found_weights:
                raise FileNotFoundError(f"{kind}: {self._missing()}; {advice}")
            self.weights = found_weights
        with naming(kind, config, advice):
            self.config = read_json(config)
            if self.layout == "open_clip":
                self.config = _open_clip_config(self.config)
            elif self.config.get("model_type") != "clip":
                raise ValueError(f"expected model_type 'clip', found {self.config.get('model_type')!r}")

    @property
    def clean(self) -> Callable[[str], str]:
        """What is done to a prompt before the tokenizer."""
        return clean_prompt if self.layout == "open_clip" else str

    def model(self, matrix_dtype: torch.dtype) -> CLIPModel:
        """Read the weights; see `frozen_clip`. Raises ValueError for weights that are not those of the configuration."""
        with naming(self.kind, self.weights, self.advice):
            weights = read_weights(self.weights)
            if self.layout == "transformers":
                return frozen_clip(_transformers_config(self.config), _persistent(weights), matrix_dtype=matrix_dtype)
            return _open_clip_model(self.config["model_cfg"], weights, matrix_dtype)

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that the network takes, as the configuration says. Raises ValueError for a
        configuration that cannot be read."""
        if self.layout == "open_clip":
            return self.config["model_cfg"]["vision_cfg"].get("image_size", 224)
        with naming(self.kind, self.folder / "config.json", self.advice):
            return _transformers_config(self.config).vision_config.image_size

    def preprocessing(self, *, usual: bool = False) -> Preprocessing:
        """How pictures are prepared, as the folder's files say.

        usual: a folder in transformers' layout need not say; it is then CLIP's usual way, shorter side and centre crop.
        Raises FileNotFoundError without it.
        """
        if self.layout == "open_clip":
            with naming(self.kind, self.folder / OPEN_CLIP, self.advice):
                return open_clip_preprocessing(self.config.get("preprocess_cfg") or {}, self.image_size)
        path = next((self.folder / name for name in _PREPROCESSORS if (self.folder / name).is_file()), None)
        if path:
            with naming(self.kind, path, self.advice):
                content = read_json(path)
                return transformers_preprocessing(content.get("image_processor", content), self.image_size)
        if usual:
            return Preprocessing(self.image_size, crop="transformers")
        raise FileNotFoundError(
            f"{self.kind}: {self.folder} has no {_PREPROCESSORS[0]}, which says how its pictures are prepared; {self.advice}"
        )

    def _missing(self) -> str:
        names = sorted(path.name for path in self.folder.iterdir())
        found = f"found {some(names, 5)}" if names else "it is empty"
        return (
            f"{self.folder} holds no CLIP: expected {OPEN_CLIP} with {OPEN_CLIP_STEMS[1]}.bin or {OPEN_CLIP_STEMS[0]}"
            f".safetensors (open_clip), or config.json with model.safetensors or pytorch_model.bin (transformers); {found}"
        )


def _open_clip_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip_config.json, checked: its model is one that `CLIPModel` can be."""
    model = content.get("model_cfg")
    if not isinstance(model, dict) or not all(isinstance(model.get(tower), dict) for tower in ("vision_cfg", "text_cfg")):
        raise ValueError(f"expected model_cfg with vision_cfg and text_cfg, found {describe(dict(content))}")
    for part, known in _KNOWN.items():
        for key, value in (model if part == "model_cfg" else model[part]).items():
            if key in known or not value or value in _USUAL.get(key, ()) or key.startswith(_IDLE):
                continue
            raise ValueError(f"{part}.{key} is {value!r}: a model that transformers' CLIPModel cannot be")
    return dict(content)


def _open_clip_model(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], matrix_dtype: torch.dtype) -> CLIPModel:
    vision, text = config["vision_cfg"], config["text_cfg"]
    heads = Heads(vision.get("width", 768) // vision.get("head_width", 64), text.get("heads", 8))
    model: Any = clip_model(weights, matrix_dtype=matrix_dtype, quick_gelu=bool(config.get("quick_gelu")), heads=heads)
    found = model.config.vision_config.image_size
    if found != vision.get("image_size", 224):
        raise ValueError(
            f"the weights are for pictures of {found}x{found} pixels, {OPEN_CLIP} says {vision.get('image_size', 224)}"
        )
    return model


def _transformers_config(content: Mapping[str, Any]) -> Any:
    from transformers import CLIPConfig

    try:
        return CLIPConfig.from_dict(dict(content))
    except Exception as error:  # whatever its validation raises
        raise ValueError(f"transformers cannot read it ({type(error).__name__}: {error})") from error


def _persistent(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # Older versions of transformers saved the positions 0, 1, 2, ...
    return {name: tensor for name, tensor in weights.items() if not name.endswith(".position_ids")}
