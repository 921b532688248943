"""Commands in what is printed, so that they run as they stand: by their path, where the shell would not find them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

_COMMAND = re.compile(r"(?<![\w./-])(fastvideo-grpo|hf|torchrun|wandb)(?= [a-z-]+\b(?!:))")
"""Our command and those of packages installed with it, where a subcommand or an option follows."""


def runnable(text: str) -> str:
    """``text`` with ``fastvideo-grpo ...`` and ``hf ...`` as ``.venv/bin/fastvideo-grpo ...``, unless that environment is
    activated."""
    return _COMMAND.sub(lambda found: _typed(found[1]), text)


def _typed(name: str) -> str:
    """How a person types the command ``name`` of this interpreter's environment, from the current directory."""
    folder = Path(sys.executable).parent  # not resolved: an environment's interpreter is a link
    ours = folder / name
    found = shutil.which(name)
    if not ours.is_file() or (found is not None and Path(found).parent.resolve() == folder.resolve()):
        return name
    inside = os.path.relpath(ours)
    return shlex.quote(str(ours) if inside.startswith(os.pardir) else inside)
