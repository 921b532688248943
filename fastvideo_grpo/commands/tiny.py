"""`fastvideo-grpo tiny`: write a tiny checkpoint, random for tests or pretrained for the demos."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from fastvideo_grpo.commands.arguments import path_argument, seed_argument
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.tiny.offer import TinyOffer

REWARD_MODELS = {
    "clip": TinyOffer(
        "fastvideo_grpo.tiny.clip:write_clip",
        "tiny-clip",
        layouts={"open_clip": "as DFN5B-CLIP", "transformers": "as PickScore"},
    ),
    "videoalign": TinyOffer(
        "fastvideo_grpo.tiny.videoalign:write_videoalign",
        "tiny-videoalign",
        layouts={"full": "all weights in one file", "lora": "an adapter and the rest"},
    ),
}


def known() -> dict[str, TinyOffer]:
    """All that can be written: those of models, by ``model.kind``, and of reward models.

    Raises:
        UserError: a package offers a model that is called like a reward model.
    """
    models = {kind: family.tiny for kind, family in FAMILIES.usable().items() if family.tiny is not None}
    twice = sorted(models.keys() & REWARD_MODELS.keys())
    if twice:
        raise UserError(
            f"an installed package offers a model '{twice[0]}', which is the name of a reward model here; rename it"
        )
    return models | REWARD_MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = known()
    pretrained = "; ".join(f"{name} on {model.pretrained_on}" for name, model in models.items() if model.pretraining)
    layouts = [
        f"of {name}: {', or '.join(f'{layout} ({what})' for layout, what in model.layouts.items())}"
        for name, model in models.items()
        if model.layouts
    ]
    folders = ", ".join(f"runs/{model.folder}" for model in models.values())
    shapes = ", ".join(f"runs/{model.pretrained_folder}" for model in models.values() if model.pretrained_folder)
    parser.add_argument("model", choices=list(models), help="which model's checkpoint")
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="DIR",
        help=f"folder to write; default {folders}, with --pretrain {shapes}",
    )
    parser.add_argument("--seed", type=seed_argument, default=0, help="default 0; the same seed writes the same weights")
    parser.add_argument(
        "--pretrain",
        action="store_true",
        help=f"train it, 32x32 pixels, on one CPU core: {pretrained}. Without it the weights are random".replace("%", "%%"),
    )
    parser.add_argument(
        "--layout",
        choices=[layout for model in models.values() for layout in model.layouts],
        help=f"{'; '.join(layouts)}; the first is the default",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a tiny checkpoint that is already there")


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns the exit status."""
    import torch

    model = known()[args.model]
    name, writer = (model.pretrained_folder, model.pretraining) if args.pretrain else (model.folder, model.writer)
    if name is None or writer is None or (args.layout and args.layout not in model.layouts):
        option = "--pretrain" if name is None else f"--layout {args.layout}"
        print(f"fastvideo-grpo tiny: {option} is not for {args.model}; leave it out", file=sys.stderr)
        return 1
    settings: dict[str, Any] = {"seed": args.seed, "overwrite": args.overwrite}
    if model.layouts:
        settings[model.layout_argument] = args.layout or next(iter(model.layouts))
    if args.pretrain:
        settings["progress"] = partial(print, flush=True)
    folder = Path(args.out or Path("runs", name))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower with more, and the same seed has to give the same bytes
    try:
        resolve_name(writer)(folder, **settings)
    except FileExistsError as error:
        print(f"fastvideo-grpo tiny: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"wrote {folder} ({size / 1e6:.1f} MB)")
    return 0
