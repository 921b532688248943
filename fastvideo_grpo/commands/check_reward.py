"""``fastvideo-grpo check-reward``: can these rewards be trusted with a run?"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo_grpo.commands.arguments import path_argument, text_argument
from fastvideo_grpo.errors import UserError, one_line
from fastvideo_grpo.models import run_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastvideo_grpo.rewards.base import Reward

EPILOG = """\
examples:
  fastvideo-grpo check-reward train_scripts/configs/flux_t2i_released.yaml
  fastvideo-grpo check-reward my_run.yaml --media cat.png --prompt "a cat" --media clip.mp4 --prompt "a dog runs"
  fastvideo-grpo check-reward my_run.yaml --device cuda

Each reward of the configuration scores the given media (or drawn shapes, whose prompts say what they are), then the same
blurred, noisy, with the prompt of another, and, of clips, standing still and with its frames in another order. For every
output there is a line a variant: the mean score, and in how many samples the untouched one is above it. A reward that does
not see a degradation may still be right for the task (jpeg_size likes blur; a picture reward looks at no motion): read the
lines, nothing is decided here. Then: samples a second, memory, and how far scores move when the same batch is asked again,
one by one, and in another order. The exit code is 1 where a reward failed, gave no score, or is not repeatable."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=path_argument, metavar="CONFIG", help="a YAML file with the section rewards")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides of single keys")
    parser.add_argument(
        "--media", action="append", type=path_argument, default=[], metavar="FILE", help="a picture or clip; may be repeated"
    )
    parser.add_argument(
        "--prompt", action="append", type=text_argument, default=[], metavar="TEXT", help="its prompt, in the same order"
    )
    parser.add_argument("--device", default="cpu", help="where inline rewards score (default: cpu)")
    parser.epilog = EPILOG


@dataclass
class Media:
    """Samples of one size. media: uint8 [B, F, H, W, 3]; fps: None for pictures."""

    prompts: list[str]
    media: Tensor
    fps: float | None


@dataclass
class Check:
    """What was found about one reward. tables: output -> (variant, mean score, share of samples below the untouched)."""

    name: str
    tables: dict[str, list[tuple[str, float, float | None]]] = field(default_factory=dict)
    samples_per_second: float = 0.0
    host_bytes: int | None = None  # None: it runs elsewhere
    device_bytes: int = 0
    again: float = 0.0
    alone: float = 0.0
    shuffled: float = 0.0
    problems: list[str] = field(default_factory=list)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0: every reward gives the same finite scores each time; 1 otherwise."""
    import torch

    from fastvideo_grpo.rewards.placement.entries import check_device, check_placement, get, place

    config = run_config.load(arguments.config, arguments.overrides).rewards
    if not config.models:
        raise UserError(f"{arguments.config} names no reward (rewards.models is empty)")
    given = read_media(arguments.media, arguments.prompt)
    try:
        check_device("--device", arguments.device)
    except ValueError as error:
        raise UserError(str(error)) from error
    device = torch.device(arguments.device)
    bad = False
    for name, entry in config.models.items():
        try:
            check_placement(name, entry)
            _forget_peak()
            before = _memory("VmRSS")
            reward = place(name, entry, device=device, offload_idle=False, timeout_s=config.timeout_s)
        except ValueError as error:
            raise UserError(str(error)) from error
        try:
            check = check_reward(name, reward, given or built_in(reward.media_kind), device)
        finally:
            _close(name, reward)
        if get(entry, "placement") in (None, "inline"):
            check.host_bytes = max(0, _memory("VmHWM") - before)
        print("\n".join(describe(check)))
        bad |= bool(check.problems)
    return int(bad)


def check_reward(name: str, reward: Reward, samples: list[Media], device: torch.device) -> Check:
    """Score `samples` and their degradations, and the same batches in other make-ups."""
    import torch

    check = Check(name)
    seconds, count = 0.0, 0
    pairs: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}  # (output, variant) -> scores untouched, scores of it
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for batch in samples:
        first = _score(reward, batch, check)
        started = time.perf_counter()
        second = _score(reward, batch, check)
        seconds, count = seconds + time.perf_counter() - started, count + len(batch.prompts)
        if first is None or second is None:
            return check
        order = list(range(len(batch.prompts)))[::-1]
        turned = _score(reward, Media([batch.prompts[i] for i in order], batch.media[order], batch.fps), check)
        singles = [_score(reward, Media([p], batch.media[i : i + 1], batch.fps), check) for i, p in enumerate(batch.prompts)]
        for output, scores in first.items():
            check.again = max(check.again, _distance(scores, second[output]))
            if turned is not None:
                check.shuffled = max(check.shuffled, _distance(scores, turned[output][order]))
            if all(single is not None for single in singles):
                alone = torch.cat([single[output] for single in singles if single is not None])
                check.alone = max(check.alone, _distance(scores, alone))
            pairs.setdefault((output, "untouched"), []).append((scores, scores))
        for variant, changed in degradations(batch).items():
            found = _score(reward, changed, check)
            for output, scores in (found or {}).items():
                pairs.setdefault((output, variant), []).append((first[output], scores))
    check.samples_per_second = count / seconds
    if device.type == "cuda":
        check.device_bytes = torch.cuda.max_memory_allocated(device)
    for (output, variant), batches in pairs.items():
        untouched, scores = (torch.cat(part) for part in zip(*batches, strict=True))
        share = None if variant == "untouched" else (untouched > scores).float().mean().item()
        check.tables.setdefault(output, []).append((variant, scores.mean().item(), share))
    if check.again > 0:
        check.problems.append(f"not repeatable: the same batch moved a score by {check.again:.3g}")
    return check


def _score(reward: Reward, batch: Media, check: Check) -> dict[str, Tensor] | None:
    import torch

    from fastvideo_grpo.rewards import answers
    from fastvideo_grpo.rewards.base import RewardRequest

    try:
        with torch.no_grad():
            result = reward.score(RewardRequest(batch.prompts, batch.media, fps=batch.fps))
        valid, because = answers.judged(result, len(batch.prompts)), answers.reason(result)
        scores = {output: answers.column(result, output, len(batch.prompts)) for output in reward.outputs}
    except Exception as error:  # a reward may raise anything; it is told, and the exit code says so
        check.problems.append(f"failed: {one_line(error)}")
        return None
    missing = int((~valid).sum()) + sum(int((~values.isfinite()).sum()) for values in scores.values())
    if missing:
        check.problems.append(f"gave no score for {missing} of {len(batch.prompts)} samples ({because})")
        return None
    return scores


def _close(name: str, reward: Reward) -> None:
    try:
        reward.close()
    except Exception as error:
        print(f"reward {name}: close(): {one_line(error)}", file=sys.stderr)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def degradations(batch: Media) -> dict[str, Media]:
    """Variant -> the same samples, made worse in a way that people see."""
    import torch
    from torch.nn import functional

    media, variants = batch.media, {}
    frames = media.flatten(0, 1).permute(0, 3, 1, 2).float()
    small = [max(1, side // 8) for side in frames.shape[-2:]]
    blurred = functional.interpolate(functional.interpolate(frames, small, mode="area"), frames.shape[-2:], mode="bilinear")
    noisy = frames + 60 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    for name, changed in (("blurred", blurred), ("noisy", noisy)):
        changed = changed.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).reshape(media.shape)
        variants[name] = Media(batch.prompts, changed, batch.fps)
    others = batch.prompts[1:] + batch.prompts[:1]
    if others != batch.prompts:
        variants["with another's prompt"] = Media(others, media, batch.fps)
    if media.shape[1] > 1:
        variants["standing still"] = Media(batch.prompts, media[:, :1].expand_as(media).contiguous(), batch.fps)
        order = torch.randperm(media.shape[1], generator=torch.Generator().manual_seed(0))
        variants["frames shuffled"] = Media(batch.prompts, media[:, order], batch.fps)
    return variants


def read_media(files: list[str], prompts: list[str]) -> list[Media]:
    """Each file as a batch of one, those of one size together.

    Raises:
        UserError: another number of prompts, or a file that is neither a picture nor a clip.
    """
    import torch

    if len(files) != len(prompts):
        raise UserError(f"there are {len(files)} --media and {len(prompts)} --prompt; give each file its prompt, in order")
    read = [(prompt, *_read(Path(file))) for file, prompt in zip(files, prompts, strict=True)]
    groups: dict[Any, list[tuple[str, Tensor]]] = {}
    for prompt, media, fps in read:
        groups.setdefault((media.shape, fps), []).append((prompt, media))
    return [
        Media([prompt for prompt, _ in group], torch.stack([media for _, media in group]), fps)
        for (_, fps), group in groups.items()
    ]


def _read(file: Path) -> tuple[Tensor, float | None]:
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    from fastvideo_grpo.rewards.media.clips import read_clip

    if not file.is_file():
        raise UserError(f"--media {file} is no file")
    try:
        with Image.open(file) as picture:
            return torch.from_numpy(np.asarray(picture.convert("RGB")).copy())[None], None
    except UnidentifiedImageError:
        pass
    try:
        clip = read_clip(file)
        return clip.frames, clip.fps
    except ValueError as error:
        raise UserError(f"--media {file}: {error}") from error


def built_in(media_kind: str) -> list[Media]:
    """Drawn shapes whose prompts say what they are: moving ones for rewards of videos, else pictures."""
    import torch

    from fastvideo_grpo.tiny import moving_shapes, shapes

    if media_kind == "video":
        clips, captions = moving_shapes.dataset(8, seed=0)
        return [Media([moving_shapes.PROMPTS[i] for i in captions], torch.from_numpy(clips), 8.0)]
    pictures, captions = shapes.dataset(8, seed=0)
    return [Media([shapes.PROMPTS[i] for i in captions], torch.from_numpy(pictures)[:, None], None)]


def _memory(name: str) -> int:
    """Bytes of host memory of this process: now (VmRSS), or at most since `_forget_peak` (VmHWM)."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(name))


def _forget_peak() -> None:
    """Linux keeps the peak of the whole life of a process, unless told to begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def describe(check: Check) -> list[str]:
    """Lines for a person."""
    from fastvideo_grpo.printed_sizes import gib

    lines = [f"reward {check.name}"]
    for output, table in check.tables.items():
        lines.append(f"  {output:<24} mean score   untouched is above it in")
        for variant, mean, share in table:
            lines.append(f"    {variant:<22} {mean:>10.4g}   " + ("" if share is None else f"{share:.0%} of the samples"))
    if check.tables:
        on_host = "its memory is another process's" if check.host_bytes is None else f"{gib(check.host_bytes)} of host memory"
        on_device = f", {gib(check.device_bytes)} on the device" if check.device_bytes else ""
        lines += [
            f"  {check.samples_per_second:.3g} samples a second; {on_host}{on_device}",
            f"  the same batch again moves scores by {check.again:.2g}, one by one by {check.alone:.2g}, in another order by "
            f"{check.shuffled:.2g}",
        ]
    lines += [f"  {problem}" for problem in dict.fromkeys(check.problems)]
    return lines
