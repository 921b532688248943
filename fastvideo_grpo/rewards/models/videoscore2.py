"""VideoScore2 through FastVideo's own metric: a Qwen2.5-VL that writes an assessment of a clip and ends it with marks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from fastvideo_grpo.rewards.base import MediaKind, Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.models import sources
from fastvideo_grpo.rewards.registry import register

_GET_CHECKPOINT = f"the weights are TIGER-Lab/VideoScore2 on Hugging Face: {sources.VIDEOSCORE2.advice()}"


@register("videoscore2")
class VideoScore2:
    """VideoScore2's visual quality, text alignment and physical consistency, each about 1 to 5.

    checkpoint: folder of TIGER-Lab/VideoScore2.
    fps: frames a second that are looked at; FastVideo's metric takes 64 at most.
    max_tokens: length of the assessment, at least 1. One that has not come to its marks by then has no score.

    A score is FastVideo's: the likeliest of the marks 1 to 5 times its share of their probability. Decoding is greedy, one
    clip at a time: hundreds of tokens for each, so this is a reward to evaluate with, or for small runs. A clip whose marks
    cannot be found in the assessment is invalid.

    Needs the package qwen-vl-utils, which FastVideo imports. The published weights have not been run by this project: that
    they write marks where FastVideo looks for them is FastVideo's word. Tests have the metric run a tiny random model, and
    one that writes marks put in its place.

    Raises FileNotFoundError for a folder that is not there, ImportError for a missing package, before anything is loaded;
    ValueError for a folder with a program of its own, which would be executed, and parameters out of range.
    """

    source = sources.VIDEOSCORE2
    outputs: tuple[str, ...] = ("visual_quality", "text_alignment", "physical_consistency")
    media_kind: MediaKind = "video"

    def __init__(self, *, checkpoint: str, fps: float = 2.0, max_tokens: int = 1024) -> None:
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf"):
            raise ValueError(f"videoscore2: fps is {fps!r}; it must be a number above 0")
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"videoscore2: max_tokens is {max_tokens!r}; it must be a whole number, at least 1")
        _check_folder(Path(checkpoint))
        if importlib.util.find_spec("qwen_vl_utils") is None:
            raise ImportError("videoscore2: FastVideo's metric needs qwen-vl-utils: pip install --no-deps qwen-vl-utils")
        from fastvideo.eval import get_metric

        self.metric: Any = get_metric("videoscore2", model_name=checkpoint, infer_fps=float(fps), max_tokens=max_tokens)
        self.metric.setup()

    @torch.no_grad()
    def score(self, request: RewardRequest) -> RewardResult:
        """Raises ValueError when the media are pictures, or how many frames a second they have is not said."""
        frames = request.media.shape[1]
        if frames < 2:
            raise ValueError("videoscore2 scores clips, but the samples have one frame; use a reward for images")
        if request.fps is None:
            raise ValueError("videoscore2 samples frames by time, but the request does not say the clips' fps")
        scores = torch.full((len(request), len(self.outputs)), float("nan"))
        for index, (prompt, clip) in enumerate(zip(request.prompts, request.media, strict=True)):
            video = clip.permute(0, 3, 1, 2).float() / 255
            details = self.metric.compute({"video": video, "text_prompt": prompt, "fps": request.fps}).details
            # Not the metric's own total, which is 0 for an assessment without marks.
            marks = [details[output] for output in self.outputs]
            if None not in marks:
                scores[index] = torch.tensor(marks)
        return RewardResult(
            {output: scores[:, column] for column, output in enumerate(self.outputs)},
            ~scores.isnan().any(dim=1),
            invalid_because="the assessment has no marks",
        )

    def to(self, device: torch.device | str) -> Reward:
        self.metric.to(device)
        return self

    def close(self) -> None:
        self.metric = None


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "is not there"
        raise FileNotFoundError(f"videoscore2: the checkpoint {folder} {found}; {_GET_CHECKPOINT}")
    config = folder / "config.json"
    if not config.is_file() or not any(folder.glob("*.safetensors")):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(
            f"videoscore2: {folder}: expected config.json and safetensors files, found {there}; {_GET_CHECKPOINT}"
        )
    try:
        content = json.loads(config.read_bytes())
        kind, program = content.get("model_type"), content.get("auto_map")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"videoscore2: {config} cannot be read ({type(error).__name__}: {error}); {_GET_CHECKPOINT}"
        ) from error
    # FastVideo loads with trust_remote_code: a program in the folder would be executed.
    if kind != "qwen2_5_vl" or program or any(folder.glob("*.py")):
        raise ValueError(
            f"videoscore2: {folder}: expected the model_type 'qwen2_5_vl' and no program of its own, found {kind!r}"
            f"{' and a program' if program or any(folder.glob('*.py')) else ''}; {_GET_CHECKPOINT}"
        )
