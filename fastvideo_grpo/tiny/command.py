"""`fastvideo-grpo tiny`: write a tiny checkpoint, random for tests or pretrained for the demo."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "write a tiny checkpoint in the published form: random (seconds) or pretrained on shapes (minutes)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", choices=["flux"], help="which model's checkpoint")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="folder to write; default runs/tiny-flux, or runs/tiny-flux-shapes with --pretrain")
    parser.add_argument("--seed", type=int, default=0, help="default 0; the same seed writes the same weights")
    parser.add_argument("--pretrain", action="store_true",
                        help="train it on pictures of coloured shapes (about 5 minutes on one CPU core), 40%% of the "
                             "captions' colours wrong on purpose; 32x32 pixels. Without it the weights are random")
    parser.add_argument("--overwrite", action="store_true", help="replace a tiny checkpoint that is already there")


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns the exit status."""
    import torch

    from fastvideo_grpo.tiny import flux

    folder: Path = args.out or Path("runs", "tiny-flux-shapes" if args.pretrain else "tiny-flux")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower with more, and the same seed has to give the same bytes
    try:
        if args.pretrain:
            from fastvideo_grpo.tiny.pretrain import pretrain_flux

            pretrain_flux(folder, seed=args.seed, overwrite=args.overwrite,
                          progress=lambda line: print(line, flush=True))
        else:
            flux.write_flux(folder, seed=args.seed, overwrite=args.overwrite)
    except FileExistsError as error:
        print(f"fastvideo-grpo tiny: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"wrote {folder} ({size / 1e6:.1f} MB)")
    return 0
