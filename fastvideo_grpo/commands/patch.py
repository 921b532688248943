"""``fastvideo-grpo patch``: apply, check or revert this project's patches to FastVideo."""

from __future__ import annotations

import argparse
import sys

from fastvideo_grpo import patching
from fastvideo_grpo.commands.arguments import path_argument
from fastvideo_grpo.patching import APPLY_COMMAND, PatchError
from fastvideo_grpo.printed_commands import runnable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastvideo-grpo patch`."""
    parser.add_argument(
        "action",
        choices=("apply", "check", "revert", "manifest"),
        help="apply: patch FastVideo. check: say what is patched; exit code 1 if something is not. revert: give back "
        "the original files. manifest: record the file hashes anew, after a patch changed (for developers).",
    )
    parser.add_argument(
        "--to",
        type=path_argument,
        metavar="DIR",
        help="a FastVideo checkout (a folder that contains fastvideo/) instead of the installed copy",
    )


def run(args: argparse.Namespace) -> int:
    """Do what `fastvideo-grpo patch` was asked for. Returns the exit code; prints errors on stderr."""
    try:
        if args.action == "manifest":
            print(f"wrote {patching.write_manifest(args.to)}")
            return 0
        if args.action == "check":
            manifest, statuses = patching.read_manifest(), patching.status(args.to)
            for item in statuses:
                print(f"{item.state:9} {item.path}")
            done = all(patching.is_done(item, manifest) for item in statuses)
            target = f" --to {args.to}" if args.to else ""
            print("FastVideo is patched." if done else runnable(f"FastVideo is not patched. Run `{APPLY_COMMAND}{target}`."))
            return 0 if done else 1
        changed = patching.apply(args.to) if args.action == "apply" else patching.revert(args.to)
        word = "patched" if args.action == "apply" else "reverted"
        for path in changed:
            print(f"{word} {path}")
        if not changed:
            print(f"nothing to do: FastVideo is {'patched already' if args.action == 'apply' else 'not patched'}")
        return 0
    except PatchError as error:
        print(f"error: {runnable(str(error))}", file=sys.stderr)
        return 1
