"""`fastvideo-grpo tiny`: write a tiny checkpoint, random for tests or pretrained for the demos."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

HELP = "write a tiny checkpoint in the published form: random (seconds) or pretrained on shapes (minutes)"

# Where a checkpoint goes, under runs/, without and with --pretrain.
_FOLDERS: dict[str, tuple[str, str | None]] = {
    "flux": ("tiny-flux", "tiny-flux-shapes"),
    "hunyuan_video": ("tiny-hunyuan", "tiny-hunyuan-shapes"),
    "skyreels_i2v": ("tiny-skyreels-i2v", None),
    "clip": ("tiny-clip", None),
    "videoalign": ("tiny-videoalign", None),
}
# Forms in which a model is published, the default first.
_LAYOUTS = {"clip": ("open_clip", "transformers"), "videoalign": ("full", "lora")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", choices=list(_FOLDERS), help="which model's checkpoint")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write; default runs/tiny-flux, runs/tiny-hunyuan (with -shapes behind it with --pretrain), "
        "runs/tiny-skyreels-i2v, runs/tiny-clip or runs/tiny-videoalign",
    )
    parser.add_argument("--seed", type=int, default=0, help="default 0; the same seed writes the same weights")
    parser.add_argument(
        "--pretrain",
        action="store_true",
        help="train it, 32x32 pixels: flux on pictures of coloured shapes (about 5 minutes on one CPU core), 40%% of the "
        "captions' colours wrong on purpose; hunyuan_video on 9-frame clips of moving ones (about 9 minutes), 40%% of the "
        "captions' directions wrong. Without it the weights are random",
    )
    parser.add_argument(
        "--layout",
        choices=[layout for layouts in _LAYOUTS.values() for layout in layouts],
        help="of clip: open_clip (as DFN5B-CLIP, the default) or transformers (as PickScore); of videoalign: full (all weights "
        "in one file, the default) or lora (an adapter and the rest)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a tiny checkpoint that is already there")


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns the exit status."""
    import torch

    name, layouts = _FOLDERS[args.model][args.pretrain], _LAYOUTS.get(args.model, (None,))
    if name is None or (args.layout and args.layout not in layouts):
        option = "--pretrain" if name is None else f"--layout {args.layout}"
        print(f"fastvideo-grpo tiny: {option} is not for {args.model}; leave it out", file=sys.stderr)
        return 1
    folder: Path = args.out or Path("runs", name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower with more, and the same seed has to give the same bytes
    try:
        _write(args.model, folder, args.layout or layouts[0], pretrain=args.pretrain, seed=args.seed, overwrite=args.overwrite)
    except FileExistsError as error:
        print(f"fastvideo-grpo tiny: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"wrote {folder} ({size / 1e6:.1f} MB)")
    return 0


def _write(model: str, folder: Path, layout: Any, *, pretrain: bool, seed: int, overwrite: bool) -> None:
    def progress(line: str) -> None:
        print(line, flush=True)

    if model == "flux" and pretrain:
        from fastvideo_grpo.tiny.pretrain import pretrain_flux

        pretrain_flux(folder, seed=seed, overwrite=overwrite, progress=progress)
    elif model == "flux":
        from fastvideo_grpo.tiny.flux import write_flux

        write_flux(folder, seed=seed, overwrite=overwrite)
    elif model == "skyreels_i2v":
        from fastvideo_grpo.tiny.skyreels_i2v import write_skyreels_i2v

        write_skyreels_i2v(folder, seed=seed, overwrite=overwrite)
    elif model == "clip":
        from fastvideo_grpo.tiny.clip import write_clip

        write_clip(folder, layout=layout, seed=seed, overwrite=overwrite)
    elif model == "videoalign":
        from fastvideo_grpo.tiny.videoalign import write_videoalign

        write_videoalign(folder, layout=layout, seed=seed, overwrite=overwrite)
    elif pretrain:
        from fastvideo_grpo.tiny.pretrain_video import pretrain_hunyuan_video

        pretrain_hunyuan_video(folder, seed=seed, overwrite=overwrite, progress=progress)
    else:
        from fastvideo_grpo.tiny.hunyuan_video import write_hunyuan_video

        write_hunyuan_video(folder, seed=seed, overwrite=overwrite)
