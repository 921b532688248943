"""The CLIP under HPS, the CLIP score, PickScore and the aesthetic predictor: transformers' `CLIPModel`, batched, on pictures in
memory.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.nn import functional

from fastvideo_grpo.rewards.base import MediaKind, Reward
from fastvideo_grpo.rewards.media.frames import Frames
from fastvideo_grpo.rewards.media.preprocessing import Preparation
from fastvideo_grpo.rewards.models.weight_files import checked, some

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

Precision = Literal["fp32", "bf16"]

GET_TOKENIZER = (
    "set it to a folder with CLIP's vocab.json and merges.txt, such as the folder 'tokenizer' of a FLUX.1 or "
    "Stable Diffusion checkpoint (not 'tokenizer_2', which is T5's)"
)


def check_batch_size(kind: str, batch_size: int) -> None:
    """Raises ValueError, with the reward's `kind`, unless `batch_size` is a whole number, at least 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"{kind}: batch_size is {batch_size!r}; it must be a whole number, at least 1")


def matrix_dtype(kind: str, precision: Precision) -> torch.dtype:
    """The dtype of `frozen_clip`'s matrices. Raises ValueError, with the reward's `kind`, for an unknown precision."""
    if precision not in get_args(Precision):
        raise ValueError(f"{kind}: precision is {precision!r}; it must be one of {', '.join(get_args(Precision))}")
    return torch.bfloat16 if precision == "bf16" else torch.float32


class ClipBackend:
    """A frozen `CLIPModel` with all that it takes to embed pictures and prompts.

    prepare: the model's published preparation of pictures. tokenizer: None when no text will be embedded.
    clean: what the published code does to a prompt before its tokenizer. batch_size: pictures, or prompts, that go through
    the network together.

    Embeddings are float32 and of length 1. Those of pictures have gradients where their method says so; the weights never
    take any. Matrices in bfloat16 are applied under autocast; in float32, an autocast of the
    caller's is off.
    """

    def __init__(
        self,
        model: CLIPModel,
        prepare: Preparation,
        *,
        tokenizer: CLIPTokenizer | None = None,
        clean: Callable[[str], str] = str,
        batch_size: int,
    ) -> None:
        self.model: Any = model
        self.prepare = prepare
        self.tokenizer = tokenizer
        self.clean = clean
        self.batch_size = batch_size
        self.device = torch.device("cpu")
        self.half = model.visual_projection.weight.dtype is torch.bfloat16
        config: Any = model.config
        self.text_length: int = config.text_config.max_position_embeddings
        self.scale = float(model.logit_scale.exp())  # what a cosine is multiplied by in CLIP's own training

    @torch.no_grad()
    def cosines(self, prompts: list[str], media: torch.Tensor) -> torch.Tensor:
        """B prompts, uint8 [B, F, H, W, 3] -> float32 [B, F] on the CPU, of each frame and its sample's prompt."""
        return self._cosines(prompts, media, self._pictures).cpu()

    def differentiable_cosines(self, prompts: list[str], pixels: torch.Tensor) -> torch.Tensor:
        """B prompts, float [B, F, H, W, 3] in 0..1 -> float32 [B, F] on the device, with gradients."""
        return self._cosines(prompts, pixels, self._differentiable_pictures)

    def _cosines(
        self, prompts: list[str], media: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        # All samples of a group have one prompt.
        position = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self.texts(list(position))
        own = [position[prompt] for prompt in prompts for _ in range(media.shape[1])]
        frames = media.flatten(0, 1)
        cosines = [torch.empty(0, device=self.device)]
        for start in range(0, len(own), self.batch_size):
            batch = slice(start, start + self.batch_size)
            cosines.append((embed(frames[batch]) * texts[own[batch]]).sum(dim=-1))
        return torch.cat(cosines).view(media.shape[:2])

    @torch.no_grad()
    def pictures(self, media: torch.Tensor) -> torch.Tensor:
        """uint8 [N, H, W, 3], N at least 1 -> float32 [N, E]."""
        return torch.cat([self._pictures(batch) for batch in media.split(self.batch_size)])

    def differentiable_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        """float [N, H, W, 3] in 0..1, N at least 1 -> float32 [N, E], with gradients."""
        return torch.cat([self._differentiable_pictures(batch) for batch in pixels.split(self.batch_size)])

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> torch.Tensor:
        """P strings -> float32 [P, E]."""
        embeddings = []
        for start in range(0, len(prompts), self.batch_size):
            batch = [self.clean(prompt) for prompt in prompts[start : start + self.batch_size]]
            ids = tokens(self.tokenizer, batch, self.text_length).to(self.device)
            with self._precision():
                embeddings.append(_unit(self.model.get_text_features(input_ids=ids).pooler_output))
        return torch.cat(embeddings) if embeddings else torch.empty(0)

    def _pictures(self, media: torch.Tensor) -> torch.Tensor:
        return self._embedded(self.prepare(media, self.device))

    def _differentiable_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._embedded(self.prepare.differentiable(pixels))

    def _embedded(self, pixels: torch.Tensor) -> torch.Tensor:
        """Prepared pictures, float32 [N, 3, S, S] -> float32 [N, E]."""
        with self._precision():
            return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    def _precision(self) -> torch.autocast:
        # Also turns off an autocast of the caller's when the precision is fp32.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def to(self, device: torch.device | str) -> ClipBackend:
        self.device = torch.device(device)
        self.model.to(self.device)
        return self

    def close(self) -> None:
        self.model = None


class ClipReward:
    """What rewards on a CLIP have in common: a backend, a choice of frames, and no more weights than the backend's. The
    gradient is that of the one output, `factor` times the cosine."""

    media_kind: MediaKind = "any"
    outputs: tuple[str, ...]
    clip: ClipBackend
    frames: Frames
    factor: float = 1.0

    def score_differentiably(
        self, pixels: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """See `DifferentiableReward`."""
        cosines = self.clip.differentiable_cosines(prompts, self.frames.of(pixels))
        return {self.outputs[0]: self.factor * cosines.mean(dim=1)}

    def to(self, device: torch.device | str) -> Reward:
        self.clip.to(device)
        return self  # type: ignore[return-value]  # with `outputs` and `score` it is one

    def close(self) -> None:
        self.clip.close()


def clean_prompt(prompt: str) -> str:
    """The prompt as open_clip reads it: wrongly decoded characters repaired, HTML entities resolved (twice), white space
    made single blanks, lower case."""
    import ftfy

    prompt = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(prompt.split()).lower()


def tokens(tokenizer: Any, prompts: list[str], length: int) -> torch.Tensor:
    """int64 [P, length]: begin of text, the prompt, end of text. A longer prompt loses its end, but keeps the end of text,
    where its embedding is read; what follows that does not count."""
    encoded = tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
        split_special_tokens=True,
    )  # a prompt that spells out a special token cannot end itself
    return encoded["input_ids"]


def frozen_clip(
    config: CLIPConfig,
    weights: Mapping[str, torch.Tensor],
    *,
    matrix_dtype: torch.dtype = torch.float32,
    origin: str = "",
) -> CLIPModel:
    """A `CLIPModel` of `config` in evaluation mode, without gradients, with copies of `weights`, named as its own.

    matrix_dtype: what the weights of linear and convolution layers are kept in; embeddings and norms are float32 always,
        so that under autocast the residual stream is too.
    origin: added where tensors are named in errors.

    Raises ValueError for a missing tensor, one that is left over, and shapes that do not fit.
    """
    from transformers import CLIPModel

    # Without storage: initialising a ViT-H takes longer than reading it.
    with torch.device("meta"):
        model = CLIPModel(config)
    expected = model.state_dict()
    fitting = checked(weights, expected, origin)
    left_over = [name for name in weights if name not in expected]
    if left_over:
        raise ValueError(f"the tensors do not fit together: {some(left_over)} left over{origin}")
    matrices = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        for part in ("weight", "bias")
    }
    # Copied even where the dtype fits: a mapped file that somebody overwrites must not change the weights in use.
    model.load_state_dict(
        {
            name: tensor.to(matrix_dtype if name in matrices else torch.float32, copy=True).contiguous()
            for name, tensor in fitting.items()
        },
        assign=True,
    )
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        # Not in the state dict, so still without storage.
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return model.requires_grad_(False).eval()


def check_tokenizer(kind: str, folder: Path) -> None:
    """Raises FileNotFoundError, with the reward's `kind`, unless `folder` holds a CLIP tokenizer's files."""
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "is not there"
        raise FileNotFoundError(f"{kind}: the tokenizer {folder} {found}; {GET_TOKENIZER}")
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{kind}: the tokenizer {folder} has no {name}; {GET_TOKENIZER}")


def read_tokenizer(kind: str, folder: Path) -> CLIPTokenizer:
    """Raises ValueError, with the reward's `kind`, for damaged files."""
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever the libraries underneath raise for a damaged file
        raise ValueError(
            f"{kind}: the tokenizer {folder} cannot be read ({type(error).__name__}: {error}); {GET_TOKENIZER}"
        ) from error


def check_vocabulary(kind: str, tokenizer: Any, folder: Path | str, model: Any, checkpoint: Path | str) -> None:
    """Raises ValueError, with the reward's `kind`, unless the tokens of `tokenizer` are those that `model` knows."""
    vocabulary, end = model.config.text_config.vocab_size, model.config.text_config.eos_token_id
    # The text is read at the largest id (also what 2 stands for in transformers), so the end of text must be that one.
    if len(tokenizer) != vocabulary or tokenizer.eos_token_id != vocabulary - 1 or end not in (2, vocabulary - 1):
        raise ValueError(
            f"{kind}: the tokenizer {folder} has {len(tokenizer)} tokens and ends a text with "
            f"{tokenizer.eos_token_id}; {checkpoint} needs {vocabulary} and "
            f"{vocabulary - 1 if end == 2 else end}; {GET_TOKENIZER}"
        )


def _unit(embeddings: torch.Tensor) -> torch.Tensor:
    return functional.normalize(embeddings.to(torch.float32), dim=-1)
