"""``fastvideo-grpo make-references``: images that videos start from, drawn by a text-to-image model before training."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import io
import json
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo_grpo import launcher
from fastvideo_grpo.commands.arguments import path_argument, seed_argument
from fastvideo_grpo.config import saved as config_saved
from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.errors import ConfigError, UserError
from fastvideo_grpo.model_files.json_files import read_json
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.checkpoint import model_facts, where_from
from fastvideo_grpo.models.family import Family
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.planning import plan

if TYPE_CHECKING:
    from torch import Tensor

    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.prompts.files import Prompt
    from fastvideo_grpo.trainers.base import GRPOTrainer

logger = logging.getLogger(__name__)

EPILOG = """\
examples:
  fastvideo-grpo make-references --model checkpoints/FLUX.1-dev --prompts data/prompts/hunyuan_examples.txt --out references
  fastvideo-grpo make-references --model checkpoints/HunyuanVideo --prompts prompts.jsonl --out references \\
    sample.height=544 sample.width=960 sample.steps=50
  torchrun --nproc-per-node 8 -m fastvideo_grpo.cli make-references --model checkpoints/FLUX.1-dev \\
    --prompts data/prompts/hunyuan_examples.txt --out references

Draws one image of each prompt with the ODE sampler, into OUT/images, and writes OUT/prompts.jsonl when all are there: the same
prompts with their images, for prompts.path of an image-to-video run. An image depends on the model, the settings, --seed, and
the prompt's id and text, and on nothing else. A second start draws what is missing; with other settings or another model it is
refused. Keys that may be given:
  {keys}"""

KEYS_OF_IMAGES = (
    "sample.height",
    "sample.width",
    "sample.steps",
    "sample.shift",
    "sample.guidance_scale",
    "sample.vae_tiling",
    "model.precision",
    "model.vae_precision",
    "model.attention",
    "prompts.text_length",
)
KEYS_OF_PROCESSES = ("engine.offload_idle", "run.deterministic", "run.threads", "run.timeout_minutes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = ", ".join(_drawing())
    parser.add_argument(
        "--model",
        type=path_argument,
        required=True,
        metavar="DIR",
        help=f"checkpoint folder of a text-to-image model ({kinds})",
    )
    parser.add_argument(
        "--prompts",
        type=path_argument,
        required=True,
        metavar="FILE",
        help="a prompt file; images it names are replaced",
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder to write, or to go on with")
    parser.add_argument("--seed", type=seed_argument, default=0, metavar="N", help="of the noise (default: 0)")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings, e.g. sample.height=544 sample.steps=30")
    parser.epilog = EPILOG.format(keys=f"{', '.join(KEYS_OF_IMAGES)},\n  {', '.join(KEYS_OF_PROCESSES)}")


def run(arguments: argparse.Namespace) -> int:
    """Check, draw what is missing, write the prompt file. All ranks call it."""
    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.engines.process import prepare_process
    from fastvideo_grpo.prompts.files import read_prompt_file
    from fastvideo_grpo.tracking.console import Console

    config = make_config(arguments.model, arguments.prompts, arguments.out, arguments.overrides)
    # Each process draws for itself, with the whole model: any number of them will do.
    plan.check_run(config, model_facts(config), ranks=1, training=False)
    file = read_prompt_file(arguments.prompts)
    prompts = file.prompts
    for note in file.notes if launcher.rank() == 0 else ():
        logger.warning("%s", note)
    plan.warn_of_cut(config, prompts)
    folder = Path(arguments.out)
    prepare_process(config)
    world = World.current(timeout_minutes=config.run.timeout_minutes)
    console = Console(quiet=world.rank != 0)
    missing = world.on_rank_0(lambda: prepare_folder(folder, settings_of(config, arguments.seed), prompts, config))
    missing = world.broadcast_object(missing)
    if missing:
        there = f" ({len(prompts) - len(missing)} are there)" if len(missing) < len(prompts) else ""
        console.say(f"drawing {len(missing)} of {len(prompts)} images{there} with {config.model.path}")
        draw_missing(config, world, [prompts[i] for i in missing], arguments.seed, folder, console)
    world.on_rank_0(lambda: _write(folder / "prompts.jsonl", prompt_lines(prompts)))
    console.say(
        f"{len(missing)} images drawn, {len(prompts) - len(missing)} kept, in {folder / 'images'}. Next: train an "
        f"image-to-video model with prompts.path={folder / 'prompts.jsonl'}"
    )
    world.leave()
    return 0


def make_config(model: str, prompts: str, out: str, overrides: list[str]) -> Config:
    """The configuration that draws the images: the family's own settings and, over them, the given ones.

    Raises:
        ConfigError: the folder holds no model that draws images, or a key that does not matter here, is unknown or has a
            value that is not allowed.
    """
    allowed = (*KEYS_OF_IMAGES, *KEYS_OF_PROCESSES)
    for item in overrides:
        key = item.partition("=")[0]
        if "=" in item and key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            raise ConfigError(
                f"{key} does nothing in make-references{f'; did you mean {near[0]}?' if near else ''}; keys here: "
                f"{', '.join(allowed)}"
            )
    kind = _kind_of(Path(model))
    start = _drawing()[kind].reference_images
    assert start is not None
    values = {
        "model": {"kind": kind, "path": model},
        "sample": {**start["sample"], "frames": 1},
        "prompts": {**start["prompts"], "path": prompts, "embeddings": "none"},
        "rewards": {"models": {"unused": {"kind": "jpeg_size"}}},  # a run has to have one; nothing is scored
        "run": {"dir": out},
    }
    config = run_config.build(values, overrides)
    config.rewards.models = {}
    return config


def _drawing() -> dict[str, Family]:
    """``model.kind`` -> the families that draw such images."""
    return {kind: family for kind, family in FAMILIES.usable().items() if family.reference_images is not None}


def _kind_of(checkpoint: Path) -> str:
    """The ``model.kind`` of a checkpoint folder, from its model_index.json."""
    index = checkpoint / "model_index.json"
    drawing = {family.pipeline: family for family in _drawing().values()}
    known = ", ".join(f"{family.name} ({family.pipeline})" for family in drawing.values())
    if not index.is_file():
        what = "has no model_index.json" if checkpoint.exists() else "does not exist"
        fitting = (
            family for family in drawing.values() if family.source and Path(family.source.folder).name == checkpoint.name
        )
        family = next(fitting, next(iter(drawing.values())))
        raise ConfigError(
            f"--model {checkpoint} {what}; expected a diffusers folder of {known}{where_from(family, checkpoint)}"
        )
    try:
        found = read_json(index).get("_class_name")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{index} is damaged ({error}); download it again") from error
    if found not in drawing:
        raise ConfigError(f"--model {checkpoint} holds a {found}; images are drawn by {known}")
    return drawing[found].kind


def settings_of(config: Config, seed: int) -> dict[str, Any]:
    """Everything the images depend on besides the prompts: name -> value, flat. Weights are there by their identity."""
    from fastvideo_grpo.prompts.embeddings import encoder_identity
    from fastvideo_grpo.sampling import noise

    plain = config_saved.to_dict(config)
    settings: dict[str, Any] = {"model.kind": config.model.kind, "seed": seed, "noise": noise.VERSION}
    for key in KEYS_OF_IMAGES:
        section, _, name = key.partition(".")
        settings[key] = plain[section][name]
    for component in FAMILIES[config.model.kind].folders:
        if component != "scheduler":  # the schedule is ours
            settings[f"checkpoint.{component}"] = encoder_identity(Path(config.model.path), [component], {})
    return settings


def prepare_folder(folder: Path, settings: dict[str, Any], prompts: Sequence[Prompt], config: Config) -> list[int]:
    """Make the folder or check that it may be gone on with; which prompts have no image yet, by index.

    Raises:
        UserError: it was made with other settings or another model, holds an image of another text or size, or cannot be
            written.
    """
    file, images = folder / "settings.json", folder / "images"
    try:
        images.mkdir(parents=True, exist_ok=True)
        there = sorted(images.glob("[!.]*"))
        if file.exists():
            _check_settings(file, settings)
        elif there:
            raise UserError(
                f"{images} holds {there[0].name}, but there is no {file.name} beside it that says how it was made; choose "
                "another --out"
            )
        else:
            _write(file, (json.dumps(settings, indent=1) + "\n").encode())
        for left in [*folder.glob(".*.partial"), *images.glob(".*.partial")]:  # of a killed start; younger: of a running one
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be used: {error}; make room or repair it, or choose another") from error
    missing = []
    for number, prompt in enumerate(prompts):
        image = images / file_name(prompt.id)
        if image.exists():
            _check_image(image, prompt, config)
        else:
            missing.append(number)
    return missing


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); choose another --out") from error
    if before == settings:
        return
    if not isinstance(before, dict):
        raise UserError(f"{file} is no settings file of make-references; choose another --out")
    changed = []
    for key in sorted({*before, *settings}):
        was, now = before.get(key), settings.get(key)
        if was != now:
            weights = key.startswith("checkpoint.") and was is not None and now is not None
            changed.append(f"{key} (another one now)" if weights else f"{key} ({was} there, {now} now)")
    raise UserError(
        f"{file}: the images there were made with other settings: {', '.join(changed)}. Set them back, or choose another --out"
    )


def _check_image(file: Path, prompt: Prompt, config: Config) -> None:
    """An image that is there must be this prompt's; it says so itself."""
    from PIL import Image

    try:
        with Image.open(file, formats=("PNG",)) as image:
            size, text = image.size, image.info.get("prompt")
    except Exception as error:  # of a damaged file, Pillow's readers raise nearly everything
        raise UserError(f"{file} is damaged ({error}); remove it to have it drawn again") from error
    if text != prompt.text:
        was = f"the text {text!r}" if text is not None else "nobody knows what text"
        raise UserError(
            f"{file} was drawn for {was}, but the prompt {prompt.id!r} is now {prompt.text!r}; remove it to have it drawn "
            "again, or choose another --out"
        )
    if size != (config.sample.width, config.sample.height):
        raise UserError(f"{file} has {size[0]}x{size[1]} pixels, which were not drawn here; remove it to have it drawn again")


def file_name(prompt_id: str) -> str:
    """The file of a prompt's image: its id, or a hash of it where the id is no good file name (two ids never share one)."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", prompt_id):
        return f"{prompt_id}.png"
    # Such a name begins with what no id that is kept does.
    return f"_{hashlib.sha256(prompt_id.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}.png"


def prompt_lines(prompts: Sequence[Prompt]) -> bytes:
    """The prompts with their images as a .jsonl file, in their order."""
    lines = []
    for prompt in prompts:
        entry = {"id": prompt.id, "prompt": prompt.text, "image": f"images/{file_name(prompt.id)}"}
        if prompt.negative_prompt is not None:
            entry["negative_prompt"] = prompt.negative_prompt
        entry.update({key: value for key, value in prompt.metadata.items() if key != "image"})
        # In ASCII: some readers would cut a line in two at a separator inside a prompt.
        lines.append(json.dumps(entry) + "\n")
    return "".join(lines).encode()


def draw_missing(config: Config, world: World, prompts: Sequence[Prompt], seed: int, folder: Path, console: Any) -> None:
    """Load the model and draw the prompts, each rank every ``world.size``-th. All ranks call it with the same prompts.

    The ranks meet after every image, so that an error on one (a full disk, a sample that is not finite) ends all of them at
    once; what was written stays.
    """
    from fastvideo_grpo.trainers.load import load_trainer

    trainer = load_trainer(config, world)
    show = console.progress("drawing images")
    for start in range(0, len(prompts), world.size):
        error: Exception | None = None
        if start + world.rank < len(prompts):
            prompt = prompts[start + world.rank]
            try:
                _write(folder / "images" / file_name(prompt.id), to_png(draw(trainer, prompt, seed), prompt))
            except Exception as failure:  # every rank has to hear of it, whatever it is, or the others wait for this one
                error = failure
        _raise_everywhere(world, error)
        show(min(start + world.size, len(prompts)), len(prompts))


def draw(trainer: GRPOTrainer, prompt: Prompt, seed: int) -> Tensor:
    """The image of a prompt, uint8 ``[H, W, 3]``, from noise keyed by the prompt's id.

    Raises:
        UserError: it is not finite, from its latents to its pixels.
    """
    from fastvideo_grpo.sampling.noise import SampleKey

    drawn = trainer.draw_fixed(prompt, [SampleKey(seed, 0, 0, prompt.id, 0, "reference")])
    trainer.forget_conditioning()  # it will not be asked for again
    assert drawn.media is not None  # every process leads: none shares a sample
    (fault,) = drawn.faults()
    if fault is not None:
        model = trainer.config.model
        key = "vae_precision" if fault.startswith("decoding") else "precision"
        precision = getattr(model, key)
        way = f"set model.{key}=fp32 (it is {precision})" if precision != "fp32" else f"see that {model.path} is whole"
        raise UserError(f"the image of prompt {prompt.id!r} is not written: {fault}; {way}")
    return drawn.media[0, 0]


def to_png(pixels: Tensor, prompt: Prompt) -> bytes:
    """uint8 ``[H, W, 3]`` -> a PNG that says of which prompt it is; the same bytes for the same pixels and prompt."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    said = PngInfo()
    said.add_itxt("prompt", prompt.text)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG", pnginfo=said)
    return file.getvalue()


def _write(file: Path, content: bytes) -> None:
    from fastvideo_grpo.disk.durable_files import write_atomic

    try:
        write_atomic(file, content)
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error}; what was drawn before is kept: repair it (make room?) and start the same "
            "command again"
        ) from error


def _raise_everywhere(world: World, error: Exception | None) -> None:
    """All ranks call it: the first rank's error there is, on every rank."""
    told = None
    if error is not None:
        told = str(error) if isinstance(error, UserError) else f"rank {world.rank} failed: {type(error).__name__}: {error}"
    errors = [text for text in world.all_gather_object(told) if text is not None]
    if error is not None and not isinstance(error, UserError):
        raise error
    if errors:
        raise UserError(errors[0])
