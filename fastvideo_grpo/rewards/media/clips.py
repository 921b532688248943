"""Clips: read from video files, written and read back, and which of their frames a reward looks at."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

# Of VideoAlign and of Qwen2-VL's own preprocessing: frames go through the network in pairs.
PAIR = 2
MIN_FRAMES = 4
MAX_FRAMES = 768


class Clip(NamedTuple):
    """frames: uint8 [F, H, W, 3], RGB in 0..255. fps: frames per second."""

    frames: torch.Tensor
    fps: float


def frame_indices(count: int, source_fps: float, fps: float) -> list[int]:
    """Which of a clip's `count` frames are looked at when it is sampled at `fps`: evenly spaced, first and last included.

    There are count / source_fps * fps of them, at least 4 and at most 768, no more than the clip has, rounded to an even
    number (a half to the even number of pairs). This is how VideoAlign's released code samples a file.

    Raises ValueError for fewer than two frames, and for a rate that is not above 0.
    """
    if count < PAIR:
        raise ValueError(f"the clip has {count} frame(s); at least {PAIR} are needed")
    for name, rate in (("the clip's", source_fps), ("the sampling", fps)):
        if not 0 < rate < float("inf"):
            raise ValueError(f"{name} fps is {rate!r}; it must be a number above 0")
    most = min(MAX_FRAMES, count) // PAIR * PAIR
    chosen = min(max(count / source_fps * fps, MIN_FRAMES), most)
    return torch.linspace(0, count - 1, PAIR * round(chosen / PAIR)).round().long().tolist()


def read_clip(path: str | Path) -> Clip:
    """All frames of a video file, by decord where it is installed (x86-64 Linux), else by PyAV; they give the same.

    Raises FileNotFoundError when there is no such file, ValueError when it holds no video that can be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no video file {path}")
    read = _read_with_decord if importlib.util.find_spec("decord") else _read_with_av
    try:
        clip = read(path)
    except Exception as error:  # decord and FFmpeg have errors of their own for a damaged file
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a video ({type(error).__name__}: {error}); "
            "it is not complete, or another kind of file"
        ) from error
    if not len(clip.frames):
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is a video without frames; it is not complete")
    return clip


def _read_with_decord(path: Path) -> Clip:
    import decord

    reader = decord.VideoReader(str(path))
    return Clip(torch.from_numpy(reader.get_batch(range(len(reader))).asnumpy()), float(reader.get_avg_fps()))


def _read_with_av(path: Path) -> Clip:
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        rate = stream.average_rate
    if rate is None:
        raise ValueError("it does not say how many frames a second it has")
    return Clip(torch.stack(frames) if frames else torch.empty(0, 0, 0, 3, dtype=torch.uint8), float(rate))


def mp4_round_trip(frames: torch.Tensor, fps: float) -> Clip:
    """`frames` (uint8 [F, H, W, 3]) as they come back from an mp4 of `fps` frames per second.

    The file is written by diffusers' `export_to_video`, as DanceGRPO's released code does: H.264 at constant rate factor 25,
    colour at half the resolution, sides scaled up to multiples of 16. It lies in a temporary folder while it is needed.

    Raises ValueError when `fps` is not above 0.
    """
    from diffusers.utils import export_to_video
    from PIL import Image

    if not 0 < fps < float("inf"):
        raise ValueError(f"fps is {fps!r}; it must be a number above 0")
    with tempfile.TemporaryDirectory(prefix="fastvideo_grpo_") as folder:
        path = Path(folder) / "clip.mp4"
        export_to_video([Image.fromarray(frame) for frame in frames.cpu().numpy()], str(path), fps=fps)  # type: ignore[arg-type]
        return read_clip(path)
