"""Human Preference Score v2.1: how well people would like the picture for the prompt, by a CLIP trained on their choices.

Wu et al., arXiv 2306.09341. A score is the cosine between picture and prompt, about 0.2 to 0.35 for real pictures; the
benchmark's numbers are 100 times that. Picture and prompt are prepared as the published code does it: the scores of one
group lie close together, so that a small difference in the preparation counts.
"""

from __future__ import annotations

import html
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.nn import functional

from fastvideo_grpo.rewards.base import MediaKind, Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.open_clip_weights import clip_model
from fastvideo_grpo.rewards.registry import register

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Precision = Literal["fp32", "bf16"]

# Of CLIP's training pictures, RGB in 0..1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_FILE = "HPS_v2.1_compressed.pt"
_GET_CHECKPOINT = (
    f"the weights are {_FILE} of xswu/HPSv2 on Hugging Face: "
    f"hf download xswu/HPSv2 {_FILE} --local-dir checkpoints"
)
_GET_TOKENIZER = (
    "set it to a folder with CLIP's vocab.json and merges.txt, such as the folder 'tokenizer' of a FLUX.1 or "
    "Stable Diffusion checkpoint (not 'tokenizer_2', which is T5's)"
)


@register("hps")
class HPS:
    """HPS-v2.1 of one picture: the cosine of its embedding and the prompt's, not multiplied by 100.

    checkpoint: HPS_v2.1_compressed.pt, a torch file whose `state_dict` is a whole open_clip ViT CLIP model (ViT-H-14).
    tokenizer: folder with CLIP's vocab.json and merges.txt.
    batch_size: pictures, or prompts, that go through the network together, at least 1.
    precision: "bf16" keeps and applies the matrices in bfloat16 and everything else in float32: half the memory (2 GB
        instead of 4 for ViT-H-14).

    Raises FileNotFoundError for a path that is not there, before anything is loaded; ValueError for files that are not
    what they should be, a tokenizer of another vocabulary than the weights', and parameters out of range.
    """

    outputs: tuple[str, ...] = ("hps",)
    media_kind: MediaKind = "image"

    def __init__(self, *, checkpoint: str, tokenizer: str, batch_size: int = 8, precision: Precision = "fp32") -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"hps: batch_size is {batch_size!r}; it must be a whole number, at least 1")
        if precision not in get_args(Precision):
            raise ValueError(f"hps: precision is {precision!r}; it must be one of {', '.join(get_args(Precision))}")
        _check_paths(Path(checkpoint), Path(tokenizer))
        self.batch_size = batch_size
        self.matrix_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.device = torch.device("cpu")
        self.tokenizer = _read_tokenizer(Path(tokenizer))
        self.model = _read_model(Path(checkpoint), self.matrix_dtype)
        self.image_size: int = self.model.config.vision_config.image_size
        self.text_length: int = self.model.config.text_config.max_position_embeddings
        _check_vocabulary(self.tokenizer, self.model.config.text_config.vocab_size, tokenizer, checkpoint)

    @torch.no_grad()
    def score(self, request: RewardRequest) -> RewardResult:
        """Raises ValueError when the media are videos."""
        frames = request.media.shape[1]
        if frames != 1:
            raise ValueError(f"hps scores pictures, but the samples have {frames} frames; use a reward for videos")
        # All samples of a group have one prompt.
        position = {prompt: index for index, prompt in enumerate(dict.fromkeys(request.prompts))}
        texts = self._texts(list(position))
        scores = torch.empty(len(request))
        for start in range(0, len(request), self.batch_size):
            batch = slice(start, start + self.batch_size)
            pictures = self._pictures(request.media[batch, 0])
            own = texts[[position[prompt] for prompt in request.prompts[batch]]]
            scores[batch] = (pictures * own).sum(dim=-1).cpu()
        return RewardResult({"hps": scores}, torch.ones(len(request), dtype=torch.bool))

    def _pictures(self, media: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, E], of length 1."""
        pixels = prepare_pictures(media.to(self.device), self.image_size)
        with self._precision():
            return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    def _texts(self, prompts: list[str]) -> torch.Tensor:
        """P strings -> float32 [P, E], of length 1."""
        embeddings = []
        for start in range(0, len(prompts), self.batch_size):
            ids = tokens(self.tokenizer, prompts[start : start + self.batch_size], self.text_length).to(self.device)
            with self._precision():
                embeddings.append(_unit(self.model.get_text_features(input_ids=ids).pooler_output))
        return torch.cat(embeddings) if embeddings else torch.empty(0)

    def _precision(self) -> torch.autocast:
        # Also turns off an autocast of the caller's when the precision is fp32.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.matrix_dtype is torch.bfloat16)

    def to(self, device: torch.device | str) -> Reward:
        self.device = torch.device(device)
        self.model.to(self.device)
        return self

    def close(self) -> None:
        self.model = None


def prepare_pictures(media: torch.Tensor, size: int) -> torch.Tensor:
    """Pictures as HPS sees them: the longer side brought to `size`, then black bars to a square, then normalised.

    media: uint8 [B, H, W, 3], RGB. Returns float32 [B, 3, size, size] on the same device.

    The published code resizes floating-point pictures by antialiased bicubic interpolation, so what overshoots 0..1 at
    sharp edges stays, unlike in PIL's.
    """
    pictures = media.permute(0, 3, 1, 2).contiguous().to(torch.float32) / 255
    height, width = pictures.shape[-2:]
    scale = size / max(height, width)
    resized = max(1, round(height * scale)), max(1, round(width * scale))
    if resized != (height, width):
        pictures = functional.interpolate(pictures, resized, mode="bicubic", align_corners=False, antialias=True)
    rows, columns = size - resized[0], size - resized[1]
    top, left = rows // 2, columns // 2
    pictures = functional.pad(pictures, (left, columns - left, top, rows - top))
    mean, std = (pictures.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pictures - mean) / std


def clean_prompt(prompt: str) -> str:
    """The prompt as open_clip reads it: wrongly decoded characters repaired, HTML entities resolved (twice), white space
    made single blanks, lower case."""
    import ftfy

    prompt = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(prompt.split()).lower()


def tokens(tokenizer: CLIPTokenizer, prompts: list[str], length: int) -> torch.Tensor:
    """int64 [P, length]: begin of text, the cleaned prompt, end of text. A longer prompt loses its end, but keeps the end
    of text, where its embedding is read; what follows that does not count."""
    encoded = tokenizer(
        [clean_prompt(prompt) for prompt in prompts],
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
        split_special_tokens=True,
    )  # a prompt that spells out a special token cannot end itself
    return encoded["input_ids"]


def _unit(embeddings: torch.Tensor) -> torch.Tensor:
    return functional.normalize(embeddings.to(torch.float32), dim=-1)


def _check_paths(checkpoint: Path, tokenizer: Path) -> None:
    if checkpoint.is_dir():
        inside = checkpoint / _FILE
        raise FileNotFoundError(
            f"hps: the checkpoint {checkpoint} is a folder; "
            + (f"set it to {inside}" if inside.is_file() else f"it must be a file; {_GET_CHECKPOINT}")
        )
    if not checkpoint.is_file():
        raise FileNotFoundError(f"hps: there is no checkpoint {checkpoint}; {_GET_CHECKPOINT}")
    if not tokenizer.is_dir():
        found = "is not a folder" if tokenizer.exists() else "is not there"
        raise FileNotFoundError(f"hps: the tokenizer {tokenizer} {found}; {_GET_TOKENIZER}")
    for name in ("vocab.json", "merges.txt"):
        if not (tokenizer / name).is_file():
            raise FileNotFoundError(f"hps: the tokenizer {tokenizer} has no {name}; {_GET_TOKENIZER}")


def _read_tokenizer(folder: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever the libraries underneath raise for a damaged file
        raise ValueError(
            f"hps: the tokenizer {folder} cannot be read ({type(error).__name__}: {error}); {_GET_TOKENIZER}"
        ) from error


def _read_model(path: Path, matrix_dtype: torch.dtype) -> Any:
    try:
        return clip_model(_read_state_dict(path), matrix_dtype=matrix_dtype)
    except ValueError as error:
        raise ValueError(f"hps: {path}: {error}; {_GET_CHECKPOINT}") from error


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    found = f"{path.stat().st_size} bytes"
    with path.open("rb") as file:
        start = file.read(64)
    if not zipfile.is_zipfile(path):
        if start.startswith(b"version https://git-lfs"):
            raise ValueError("expected a torch file, found a Git LFS pointer, which stands for the file until it is fetched")
        if start.startswith(b"PK"):
            # The list of contents is at the end.
            raise ValueError(f"expected a torch file, found the beginning of one ({found}): it is not complete")
        raise ValueError(f"expected a torch file, found {found} beginning with {start[:16]!r}")
    try:
        # Mapped: the processes of a machine then read it once, and only one copy of the weights is ever in memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, pickle and zip errors; its advice is to trust the file
        raise ValueError(
            f"expected a torch file of tensors, found {found} that torch.load refuses ({type(error).__name__})"
        ) from error
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if isinstance(content, dict) and "visual.conv1.weight" in content:
        raise ValueError(
            "expected the weights under the key 'state_dict', found them without it, as in the plain CLIP that "
            "HPS was trained from: its scores would be another reward's"
        )
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        keys = f"with the keys {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else ""
        raise ValueError(
            f"expected a dict with tensors under the key 'state_dict', found a {type(content).__name__} {keys}".rstrip()
        )
    return weights


def _check_vocabulary(tokenizer: CLIPTokenizer, vocabulary: int, folder: str, checkpoint: str) -> None:
    # The text is read at the largest id, so the end of text must be that one.
    if len(tokenizer) != vocabulary or tokenizer.eos_token_id != vocabulary - 1:
        raise ValueError(
            f"hps: the tokenizer {folder} has {len(tokenizer)} tokens and ends a text with "
            f"{tokenizer.eos_token_id}; {checkpoint} needs {vocabulary} and {vocabulary - 1}; {_GET_TOKENIZER}"
        )
