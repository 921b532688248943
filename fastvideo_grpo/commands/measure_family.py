"""``fastvideo-grpo measure-family``: the factors by which a model's memory is estimated, counted on its network."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastvideo_grpo.errors import UserError

if TYPE_CHECKING:
    from fastvideo_grpo.models.family import Activations
    from fastvideo_grpo.planning.activation_counting import Checked, FamilyCounter

EPILOG = """\
The network is built at the widths that the family publishes, with few blocks and without weights: no checkpoint and no GPU is
needed, and about a minute of one core. Lines to paste into the family go to standard output, all else to standard error. The
factors are checked with more blocks at other sizes: the command fails where they are more than 3 % off what is kept for the
backward pass there, or 10 % off what a forward holds.

example:
  fastvideo-grpo measure-family my_model --precision bf16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", help="the model, as in model.kind")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of the network: this one alone (default: both)")
    parser.epilog = EPILOG


def run(arguments: argparse.Namespace) -> int:
    """Count, print what to paste and how far off it is; 1 where that is too far."""
    from fastvideo_grpo.planning.activation_counting import FamilyCounter
    from fastvideo_grpo.trainers.load import trainer_class

    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:4.0f} s  {text}", file=sys.stderr, flush=True)

    try:
        counter = FamilyCounter(arguments.kind, trainer_class, say)
    except ValueError as error:  # no such model
        raise UserError(str(error)) from error
    precisions = [arguments.precision] if arguments.precision else ["fp32", "bf16"]
    checks: list[Checked] = []
    if counter.counts_blocks:
        for attribute, lora in (("activations", False), ("lora_activations", True)):
            measured = {precision: counter.activations(precision, lora=lora) for precision in precisions}
            print(f"{attribute}={{")
            for precision, activations in measured.items():
                print(f'    "{precision}": {as_written(activations)},')
            print("},", flush=True)
            for precision, activations in measured.items():
                checks += counter.check(precision, activations, lora=lora)
    else:
        print(
            f"{arguments.kind} names no activations and is no network of FastVideo's: its passes are counted on the network "
            "itself whenever a run is planned (pass_bytes)",
            file=sys.stderr,
        )
    for line in _decoding(counter, precisions):
        print(line, flush=True)
    for check in checks:
        print(_described(check), file=sys.stderr)
    wrong = [check.what for check in checks if not check.fits]
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(checks)} figures are too far off at other sizes ({wrong[0]}): what this network holds does "
            "not follow from tokens and blocks as fastvideo_grpo.models.family.Activations has it"
        )
    return 0


def as_written(activations: Activations) -> str:
    """As it stands in a family: what is usual is left out."""
    first, second = activations.rest
    parts = [f"{activations.double}, {activations.single}, ({first}, {second}), {activations.forward}"]
    for name, usual in (("mlp", 0), ("text", None), ("refiner", 0), ("adapters", (0, 0))):
        value = getattr(activations, name)
        parts += [] if value == usual else [f"{name}={value}"]
    return f"Activations({', '.join(parts)})"


def _decoding(counter: FamilyCounter, precisions: list[str]) -> Iterator[str]:
    """The decoder's factors, the larger of the precisions: of an image, and of a clip where the model makes some."""
    from fastvideo_grpo.planning.activation_counting import CLIP_FRAMES

    for prefix, frames in (("", 1), *([("clip_", CLIP_FRAMES)] if counter.makes_clips else [])):
        measured = zip(*(counter.decoding(each, frames) for each in precisions), strict=True)
        for name, figures in zip(("decode", "decode_kept"), measured, strict=True):
            yield f"{prefix}{name}={max(figures)},"


def _described(check: Checked) -> str:
    own = "" if check.of_family is None else f", by what the family has {check.of_family / check.counted - 1:+.1%}"
    mark = "" if check.fits else "  TOO FAR"
    return f"{check.what}: {check.counted / 2**20:.1f} MiB counted, by these factors {check.off:+.1%}{own}{mark}"
