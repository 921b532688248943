"""ImageReward: how well people would like the picture for the prompt, by a BLIP that reads the prompt while it looks.

Xu et al., arXiv 2304.05977. BLIP's ViT-L/16 sees the picture, its text encoder reads the prompt with cross attention to what
was seen, and a head of linear layers turns the first token into a number. The published package does not work with
transformers 5; here the weights are carried by transformers' own BLIP classes, which have the same arithmetic once they are
told BLIP's norms (epsilon 1e-6 in the image tower) and that the text encoder is no decoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvideo_grpo.rewards.base import MediaKind, Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.media import frames as frame_choice
from fastvideo_grpo.rewards.media.preprocessing import openai_preprocessing
from fastvideo_grpo.rewards.models import sources
from fastvideo_grpo.rewards.models.clip_backend import check_batch_size
from fastvideo_grpo.rewards.models.score_head import linear_head
from fastvideo_grpo.rewards.models.weight_files import checked, naming, read_weights
from fastvideo_grpo.rewards.registry import register

if TYPE_CHECKING:
    from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig

_GET_CHECKPOINT = f"the weights are ImageReward.pt of THUDM/ImageReward on Hugging Face: {sources.IMAGE_REWARD.advice()}"
_GET_TOKENIZER = f"set it to a folder with the vocab.txt of bert-base-uncased: {sources.BERT_VOCABULARY.advice()}"

# Of the head's numbers on the paper's validation prompts; published with the code.
SCORE_MEAN = 0.16717362830052426
SCORE_STD = 1.0333394966054072
# Tokens that a prompt is padded and cut to, as published.
TEXT_LENGTH = 35
# BLIP's own additions to BERT's vocabulary, [DEC] and [ENC], which ImageReward does not use.
_ADDED_TOKENS = 2

_TEXT, _VISION, _HEAD = "blip.text_encoder.", "blip.visual_encoder.", "mlp."
_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_IN_BLOCK = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")

StateDict = Mapping[str, torch.Tensor]


@register("image_reward")
class ImageReward:
    """The published score, (head - 0.167) / 1.033: mean 0 and deviation 1 over the paper's validation prompts, about -2 to 2;
    the mean over the frames. Everything is float32, as published (1.8 GB).

    checkpoint: ImageReward.pt.
    tokenizer: folder with the vocab.txt of bert-base-uncased.
    batch_size: pictures that go through the network together, at least 1.
    frames: of a video, which frames are scored: "first", "middle", "uniform:N" or "all", see `Frames`.

    Pictures are prepared as by OpenAI's package: shorter side to 224, bicubic, centre crop. A prompt is cut to 35 tokens.

    Raises FileNotFoundError for a path that is not there, before anything is loaded; ValueError for files that are not
    what they should be, a tokenizer of another vocabulary than the weights', and parameters out of range.
    """

    source = sources.IMAGE_REWARD
    outputs: tuple[str, ...] = ("image_reward",)
    paths: tuple[str, ...] = ("tokenizer",)
    media_kind: MediaKind = "any"

    def __init__(self, *, checkpoint: str, tokenizer: str, batch_size: int = 8, frames: str = frame_choice.DEFAULT) -> None:
        check_batch_size("image_reward", batch_size)
        self.frames = frame_choice.Frames(frames, "image_reward")
        file, words = Path(checkpoint), Path(tokenizer)
        if not file.is_file():
            found = f"the checkpoint {file} is a folder, it must be a file" if file.is_dir() else f"there is no file {file}"
            raise FileNotFoundError(f"image_reward: {found}; {_GET_CHECKPOINT}")
        if not (words / "vocab.txt").is_file():
            raise FileNotFoundError(f"image_reward: the tokenizer {words} has no vocab.txt; {_GET_TOKENIZER}")
        self.tokenizer = _read_tokenizer(words)
        self.batch_size = batch_size
        self.device = torch.device("cpu")
        with naming("image_reward", file, _GET_CHECKPOINT):
            weights = read_weights(file)
            self.vision: Any = vision_tower(weights)
            self.text: Any = text_encoder(weights)
            head = {name.removeprefix(_HEAD): tensor for name, tensor in weights.items() if name.startswith(_HEAD)}
            self.head: Any = linear_head(head, self.text.config.hidden_size)
        known = self.text.config.vocab_size - _ADDED_TOKENS
        if len(self.tokenizer) != known:
            raise ValueError(
                f"image_reward: the tokenizer {words} has {len(self.tokenizer)} tokens; {file} needs {known}; {_GET_TOKENIZER}"
            )
        self.prepare = openai_preprocessing(self.vision.config.image_size)

    @torch.no_grad()
    def score(self, request: RewardRequest) -> RewardResult:
        media = self.frames.of(request.media)
        prompts = [prompt for prompt in request.prompts for _ in range(media.shape[1])]
        pictures = media.flatten(0, 1)
        scores = torch.empty(len(prompts))
        for start in range(0, len(prompts), self.batch_size):
            batch = slice(start, start + self.batch_size)
            scores[batch] = self._scores(prompts[batch], self.prepare(pictures[batch], self.device)).cpu()
        mean = scores.view(media.shape[:2]).mean(dim=1)
        return RewardResult({"image_reward": mean}, torch.ones(len(request), dtype=torch.bool))

    def score_differentiably(
        self, pixels: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """See `DifferentiableReward`."""
        chosen = self.frames.of(pixels)
        repeated = [prompt for prompt in prompts for _ in range(chosen.shape[1])]
        pictures = chosen.flatten(0, 1)
        scores = [torch.empty(0, device=self.device)]
        for start in range(0, len(repeated), self.batch_size):
            batch = slice(start, start + self.batch_size)
            scores.append(self._scores(repeated[batch], self.prepare.differentiable(pictures[batch])))
        return {"image_reward": torch.cat(scores).view(chosen.shape[:2]).mean(dim=1)}

    def _scores(self, prompts: list[str], pixels: torch.Tensor) -> torch.Tensor:
        """B prompts, prepared pictures float32 [B, 3, S, S] -> float32 [B]."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=TEXT_LENGTH,
            return_tensors="pt",
            split_special_tokens=True,  # a prompt that spells out a special token cannot end itself
        ).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            seen = self.vision(pixel_values=pixels).last_hidden_state
            read = self.text(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                encoder_hidden_states=seen,
                is_decoder=False,  # every token sees every other
            ).last_hidden_state
            return (self.head(read[:, 0]).squeeze(-1) - SCORE_MEAN) / SCORE_STD

    def to(self, device: torch.device | str) -> Reward:
        self.device = torch.device(device)
        for part in (self.vision, self.text, self.head):
            part.to(self.device)
        return self

    def close(self) -> None:
        self.vision = self.text = self.head = None


def vision_tower(weights: StateDict) -> Any:
    """transformers' `BlipVisionModel`, frozen, float32, with the tensors "blip.visual_encoder.*" of `weights`.

    Raises ValueError for missing tensors and shapes that do not fit.
    """
    from transformers import BlipVisionModel

    own = _below(_VISION, weights)
    mapped = {}
    for name, tensor in own.items():
        block = _BLOCK.fullmatch(name)
        stem, _, part = name.rpartition(".")
        if block and block[2] in _IN_BLOCK:
            mapped[f"encoder.layers.{block[1]}.{_IN_BLOCK[block[2]]}.{block[3]}"] = tensor
        elif name in _VISION_NAMES:
            mapped[_VISION_NAMES[name]] = tensor
        elif stem in _VISION_NAMES:
            mapped[f"{_VISION_NAMES[stem]}.{part}"] = tensor
    with torch.device("meta"):
        model = BlipVisionModel(_vision_config(own))
    return _filled(model, mapped)


def text_encoder(weights: StateDict) -> Any:
    """transformers' `BlipTextModel`, frozen, float32, with the tensors "blip.text_encoder.*" of `weights`, which have its
    names. Raises ValueError for missing tensors and shapes that do not fit.
    """
    from transformers import BlipTextModel

    own = _below(_TEXT, weights)
    with torch.device("meta"):
        model: Any = BlipTextModel(_text_config(own), add_pooling_layer=False)
    _filled(model, own)
    # Not in the state dict, so still without storage.
    model.embeddings.position_ids = torch.arange(model.config.max_position_embeddings)[None]
    return model


def _filled(model: torch.nn.Module, weights: StateDict) -> torch.nn.Module:
    # What the module has no place for is left out, as the published loader does: it saved buffers and a second head.
    fitting = checked(weights, model.state_dict(), " (as transformers calls it)")
    model.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in fitting.items()}, assign=True)
    return model.requires_grad_(False).eval()


def _vision_config(weights: StateDict) -> BlipVisionConfig:
    from transformers import BlipVisionConfig

    width, _, patch, _ = _shape(weights, "patch_embed.proj.weight", 4, _VISION)
    positions = _shape(weights, "pos_embed", 3, _VISION)[1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=_shape(weights, "blocks.0.mlp.fc1.weight", 2, _VISION)[0],
        num_hidden_layers=_count(weights, r"blocks\.(\d+)\."),
        num_attention_heads=width // 64,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(weights: StateDict) -> BlipTextConfig:
    from transformers import BlipTextConfig

    vocabulary, width = _shape(weights, "embeddings.word_embeddings.weight", 2, _TEXT)
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=_shape(weights, "encoder.layer.0.crossattention.self.key.weight", 2, _TEXT)[1],
        intermediate_size=_shape(weights, "encoder.layer.0.intermediate.dense.weight", 2, _TEXT)[0],
        num_hidden_layers=_count(weights, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=width // 64,
        max_position_embeddings=_shape(weights, "embeddings.position_embeddings.weight", 2, _TEXT)[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # what makes transformers build the cross attention
        bos_token_id=None,  # nothing is generated
        eos_token_id=None,
        sep_token_id=None,
    )


def _below(prefix: str, weights: StateDict) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _count(weights: StateDict, pattern: str) -> int:
    return 1 + max(int(match[1]) for name in weights if (match := re.match(pattern, name)))


def _shape(weights: StateDict, name: str, dimensions: int, prefix: str) -> tuple[int, ...]:
    if name not in weights:
        raise ValueError(f"no tensor '{prefix}{name}', which ImageReward has")
    shape = tuple(weights[name].shape)
    if len(shape) != dimensions:
        raise ValueError(f"'{prefix}{name}' is {list(shape)}; in ImageReward it has {dimensions} dimensions")
    return shape


def _read_tokenizer(folder: Path) -> BertTokenizer:
    from transformers import BertTokenizer

    try:
        return BertTokenizer.from_pretrained(str(folder), local_files_only=True, do_lower_case=True)
    except Exception as error:  # whatever the libraries underneath raise for a damaged file
        raise ValueError(
            f"image_reward: the tokenizer {folder} cannot be read ({type(error).__name__}: {error}); {_GET_TOKENIZER}"
        ) from error
