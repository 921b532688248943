"""What set-up rests on: a lock of names and versions, and nothing that belongs to one machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"


def _lines(name: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (REQUIREMENTS / name).read_text().splitlines())
    return [line for line in lines if line]


def test_the_lock_has_names_and_versions_only():
    for line in (REQUIREMENTS / "lock.txt").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9._-]+==[A-Za-z0-9.+!]+( ; [a-z_]+ [^@:]+)?", line), line


def test_the_lock_holds_what_is_asked_for():
    locked = {line.split("==")[0] for line in _lines("lock.txt")}
    for line in _lines("base.in") + _lines("dev.in"):
        assert re.split(r"[^A-Za-z0-9_-]", line)[0].lower() in locked, line


def test_packages_that_the_overrides_remove_are_not_in_the_lock():
    removed = [line.split(";")[0].strip() for line in _lines("overrides.txt") if "'never'" in line]
    assert removed == ["fastvideo-kernel", "flashinfer-python"]
    lock = _lines("lock.txt")
    assert not any("never" in line for line in lock)
    assert not {line.split("==")[0] for line in lock} & set(removed)


def test_the_installed_metadata_is_that_of_setup_py():
    show = "import sys; sys.argv = ['setup.py', '--name', '--version']; exec(open('setup.py').read())"
    code = show.replace("exec(", "__file__ = 'setup.py'; exec(")
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    from fastvideo_grpo import __version__

    assert shown.split()[-2:] == ["fastvideo-grpo", __version__]


def test_make_says_which_python_it_needs(tmp_path):
    """On a bare machine with an older Python, `make env` stops before it makes anything."""
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "-f", str(ROOT / "Makefile"), "env", f"PYTHON={old}"]
    for name in ("requirements", "setup.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode != 0
    assert "Python 3.11 or newer is needed" in made.stderr and "Python 3.9.1" in made.stderr
    assert not (tmp_path / ".venv").exists()
