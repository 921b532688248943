"""Run a command as on a machine that has only what ``make gpu-kit`` takes for granted: every other package is hidden.

    bash runs/gpu-kit/run.sh python benchmarks/gpu_kit/rehearse.py SCRIPT [ARGUMENT ...]

A module that lies in this environment's site-packages can be imported if ``EXPECTED`` names it, or what one of those requires;
what the kit brings comes before them. It holds for the processes that the command starts, too.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from make import EXPECTED  # type: ignore[import-not-found]  # beside this file

HERE = Path(__file__).resolve().parent
SITE = Path(sysconfig.get_paths()["purelib"]).resolve()


def expected_modules() -> set[str]:
    """``EXPECTED``, and the modules of all packages that theirs require, directly or not."""
    providers = importlib.metadata.packages_distributions()
    modules: dict[str, set[str]] = {}
    for module, names in providers.items():
        for name in names:
            modules.setdefault(_plain(name), set()).add(module)
    todo = [_plain(name) for module in EXPECTED for name in providers.get(module, [])]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        todo += [_plain(re.split(r"[^\w.-]", line)[0]) for line in requires if "extra ==" not in line]
    return set(EXPECTED).union(*(modules.get(name, set()) for name in seen), {"pip", "setuptools", "pkg_resources"})


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Hider:
    """Finds modules as Python does, those of this environment only if the GPU machine has them."""

    def __init__(self, expected: set[str]) -> None:
        self.expected = expected

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if path is None and name not in self.expected:
            path = [entry for entry in sys.path if Path(entry).resolve() != SITE]
        return PathFinder.find_spec(name, path, target)

    find_distributions = staticmethod(PathFinder.find_distributions)
    invalidate_caches = staticmethod(PathFinder.invalidate_caches)


def hide() -> None:
    """From here on in this process."""
    expected = os.environ.get("GPU_KIT_EXPECTED") or ",".join(sorted(expected_modules()))
    os.environ["GPU_KIT_EXPECTED"] = expected
    sys.meta_path[sys.meta_path.index(PathFinder)] = Hider(set(expected.split(",")))


def main() -> None:
    """Hide, here and in all that is started from here, and run the script."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-kit-rehearsal-"))
    # Python imports this module at each start.
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport rehearse\nrehearse.hide()\n"
    )
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    hide()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
