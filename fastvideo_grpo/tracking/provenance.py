"""What a run's numbers came from: versions and commit."""

from __future__ import annotations

import functools
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    from importlib.metadata import version

    names = ("fastvideo_grpo", "torch", "fastvideo", "diffusers", "transformers", "deepspeed", "numpy")
    return {name: version(name) for name in names}


@functools.cache
def git_commit() -> str | None:
    """The commit of this checkout; None for an installed package, or where there is no git."""
    import subprocess

    root = Path(__file__).resolve().parent.parent.parent
    try:
        done = subprocess.run(
            ["git", "-C", root, "rev-parse", "--show-toplevel", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    # An installed package may lie inside somebody else's repository.
    lines = done.stdout.split()
    return lines[1] if len(lines) == 2 and Path(lines[0]).resolve() == root else None
