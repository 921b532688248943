"""``fastvideo-grpo export``: a run's weights as diffusers loads them."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastvideo_grpo.errors import UserError

EPILOG = """\
examples:
  fastvideo-grpo export runs/flux --out exported --pipeline      # a folder for FluxPipeline.from_pretrained
  fastvideo-grpo export runs/flux --out exported --weights ema   # the transformer alone, EMA weights
  fastvideo-grpo export runs/lora --out exported                 # LoRA run: a file for load_lora_weights
  fastvideo-grpo export runs/lora --out exported --merge-lora    # ... or folded into full weights"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder (run.dir of the training)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not hold an export already")
    parser.add_argument("--iteration", type=int, metavar="N", help="checkpoint to export (default: the newest whole one)")
    parser.add_argument("--weights", choices=["model", "ema"], default="model", help="trained weights, or their EMA")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="dtype of the files (default: that of model.precision)")
    parser.add_argument("--merge-lora", action="store_true", help="fold the adapters of a LoRA run into full weights")
    parser.add_argument("--pipeline", action="store_true", help="copy VAE, text encoders, ... beside the transformer")
    parser.add_argument("--max-shard-size", default="10GB", metavar="SIZE", help="largest weight file (default: 10GB)")
    parser.epilog = EPILOG


def run(arguments: argparse.Namespace) -> int:
    """Write the export and say how to load it."""
    import torch

    from fastvideo_grpo.checkpoints import export
    from fastvideo_grpo.checkpoints.run_folder import open_run

    out = Path(arguments.out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; choose another folder")
    run = open_run(arguments.run, arguments.iteration)
    config, start = run.config, Path(run.config.model.path)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype or config.model.precision]
    weights = run.weights(arguments.weights)
    lora = config.model.lora
    if arguments.merge_lora and lora is None:
        raise UserError(f"--merge-lora: {arguments.run} trained full weights (model.lora is null); leave the flag out")
    out.mkdir(parents=True, exist_ok=True)
    if lora is not None and not arguments.merge_lora:
        if arguments.pipeline:
            raise UserError(
                "--pipeline needs full weights: add --merge-lora, or leave it out and load the adapters by themselves"
            )
        export.write_lora(weights, lora, out, dtype)
        how = f'FluxPipeline.from_pretrained("{start}").load_lora_weights("{out}")'
    else:
        if lora is not None:
            weights = export.merge_lora(export.read_transformer(start), weights, lora)
        export.write_transformer(weights, start, out / "transformer", dtype, arguments.max_shard_size)
        how = f'FluxTransformer2DModel.from_pretrained("{out}", subfolder="transformer")'
        if arguments.pipeline:
            export.copy_components(start, out)
            how = f'FluxPipeline.from_pretrained("{out}")'
    print(f"{arguments.weights} weights of iteration {run.iteration} in {out}; load them with\n  {how}")
    return 0
