"""The command ``fastvideo-grpo``. Subcommands import what they need when they run, so that ``--help`` starts at once."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType

from fastvideo_grpo.errors import UserError

SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "train": ("fastvideo_grpo.commands.train", "train a model with GRPO, or resume a run"),
    "sample": ("fastvideo_grpo.commands.sample", "draw pictures from a model, a run or an exported checkpoint"),
    "export": ("fastvideo_grpo.commands.export", "write a run's weights as diffusers loads them"),
    "demo": ("fastvideo_grpo.commands.demo", "GRPO on a tiny FLUX, on one CPU core, in under two minutes"),
    "tiny": ("fastvideo_grpo.tiny.command", "write a tiny checkpoint in the real on-disk format"),
    "patch": ("fastvideo_grpo.patching", "apply, check or revert this project's patches to FastVideo"),
    "doctor": ("fastvideo_grpo.doctor", "say what this machine has, and what is missing"),
}


def _parser(wanted: str | None) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    """The parser; only the wanted subcommand's module is imported for its arguments."""
    parser = argparse.ArgumentParser(
        prog="fastvideo-grpo", description="GRPO reinforcement learning for image and video generators, on FastVideo."
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    module = None
    for name, (path, help) in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", formatter_class=argparse.RawTextHelpFormatter
        )
        if name == wanted:
            module = importlib.import_module(path)
            module.add_arguments(subparser)
    return parser, module


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit code. Errors of the user's making are told in a line, without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    wanted = next((word for word in argv if not word.startswith("-")), None)
    parser, module = _parser(wanted)
    arguments = parser.parse_args(argv)
    if arguments.version:
        from fastvideo_grpo import __version__

        print(__version__)
        return 0
    if module is None:
        parser.print_help()
        return 2
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    run: Callable[[argparse.Namespace], int] = module.run
    try:
        return run(arguments)
    except (UserError, FileNotFoundError, FileExistsError) as error:
        # One line a machine: the other processes of it see the same files and say the same.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"fastvideo-grpo {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
