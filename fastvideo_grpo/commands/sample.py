"""``fastvideo-grpo sample``: pictures or clips from a configuration's model, or from a run."""

from __future__ import annotations

import argparse
import logging
import re
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from fastvideo_grpo.commands.arguments import path_argument, text_argument
from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.models.run_prompts import prompt_file_of
from fastvideo_grpo.planning import plan

if TYPE_CHECKING:
    from fastvideo_grpo.checkpoints.run_folder import RunCheckpoint
    from fastvideo_grpo.prompts.files import Prompt

logger = logging.getLogger(__name__)

EPILOG = """\
examples:
  fastvideo-grpo sample runs/flux --prompt "a red circle" --samples 4
  fastvideo-grpo sample runs/flux --prompts prompts.txt --weights ema --out pictures
  fastvideo-grpo sample train_scripts/configs/flux_t2i_tiny.yaml --prompt "a red circle" sample.steps=20
  fastvideo-grpo sample runs/hunyuan --prompt "a red circle moving left" sample.frames=13 sample.fps=8

The ODE sampler is used, on noise that depends on the prompt and the sample's number only: the same command on two
checkpoints gives samples that compare. Each is scored by the configured rewards. Of an image model they are .png
files; of a video model .mp4 files of sample.frames frames, sample.fps a second, each with a contact sheet (.png).
grid.png shows all of them, index.json has their prompts and rewards and says whose they are.

They go to RUN/sampled/ITERATION-WEIGHTS, of a configuration to samples/NAME; where there are samples already, beside them
(...-2). A folder given by --out has to be empty, so that no two models' samples mix; --overwrite replaces its samples."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=path_argument,
        metavar="RUN|CONFIG",
        help="a run folder (trained weights), or a YAML file (the model it starts from)",
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides of single keys, e.g. sample.steps=30")
    parser.add_argument(
        "--prompt", action="append", type=text_argument, default=[], metavar="TEXT", help="a prompt; may be given several times"
    )
    parser.add_argument(
        "--prompts",
        type=path_argument,
        metavar="FILE",
        help="a prompt file (docs/prompts.md; default: the configured eval or training prompts)",
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="samples per prompt (default: 1)")
    parser.add_argument(
        "--weights",
        choices=["model", "ema", "old", "start"],
        help="of a run: trained (default), EMA, the old ones that drew (grpo.old_weights), or before training",
    )
    parser.add_argument("--iteration", type=int, metavar="N", help="checkpoint of the run (default: the newest whole one)")
    parser.add_argument("--out", type=path_argument, metavar="DIR", help="folder to write, empty or new (default: see below)")
    parser.add_argument("--overwrite", action="store_true", help="replace the samples that are in --out")
    parser.add_argument("--no-rewards", action="store_true", help="do not score the samples (reward models need not be there)")
    parser.epilog = EPILOG


def run(arguments: argparse.Namespace) -> int:
    """Draw, score, save. Exit code 1 where no sample is finite."""
    from fastvideo_grpo.checkpoints.run_folder import open_run
    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.prompts.files import Prompt, text_id
    from fastvideo_grpo.prompts.images import check_images

    checkpoint: RunCheckpoint | None = None
    overrides = [_of_drawing(item) for item in arguments.overrides]
    if Path(arguments.source).is_dir():
        if arguments.weights == "start":
            if arguments.iteration is not None:
                raise UserError(
                    "--weights start is before the first iteration: leave --iteration out, or take model, ema or old"
                )
            config = run_config.load(Path(arguments.source) / "config.yaml", overrides)
        else:
            checkpoint = open_run(arguments.source, arguments.iteration, overrides)
            config = checkpoint.config
    else:
        if arguments.weights in ("model", "ema", "old") or arguments.iteration is not None:
            raise UserError("--weights and --iteration need a run folder; a configuration has its starting weights only")
        config = run_config.load(arguments.source, overrides)
    if arguments.samples < 1:
        raise UserError(f"--samples is {arguments.samples}; it must be at least 1")
    prompts = [Prompt(text_id(text), text) for text in arguments.prompt]
    starts_from_images = FAMILIES[config.model.kind].reads_images
    if prompts and starts_from_images:
        raise UserError(
            f"--prompt is a text, and {config.model.kind} starts from an image: write both into a .jsonl file, a line "
            '{"prompt": ..., "image": ...}, and give it with --prompts'
        )
    if arguments.prompts or not prompts:
        file = prompt_file_of(config, arguments.prompts or config.prompts.eval_path or config.prompts.path)
        prompts += file.prompts
        for note in file.notes:
            logger.warning("%s", note)
    if starts_from_images:
        check_images(prompts, config.sample.height, config.sample.width, World())
    # One process draws, whatever trained the weights, and encodes only what it is asked for.
    config.engine.kind, config.engine.offload, config.engine.sequence_parallel = "local", "none", 1
    config.engine.deepspeed_json = None
    config.prompts.embeddings = "none"
    if arguments.no_rewards:
        config.rewards.models = {}
    which = "start" if checkpoint is None else arguments.weights or "model"
    out = _folder(arguments, checkpoint, which)
    plan.check_run(config, model_facts(config), ranks=1, training=False)
    plan.warn_of_cut(config, prompts)
    faults, sheet = draw(config, checkpoint, which, prompts, arguments.samples, out)
    clips = f"clips (mp4, {config.sample.frames} frames, {config.sample.fps} a second)"
    what = "pictures" if config.sample.frames == 1 else clips
    found = Counter(fault for fault in faults if fault is not None)
    print(f"{len(faults) - found.total()} {what} in {out}; all of them: {sheet}")
    for fault, count in found.items():
        print(f"{count} of {len(faults)} are invalid and have no file: {fault}")
    return 0 if found.total() < len(faults) else 1


def _of_drawing(override: str) -> str:
    """What is drawn here takes ``sample.eval_steps`` and ``sample.eval_cfg_scale`` where the run has them: who gives
    ``sample.steps`` or ``sample.cfg_scale`` means these, whatever the rollouts of the run make of theirs."""
    return re.sub(r"^sample\.(steps|cfg_scale)=(?=[\d.]+$)", r"sample.eval_\1=", override)


def _folder(arguments: argparse.Namespace, checkpoint: RunCheckpoint | None, which: str) -> Path:
    """Where the samples go: a folder that holds none yet, or whose samples may be replaced.

    Raises:
        UserError: it cannot be written, or holds something else.
    """
    from fastvideo_grpo.disk.room import free_folder, refusal
    from fastvideo_grpo.tracking.pictures import not_samples

    if arguments.out is None:
        if arguments.overwrite:
            raise UserError("--overwrite is about the folder of --out; give it, or leave --overwrite out")
        source = Path(arguments.source)
        name = which if checkpoint is None else f"{checkpoint.iteration:06d}-{which}"
        out = free_folder(source / "sampled" / name if source.is_dir() else Path("samples", source.stem))
    else:
        out = Path(arguments.out)
        found = sorted(out.iterdir()) if out.is_dir() else []
        if found and not arguments.overwrite:
            raise UserError(f"--out {out} holds {found[0].name} already; choose another folder, or add --overwrite")
        others = not_samples(out) if found else []
        if others:
            raise UserError(f"--out {out} holds {others[0]}, which is no sample: nothing is overwritten; choose another folder")
    answer = refusal(out)
    if answer is not None:
        raise UserError(f"{out} cannot be written: {answer.reason}; choose another folder with --out")
    return out


def draw(
    config: Config, checkpoint: RunCheckpoint | None, which: str, prompts: list[Prompt], samples: int, out: Path
) -> tuple[list[str | None], Path]:
    """Load the model, draw and save; returns what of each sample is not finite, and the grid's path."""
    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.engines.process import prepare_process
    from fastvideo_grpo.tracking.pictures import save_samples
    from fastvideo_grpo.trainers.fixed_set import sample_fixed
    from fastvideo_grpo.trainers.load import load_trainer
    from fastvideo_grpo.trainers.scoring import Scoring

    prepare_process(config)
    world = World.current()
    with ExitStack() as held:
        trainer = held.enter_context(closing(load_trainer(config, world)))
        scoring = held.enter_context(closing(Scoring(config, world, trainer.fps))) if config.rewards.models else None
        if checkpoint is not None:
            trainer.load_weights(checkpoint.weights(which))
        drawn = sample_fixed(trainer, scoring, prompts, samples, "sample")
    assert drawn.media is not None  # one process
    texts = [prompt.text for prompt in prompts for _ in range(samples)]
    model = {"checkpoint": config.model.path if checkpoint is None else str(checkpoint.folder), "weights": which}
    columns, fps = max(samples, 4), config.sample.fps
    save_samples(out, drawn.media, texts, drawn.by_sample(), columns, faults=drawn.faults, fps=fps, made_from=model)
    return drawn.faults, out / "grid.png"
