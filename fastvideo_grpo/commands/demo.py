"""``fastvideo-grpo demo``: the whole loop on a tiny FLUX or HunyuanVideo, from loading to a before/after picture."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo_grpo.commands.arguments import path_argument, seed_argument
from fastvideo_grpo.config.paths import as_typed
from fastvideo_grpo.disk.room import free_folder
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.planning import plan
from fastvideo_grpo.printed_commands import runnable
from fastvideo_grpo.resources import data_dir

if TYPE_CHECKING:
    from fastvideo_grpo.trainers.fixed_set import FixedSamples


@dataclass(frozen=True)
class Demo:
    """A demo: which model, which prompts, which rewards.

    Attributes:
        settings: YAML file in data/.
        checkpoint: folder in data/.
        prompts: PROMPTS_train.txt and PROMPTS_heldout.txt in data/prompts/.
        iterations: how many are enough.
        built_in: what a person has to know to judge the result.
        rewards: name -> (overrides, what it rewards); the first is the default.
        example: a prompt to try afterwards.
    """

    settings: str
    checkpoint: str
    prompts: str
    iterations: int
    built_in: str
    rewards: dict[str, tuple[list[str], str]]
    example: str


DEMOS = {
    "picture": Demo(
        settings="demo.yaml",
        checkpoint="tiny-flux-shapes",
        prompts="shapes",
        iterations=34,
        built_in="""\
A tiny FLUX (490 k parameters, made by this project) draws coloured shapes. It was pretrained with 40 % of the captions'
colours wrong on purpose, so that there is something to put right; GRPO sees only rewards. The noise level is 1.0, not the
paper's 0.3, and the learning rate 4e-4, not 1e-5: a model this small has to learn in 34 iterations. Of a sample's six steps one
is stochastic and trained, which takes a third of the evaluations that the paper's way takes (docs/methods.md).""",
        rewards={
            "colour_match": (
                ["rewards.models.colour.kind=colour_match"],
                "how much of the coloured area has the colour the prompt asks for (0 to 1)",
            ),
            "threshold": (
                ["rewards.models.colour.kind=colour_match", "rewards.models.colour.outputs.colour_match.threshold=0.8"],
                "1 if more than 80 % of the coloured area has the colour the prompt asks for, else 0 (a binary reward)",
            ),
            "jpeg_size": (
                ["rewards.models.size.kind=jpeg_size"],
                "minus the picture's size as a JPEG, in kilobytes; watch how it is won, by destroying the picture",
            ),
        },
        example="a blue triangle",
    ),
    "video": Demo(
        settings="demo_video.yaml",
        checkpoint="tiny-hunyuan-shapes",
        prompts="moving",
        iterations=30,
        built_in="""\
A tiny HunyuanVideo (made by this project) draws clips of a coloured shape that moves. It was pretrained with 40 % of the
captions' directions wrong on purpose, so that there is something to put right; GRPO sees only rewards. The noise level and
the learning rate are far above the paper's: a model this small has to learn in a few minutes.""",
        rewards={
            "moving_colour": (
                ["rewards.models.motion.kind=moving_colour"],
                "whether an object of the prompt's colour is there in every frame and travels the way the prompt says (0 to 1)",
            ),
            "frame_difference": (
                ["rewards.models.motion.kind=frame_difference"],
                "how much changes from frame to frame; watch how it is won, by flicker",
            ),
        },
        example="a green circle moving up",
    ),
}

EPILOG = """\
examples:
  fastvideo-grpo demo
  fastvideo-grpo demo --reward jpeg_size
  fastvideo-grpo demo --video
  fastvideo-grpo demo --iterations 150 --seed 1 sample.noise_level=0.3"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides of data/demo.yaml or demo_video.yaml")
    parser.add_argument("--video", action="store_true", help="a tiny HunyuanVideo on moving shapes, instead of a tiny FLUX")
    known = "; ".join(f"{name}: {', '.join(demo.rewards)}" for name, demo in DEMOS.items())
    parser.add_argument("--reward", metavar="NAME", help=f"what is rewarded ({known}; default: the first)")
    parser.add_argument("--iterations", type=int, metavar="N", help="iterations of GRPO (default: 34; 30 with --video)")
    parser.add_argument("--seed", type=seed_argument, default=0, metavar="N", help="seed of noise and prompts (default: 0)")
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="run folder (default: the first free of runs/demo, runs/demo-2, ...)"
    )
    parser.epilog = EPILOG


def run(arguments: argparse.Namespace) -> int:
    """Train, evaluate before and after, draw the grid and the curve, and say what to try next."""
    started = time.monotonic()
    demo = DEMOS["video" if arguments.video else "picture"]
    chosen = arguments.reward or next(iter(demo.rewards))
    if chosen not in demo.rewards:
        raise UserError(f"--reward is {chosen!r}; this demo has {', '.join(demo.rewards)}")
    reward_settings, meaning = demo.rewards[chosen]
    make = "make demo-video" if arguments.video else "make demo"
    out = Path(arguments.out) if arguments.out else free_folder(Path("runs", make.removeprefix("make ")))
    data = data_dir()
    overrides = [
        f"model.path={as_typed(data / demo.checkpoint)}",
        f"prompts.path={as_typed(data / 'prompts' / demo.prompts)}_train.txt",
        f"prompts.eval_path={as_typed(data / 'prompts' / demo.prompts)}_heldout.txt",
        f"prompts.seed={arguments.seed}",
        f"run.seed={arguments.seed}",
        f"run.iterations={demo.iterations if arguments.iterations is None else arguments.iterations}",
        f"run.dir={as_typed(out)}",
        *reward_settings,
        *arguments.overrides,
    ]
    config = run_config.load(data / demo.settings, overrides)
    folder = Path(config.run.dir)
    if config.run.eval_every == 0:
        raise UserError("run.eval_every is 0, but a demo compares evaluations: leave it out, or use fastvideo-grpo train")
    facts = model_facts(config)
    plan.check_run(config, facts, ranks=1)
    plan.check_folder(config)
    plan.check_disk(config, facts)
    print(f"{demo.built_in}\n\nreward: {meaning}\nloading FastVideo and the model ...", flush=True)

    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.engines.process import prepare_process
    from fastvideo_grpo.trainers.fixed_set import sample_fixed
    from fastvideo_grpo.trainers.load import load_trainer

    prepare_process(config)
    with load_trainer(config, World.current()) as trainer:
        trainer.setup_training()
        run = trainer.run
        trained = run.prompts[:: max(1, len(run.prompts) // 6)][:6]
        show = [*trained, *run.eval_prompts[:4]]
        pictures_before = sample_fixed(trainer, run.scoring, show, 1, "pictures")
        trainer.train()
        pictures_after = sample_fixed(trainer, run.scoring, show, 1, "pictures")
    lines = run.log.read()
    whole = bool(lines) and lines[-1]["iteration"] == config.run.iterations - 1
    if not (folder / "evaluation_before.json").is_file() or not whole:
        raise UserError(f"{folder} lacks what was evaluated before or after training (see above): nothing can be compared")
    before, after = json.loads((folder / "evaluation_before.json").read_text()), lines[-1]

    draw = _before_after_clips if arguments.video else _before_after
    grid = draw(folder, len(trained), pictures_before, pictures_after)
    curve = _curve(folder, lines)
    print(
        f"\nafter {config.run.iterations} iterations, with the ODE sampler on fixed noise (mean ± standard error over prompts):"
    )
    for name, label in (("train", "training prompts"), ("heldout", "kept-out prompts")):
        for reward in run.scoring.rewards.names if name == "train" or run.eval_prompts else ():
            old, new = (
                f"{metrics[f'eval/{name}/{reward}/mean']:.3f} ± {metrics[f'eval/{name}/{reward}/stderr']:.3f}"
                for metrics in (before, after)
            )
            print(f"  {label}: {reward} {old} -> {new}")
    print(f"\nbefore and after   {grid}\ncurve              {curve}\nmetrics            {folder / 'metrics.jsonl'}")
    print(f"took {time.monotonic() - started:.0f} s\n\ntry next:")
    for other in demo.rewards:
        if other != chosen:
            print(f"  {make} REWARD={other}")
    print(f"  {make} ITERATIONS={3 * config.run.iterations}")
    print(runnable(f'  fastvideo-grpo sample {folder} --prompt "{demo.example}" --samples 8'))
    print(runnable(f"  fastvideo-grpo export {folder} --out exported --pipeline"))
    return 0


def _before_after(folder: Path, trained: int, before: FixedSamples, after: FixedSamples) -> Path:
    """Two rows of pictures from the same noise, prompts trained on first."""
    from fastvideo_grpo.tracking.pictures import caption, grid, placeholder, to_image

    images, captions = [], []
    for drawn in (before, after):
        for i, prompt in enumerate(drawn.prompts):
            assert drawn.media is not None  # one process
            picture, fault = drawn.media[i], drawn.faults[i]
            images.append(to_image(picture) if fault is None else placeholder(*picture.shape[1:3]))
            text = prompt.text if i < trained else f"{prompt.text} (kept out)"
            captions.append(caption(text, drawn.by_sample()[i], fault))
    path = folder / "before_after.png"
    grid(images, captions, len(before.prompts), row_titles=["before", "after"]).save(path)
    return path


def _before_after_clips(folder: Path, trained: int, before: FixedSamples, after: FixedSamples) -> Path:
    """Contact sheets of clips from the same noise, before above after for each prompt, prompts trained on first."""
    from fastvideo_grpo.tracking.pictures import caption, contact_sheet, placeholder, rows

    sheets, captions = [], []
    for i, prompt in enumerate(before.prompts):
        text = prompt.text if i < trained else f"{prompt.text} (kept out)"
        for when, drawn in (("before", before), ("after", after)):
            assert drawn.media is not None  # one process
            clip, fault = drawn.media[i], drawn.faults[i]
            sheets.append(contact_sheet(clip) if fault is None else placeholder(*clip.shape[1:3]))
            captions.append(f"{when}: {caption(text, drawn.by_sample()[i], fault)}")
    path = folder / "before_after.png"
    rows(sheets, captions).save(path)
    return path


def _curve(folder: Path, lines: list[dict[str, Any]]) -> Path:
    """Reward of the training samples per iteration, and the evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    key = next(key for key in lines[0] if key.startswith("reward/") and key.endswith("/mean"))
    reward = key.removeprefix("reward/").removesuffix("/mean")
    binary = f"reward/{reward}/above_threshold"
    shown = binary if binary in lines[0] else key
    axes.plot([line["iteration"] + 1 for line in lines], [line[shown] for line in lines], color="0.7", label="training samples")
    first = json.loads((folder / "evaluation_before.json").read_text())
    for name, label in (("train", "evaluation, training prompts"), ("heldout", "evaluation, kept-out prompts")):
        prefix = f"eval/{name}/{reward}"
        evaluated = [(0, first), *((line["iteration"] + 1, line) for line in lines)]
        points = [(x, line) for x, line in evaluated if f"{prefix}/mean" in line]
        if not points:  # no prompts are kept out
            continue
        axes.errorbar(
            [x for x, _ in points],
            [line[f"{prefix}/mean"] for _, line in points],
            [line[f"{prefix}/stderr"] for _, line in points],
            marker="o",
            capsize=3,
            label=label,
        )
    axes.set_xlabel("iteration")
    axes.set_ylabel(reward)
    axes.legend()
    figure.tight_layout()
    path = folder / "curve.png"
    figure.savefig(path, dpi=120)
    return path
