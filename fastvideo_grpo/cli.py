"""The command ``fastvideo-grpo``. Subcommands import what they need when they run, so that ``--help`` starts at once."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType

from fastvideo_grpo import __version__, launcher
from fastvideo_grpo.disk.room import REFUSING, describe
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.printed_commands import runnable

SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "train": ("fastvideo_grpo.commands.train", "train a model with GRPO, or resume a run"),
    "sample": ("fastvideo_grpo.commands.sample", "draw pictures or clips from a configuration's model, or from a run"),
    "export": ("fastvideo_grpo.commands.export", "write a run's weights as diffusers loads them"),
    "make-references": ("fastvideo_grpo.commands.make_references", "draw the images that videos start from, before training"),
    "check-reward": ("fastvideo_grpo.commands.check_reward", "score pictures or clips and built-in degradations of them"),
    "serve-reward": ("fastvideo_grpo.commands.serve_reward", "serve a reward over HTTP"),
    "demo": ("fastvideo_grpo.commands.demo", "GRPO on a tiny FLUX or HunyuanVideo, on one CPU core, in minutes"),
    "study": ("fastvideo_grpo.commands.study", "the paper's comparisons on tiny models, with several seeds on all cores"),
    "tiny": ("fastvideo_grpo.commands.tiny", "write a tiny checkpoint in the real on-disk format"),
    "measure-family": ("fastvideo_grpo.commands.measure_family", "count what a model holds, for the estimate of memory"),
    "patch": ("fastvideo_grpo.commands.patch", "apply, check or revert this project's patches to FastVideo"),
    "doctor": ("fastvideo_grpo.commands.doctor", "say what this machine has, and what is missing"),
}


class _Formatter(logging.Formatter):
    """Commands that a message advises run as they stand."""

    def format(self, record: logging.LogRecord) -> str:
        return runnable(super().format(record))


def _overview() -> argparse.ArgumentParser:
    """The parser that lists the subcommands; each has its own, made when it is called."""
    parser = argparse.ArgumentParser(
        prog="fastvideo-grpo",
        description="GRPO reinforcement learning for image and video generators, on FastVideo.",
        epilog="commands:\n"
        + "\n".join(f"  {name:15} {help}" for name, (_, help) in SUBCOMMANDS.items())
        + f"\n\n{runnable('fastvideo-grpo train')} --help says more of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", metavar="COMMAND", choices=list(SUBCOMMANDS), help="one of those below")
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, ModuleType]:
    """The arguments of a command line and the module of its subcommand; only that module is imported.

    Options and key=value overrides may stand in any order. Leaves through SystemExit, as argparse does, on ``--help`` and on
    wrong arguments.
    """
    name = _overview().parse_args(argv[:1] or ["--help"]).command
    path, help = SUBCOMMANDS[name]
    module = importlib.import_module(path)
    parser = argparse.ArgumentParser(
        prog=f"fastvideo-grpo {name}",
        description=help[0].upper() + help[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.epilog = runnable(parser.epilog or "")
    arguments = parser.parse_intermixed_args(argv[1:])
    arguments.command = name
    return arguments, module


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit code. Errors of the user's making are told in a line, without a traceback."""
    arguments, module = parse(sys.argv[1:] if argv is None else argv)
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    run: Callable[[argparse.Namespace], int] = module.run
    try:
        launcher.check()
        return run(arguments)
    except (UserError, FileNotFoundError, FileExistsError) as error:
        return _told(arguments, str(error))
    except OSError as error:
        if error.errno not in REFUSING:
            raise
        return _told(arguments, f"{describe(error)}; free space or repair it, or choose another place")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as error:  # the arguments were right: no code of ours leaves so
        traceback.print_exc()
        print(
            f"fastvideo-grpo {arguments.command}: ended by sys.exit({error.code!r}) of what is named above, before it was done",
            file=sys.stderr,
        )
        return 1


def _told(arguments: argparse.Namespace, text: str) -> int:
    rank = os.environ.get("RANK", "0")
    who = "" if rank == "0" else f"[rank {rank}] "
    print(f"fastvideo-grpo {arguments.command}: {who}{runnable(text)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
