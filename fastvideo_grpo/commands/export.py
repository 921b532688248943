"""``fastvideo-grpo export``: a run's weights as diffusers loads them."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastvideo_grpo.commands.arguments import path_argument
from fastvideo_grpo.errors import UserError

EPILOG = """\
examples:
  fastvideo-grpo export runs/flux --out exported --pipeline      # a folder for FluxPipeline.from_pretrained
  fastvideo-grpo export runs/flux --out exported --weights ema   # the network alone, EMA weights
  fastvideo-grpo export runs/lora --out exported                 # LoRA run: a file for load_lora_weights
  fastvideo-grpo export runs/lora --out exported --lora-format kohya   # ... under the names of kohya's sd-scripts
  fastvideo-grpo export runs/lora --out exported --merge-lora    # ... or folded into full weights
  fastvideo-grpo export runs/hunyuan --out exported --pipeline --link   # HunyuanVideoPipeline, without 16 GB of copies

--link makes hard links: the export stays whole when the checkpoint is removed, and the other way round. A linked file is
one file with two names, so replace it in either folder, never change it in place. Both folders have to be on one file
system; where they are not, the command says so and writes nothing. Only weight files are linked, the rest is copied."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run folder (run.dir of the training)")
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder to write; it appears when it is complete"
    )
    parser.add_argument("--iteration", type=int, metavar="N", help="checkpoint to export (default: the newest whole one)")
    parser.add_argument(
        "--weights",
        choices=["model", "ema", "old"],
        default="model",
        help="trained weights, their EMA, or the old ones that drew the samples (grpo.old_weights)",
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="dtype of the files (default: that of model.precision)")
    parser.add_argument("--merge-lora", action="store_true", help="fold the adapters of a LoRA run into full weights")
    parser.add_argument(
        "--lora-format",
        choices=["diffusers", "kohya"],
        help="names of the adapters in the file: diffusers' (default; ComfyUI reads it, too), or of models that it knows "
        "(FLUX, Stable Diffusion) kohya's. In both, alpha is the rank: B A is added as it stands",
    )
    parser.add_argument("--pipeline", action="store_true", help="copy VAE, text encoders, ... beside the network")
    parser.add_argument("--link", action="store_true", help="with --pipeline: hard links instead of copies of weight files")
    parser.add_argument("--max-shard-size", default="10GB", metavar="SIZE", help="largest weight file (default: 10GB)")
    parser.epilog = EPILOG


def run(arguments: argparse.Namespace) -> int:
    """Write the export and say how to load it."""
    import torch

    from fastvideo_grpo.checkpoints import export
    from fastvideo_grpo.checkpoints.run_folder import open_run
    from fastvideo_grpo.engines.sharded_loading import CheckpointReader
    from fastvideo_grpo.models.checkpoint import model_facts
    from fastvideo_grpo.models.registry import FAMILIES
    from fastvideo_grpo.planning.checkpoint_checks import checkpoint_problems

    if arguments.link and not arguments.pipeline:
        raise UserError("--link is about what --pipeline copies; add --pipeline, or leave it out")
    out = Path(arguments.out)
    export.check_out(out)  # before a checkpoint is read
    export.shard_bytes(arguments.max_shard_size)
    run = open_run(arguments.run, arguments.iteration)
    config, start, lora = run.config, Path(run.config.model.path), run.config.model.lora
    if arguments.merge_lora and lora is None:
        raise UserError(f"--merge-lora: {arguments.run} trained full weights (model.lora is null); leave the flag out")
    if arguments.lora_format is not None and (lora is None or arguments.merge_lora):
        raise UserError("--lora-format is about a file of adapters, and these are full weights; leave the option out")
    if arguments.pipeline and lora is not None and not arguments.merge_lora:
        raise UserError("--pipeline needs full weights: add --merge-lora, or leave it out and load the adapters by themselves")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype or config.model.precision]
    family, facts = FAMILIES[config.model.kind], model_facts(config)
    denoiser, pipeline, component = facts.denoiser, family.pipeline, family.denoiser
    copied = [part for part in family.folders if part != component] if arguments.pipeline else []
    problems = checkpoint_problems(config, facts, [*copied, *([component] if arguments.merge_lora else [])])
    if problems:
        raise UserError("\n".join(problems))
    with export.appearing(out) as folder:
        if arguments.pipeline:
            export.copy_components(start, folder, component, link=arguments.link)
        weights = run.weights(arguments.weights)
        names = export.model_names(family, denoiser)
        if lora is None:
            full = names.to_diffusers(weights)
            export.write_denoiser(full, denoiser, folder / component, dtype, arguments.max_shard_size)
        else:
            adapters = names.lora_to_diffusers(weights)
            if arguments.merge_lora:
                merged = export.MergedLoRA(CheckpointReader(start / component), adapters, lora)
                export.write_denoiser(merged, denoiser, folder / component, dtype, arguments.max_shard_size)
            elif arguments.lora_format == "kohya":
                export.write_kohya_lora(adapters, lora, names, family, folder, dtype)
            else:
                export.write_lora(adapters, lora, pipeline, component, folder, dtype)
    if arguments.pipeline:
        cls, load = pipeline, [f'pipeline = {pipeline}.from_pretrained("{out}")']
    elif lora is None or arguments.merge_lora:
        cls = denoiser["_class_name"]
        load = [f'{component} = {cls}.from_pretrained("{out}", subfolder="{component}")']
    else:
        cls = pipeline
        adapters_at = out / export.KOHYA_FILE if arguments.lora_format == "kohya" else out
        load = [f'pipeline = {pipeline}.from_pretrained("{start}")', f'pipeline.load_lora_weights("{adapters_at}")']
    lines = "\n  ".join([f"from diffusers import {cls}", *load])
    print(f"{arguments.weights} weights of iteration {run.iteration} in {out}; load them with\n  {lines}")
    return 0
