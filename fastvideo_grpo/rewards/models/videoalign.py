"""VideoAlign: visual quality, motion quality and text alignment of a clip, by a Qwen2-VL trained on people's choices.

Liu et al., arXiv 2501.13918; the weights are called VideoReward. Clips and prompts are prepared as the released code does
it, on the CPU: the scores of one group lie close together, so that a small difference in the preparation counts.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvideo_grpo.rewards.base import MediaKind, Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.media.clips import frame_indices, mp4_round_trip, rate_of
from fastvideo_grpo.rewards.models import sources
from fastvideo_grpo.rewards.models import videoalign_weights as weights
from fastvideo_grpo.rewards.models.network_parameters import Precision, check_batch_size, weight_dtype
from fastvideo_grpo.rewards.models.videoalign_template import FIELD, TOKENS, read_template
from fastvideo_grpo.rewards.registry import register

if TYPE_CHECKING:
    from transformers import Qwen2VLConfig, Qwen2VLProcessor

OUTPUTS = ("VQ", "MQ", "TA")

# The smallest number of pixels a frame is brought to; the largest stands in model_config.json. Sides are multiples of 28.
MIN_PIXELS = 128 * 28 * 28

_GET_BASE = f"set params.base to the folder of the Qwen2-VL that VideoAlign was trained from: {sources.QWEN2_VL_2B.advice()}"
_BASE_FILES = ("config.json", "tokenizer_config.json", "preprocessor_config.json")


@register("videoalign")
class VideoAlign:
    """VideoAlign's three scores: VQ (visual quality), MQ (motion quality) and TA (text alignment); about -5 to 5.

    checkpoint: the VideoReward folder, with model_config.json and checkpoint-N folders in one of the two published
        layouts (all weights, or a LoRA adapter and the rest).
    template: VideoAlign's prompt template: a copy of VideoAlign, its prompt_template.py, or a text file that holds the
        template. Its name stands in model_config.json.
    base: folder of the Qwen2-VL that was trained, for its configuration, tokenizer and picture preparation, and for weights
        that the checkpoint leaves out. Left out, the name in model_config.json has to be such a folder: as it is, or seen
        from the folder that `checkpoint` lies in.
    step: N of the checkpoint-N to load; the largest when left out.
    fps: frames a second that are looked at; model_config.json's when left out, which is 2. See `clips.frame_indices`.
    normalize: (logit - mean) / std with the numbers of model_config.json, or the logit.
    batch_size: clips that go through the network together, at least 1. The released code takes one at a time.
    precision: "bf16" as the released code, 4.4 GB of weights, or "fp32". The head is float32 in both, so that scores are
        not rounded to multiples of 1/64 as the released code's are. LoRA is folded into the weights.
    mp4: score each clip as it comes back from an mp4 file, as the released DanceGRPO code does.

    A prompt that spells out one of the model's tokens cannot be judged: its sample is invalid.

    Raises FileNotFoundError for a path that is not there, before anything is loaded; ValueError for files that are not what
    they should be, and parameters out of range.
    """

    source = sources.VIDEO_REWARD
    outputs: tuple[str, ...] = OUTPUTS
    paths: tuple[str, ...] = ("template", "base")
    media_kind: MediaKind = "video"

    def __init__(
        self,
        *,
        checkpoint: str,
        template: str,
        base: str | None = None,
        step: int | None = None,
        fps: float | None = None,
        normalize: bool = True,
        batch_size: int = 1,
        precision: Precision = "bf16",
        mp4: bool = False,
    ) -> None:
        dtype = _check_parameters(step, fps, normalize, batch_size, precision, mp4)
        folder = Path(checkpoint)
        config = weights.read_config(folder)
        data = config["data_config"]
        if data.get("sample_type", "uniform") != "uniform" or (fps is None and data.get("num_frames") is not None):
            raise ValueError(
                f"videoalign: {folder / weights.CONFIG} samples frames as data_config.sample_type={data.get('sample_type')!r}, "
                f"num_frames={data.get('num_frames')!r}; this reward samples evenly ('uniform') at params.fps"
            )
        step_folder = weights.step_folder(folder, step)
        base_folder = _base_folder(folder, config["model_config"]["model_name_or_path"], base)
        self.template = read_template(Path(template), data.get("prompt_template_type", "detailed_special"))
        self.fps = float(data["fps"] if fps is None else fps)
        self.max_pixels = int(data["max_frame_pixels"])
        self.normalize = normalize
        self.batch_size = batch_size
        self.mp4 = mp4
        self.device = torch.device("cpu")
        norms = config["inference_config"]
        self.mean = torch.tensor([norms[f"{output}_mean"] for output in OUTPUTS])
        self.std = torch.tensor([norms[f"{output}_std"] for output in OUTPUTS])

        backbone = _read_backbone_config(base_folder)
        self.processor = _read_processor(base_folder)
        # Spelled out in a prompt, these would be read as what they stand for.
        self.reserved = list(self.processor.tokenizer.get_added_vocab())
        self.model: Any = weights.load(
            step_folder,
            config,
            backbone,
            base_folder,
            self.processor.tokenizer.convert_tokens_to_ids(list(TOKENS)),
            dtype,
        )

    @torch.no_grad()
    def score(self, request: RewardRequest) -> RewardResult:
        """Raises ValueError when the media are pictures, or how many frames a second they have is not said."""
        fps = rate_of(request, "videoalign")
        readable = [not any(token in prompt for token in self.reserved) for prompt in request.prompts]
        scores = torch.full((len(request), len(OUTPUTS)), float("nan"))
        places = [index for index, good in enumerate(readable) if good]
        for start in range(0, len(places), self.batch_size):
            chosen = places[start : start + self.batch_size]
            prompts = [request.prompts[index] for index in chosen]
            scores[chosen] = self.logits(prompts, [request.media[index] for index in chosen], fps)
        if self.normalize:
            scores = (scores - self.mean) / self.std
        return RewardResult(
            {output: scores[:, column] for column, output in enumerate(OUTPUTS)},
            torch.tensor(readable, dtype=torch.bool),
            invalid_because="the prompt spells out a token of the model",
        )

    def logits(self, prompts: list[str], clips: list[torch.Tensor], fps: float) -> torch.Tensor:
        """B prompts and B clips, uint8 [F, H, W, 3], of `fps` frames a second -> float32 [B, 3] on the CPU."""
        inputs = self.inputs(prompts, [self.frames(clip, fps) for clip in clips]).to(self.device)
        # Also turns off an autocast of the caller's, which would change what is computed in which precision.
        with torch.autocast(self.device.type, enabled=False):
            return self.model(
                inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values_videos"], inputs["video_grid_thw"]
            ).cpu()

    def frames(self, clip: torch.Tensor, fps: float) -> torch.Tensor:
        """The frames that are looked at, resized: uint8 [F, H, W, 3] -> uint8 [N, 3, h, w] on the CPU.

        The sides become multiples of 28, with no fewer pixels than `MIN_PIXELS` and no more than model_config.json says, by
        antialiased bicubic interpolation in floating point, rounded.
        """
        from torchvision.transforms import InterpolationMode, functional
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

        if self.mp4:
            clip, fps = mp4_round_trip(clip, fps)
        chosen = clip[frame_indices(len(clip), fps, self.fps)].cpu().permute(0, 3, 1, 2)
        height, width = chosen.shape[-2:]
        size = smart_resize(height, width, min_pixels=MIN_PIXELS, max_pixels=self.max_pixels)
        # Not the processor's resizing, nor torchvision's second version: those round in between where the CPU can.
        return functional.resize(chosen, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)

    def inputs(self, prompts: list[str], videos: list[torch.Tensor]) -> Any:
        """What the model is asked: B prompts and the frames of B clips -> the processor's tensors, padded on the right."""
        texts = []
        for prompt in prompts:
            text = self.template.format(**{FIELD: prompt})
            chat: Any = [{"role": "user", "content": [{"type": "video", "video": ""}, {"type": "text", "text": text}]}]
            texts.append(self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        return self.processor(
            text=texts,
            videos=videos,
            padding=True,
            return_tensors="pt",
            videos_kwargs={"do_resize": False, "do_sample_frames": False},
        )

    def to(self, device: torch.device | str) -> Reward:
        self.device = torch.device(device)
        self.model.to(self.device)
        return self

    def close(self) -> None:
        self.model = None


def _check_parameters(step: Any, fps: Any, normalize: Any, batch_size: Any, precision: Any, mp4: Any) -> torch.dtype:
    """The dtype of `precision`. Raises ValueError for a parameter out of range."""
    if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
        raise ValueError(f"videoalign: step is {step!r}; it must be the number N of a checkpoint-N folder")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf):
        raise ValueError(f"videoalign: fps is {fps!r}; it must be a number above 0")
    check_batch_size("videoalign", batch_size)
    dtype = weight_dtype("videoalign", precision)
    for name, value in (("normalize", normalize), ("mp4", mp4)):
        if not isinstance(value, bool):
            raise ValueError(f"videoalign: {name} is {value!r}; it must be true or false")
    return dtype


def _base_folder(checkpoint: Path, name: str, base: str | None) -> Path:
    """The folder of the Qwen2-VL, with the files that are always needed."""
    candidates = [Path(base)] if base is not None else [checkpoint.parent / name, Path(name)]
    for folder in candidates:
        if folder.is_dir():
            missing = [file for file in _BASE_FILES if not (folder / file).is_file()]
            if missing:
                raise FileNotFoundError(f"videoalign: the Qwen2-VL folder {folder} has no {', '.join(missing)}; {_GET_BASE}")
            return folder
    named = "params.base" if base is not None else f"{checkpoint / weights.CONFIG} says '{name}', which"
    looked = " nor ".join(map(str, dict.fromkeys(candidates)))
    raise FileNotFoundError(f"videoalign: {named} is not a folder: there is no {looked}; {_GET_BASE}")


def _read_backbone_config(folder: Path) -> Qwen2VLConfig:
    from transformers import Qwen2VLConfig

    try:
        kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
        if kind == Qwen2VLConfig.model_type:
            return Qwen2VLConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever transformers raises for a damaged file
        raise ValueError(
            f"videoalign: {folder / 'config.json'} cannot be read ({type(error).__name__}: {error}); {_GET_BASE}"
        ) from error
    raise ValueError(
        f"videoalign: {folder / 'config.json'}: expected the model_type '{Qwen2VLConfig.model_type}', found {kind!r}; "
        f"{_GET_BASE}"
    )


def _read_processor(folder: Path) -> Qwen2VLProcessor:
    """The folder's processor, padding on the right, with the reward tokens added behind the vocabulary."""
    from transformers import Qwen2VLProcessor

    try:
        processor = Qwen2VLProcessor.from_pretrained(str(folder), padding_side="right", local_files_only=True)
    except Exception as error:  # whatever the libraries underneath raise for a damaged file
        raise ValueError(
            f"videoalign: tokenizer and picture preparation of {folder} cannot be read ({type(error).__name__}: {error}); "
            f"{_GET_BASE}"
        ) from error
    processor.tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    return processor
