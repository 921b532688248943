"""`fastvideo-grpo tiny`: write a tiny checkpoint, random for tests or pretrained for the demos."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from fastvideo_grpo.command_arguments import path_argument, seed_argument

HELP = "write a tiny checkpoint in the published form: random (seconds) or pretrained on shapes (minutes)"


class _Model(NamedTuple):
    """How a model's checkpoints are written. A writer is "module:function", imported when it is run."""

    folder: str  # where a random one goes, under runs/
    writer: str
    pretrained_folder: str | None = None
    pretraining: str | None = None
    layouts: tuple[str, ...] = ()  # forms in which the model is published, the default first
    layout_argument: str = "layout"  # of the writer


_MODELS = {
    "flux": _Model("tiny-flux", "flux:write_flux", "tiny-flux-shapes", "pretrain:pretrain_flux"),
    "hunyuan_video": _Model(
        "tiny-hunyuan",
        "hunyuan_video:write_hunyuan_video",
        "tiny-hunyuan-shapes",
        "pretrain_video:pretrain_hunyuan_video",
    ),
    "skyreels_i2v": _Model("tiny-skyreels-i2v", "skyreels_i2v:write_skyreels_i2v"),
    "wan": _Model("tiny-wan", "wan:write_wan"),
    "stable_diffusion": _Model(
        "tiny-sd",
        "stable_diffusion:write_stable_diffusion",
        "tiny-sd-shapes",
        "pretrain_stable_diffusion:pretrain_stable_diffusion",
        layouts=("epsilon", "v_prediction"),
        layout_argument="prediction_type",
    ),
    "clip": _Model("tiny-clip", "clip:write_clip", layouts=("open_clip", "transformers")),
    "videoalign": _Model("tiny-videoalign", "videoalign:write_videoalign", layouts=("full", "lora")),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", choices=list(_MODELS), help="which model's checkpoint")
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="folder to write; default runs/tiny-flux, runs/tiny-hunyuan, runs/tiny-sd (with -shapes behind it with "
        "--pretrain), runs/tiny-skyreels-i2v, runs/tiny-wan, runs/tiny-clip or runs/tiny-videoalign",
    )
    parser.add_argument("--seed", type=seed_argument, default=0, help="default 0; the same seed writes the same weights")
    parser.add_argument(
        "--pretrain",
        action="store_true",
        help="train it, 32x32 pixels: flux (about 5 minutes on one CPU core) and stable_diffusion (about 7) on pictures of "
        "coloured shapes, 40%% and 55%% of the captions' colours wrong on purpose; hunyuan_video on 9-frame clips of moving "
        "ones (about 9 minutes), 40%% of the captions' directions wrong. Without it the weights are random",
    )
    parser.add_argument(
        "--layout",
        choices=[layout for model in _MODELS.values() for layout in model.layouts],
        help="of stable_diffusion: what the network predicts, epsilon (as version 1, the default) or v_prediction (as version "
        "2); of clip: open_clip (as DFN5B-CLIP, the default) or transformers (as PickScore); of videoalign: full (all weights "
        "in one file, the default) or lora (an adapter and the rest)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a tiny checkpoint that is already there")


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns the exit status."""
    import torch

    model = _MODELS[args.model]
    name, writer = (model.pretrained_folder, model.pretraining) if args.pretrain else (model.folder, model.writer)
    if name is None or writer is None or (args.layout and args.layout not in model.layouts):
        option = "--pretrain" if name is None else f"--layout {args.layout}"
        print(f"fastvideo-grpo tiny: {option} is not for {args.model}; leave it out", file=sys.stderr)
        return 1
    settings: dict[str, Any] = {"seed": args.seed, "overwrite": args.overwrite}
    if model.layouts:
        settings[model.layout_argument] = args.layout or model.layouts[0]
    if args.pretrain:
        settings["progress"] = partial(print, flush=True)
    folder = Path(args.out or Path("runs", name))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower with more, and the same seed has to give the same bytes
    try:
        module, function = writer.split(":")
        getattr(import_module(f"fastvideo_grpo.tiny.{module}"), function)(folder, **settings)
    except FileExistsError as error:
        print(f"fastvideo-grpo tiny: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"wrote {folder} ({size / 1e6:.1f} MB)")
    return 0

