"""``make gpu-kit``: one folder for a machine that has a GPU, torch with CUDA, and no network.

    python benchmarks/gpu_kit/make.py [--python 3.12] [--out runs/gpu-kit]

Into the folder go the checkout as it is committed, the wheels that such a machine lacks for this Python (versions of
requirements/lock.txt; below 60 MB in all), and run.sh, which unpacks the wheels beside the checkout, patches FastVideo and runs
a command, benchmarks/gpu.sh by default. What it takes for granted there: torch with CUDA, pip, and ``EXPECTED``.

PyAV, 36 MB, is left out: a module in its place says so where an mp4 would be written.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60e6
WHEELS = (
    "fastvideo",
    "diffusers",
    "transformers",
    "tokenizers",
    "deepspeed",
    "omegaconf",
    "datasets",
    "dill",
    "multiprocess",
    "ftfy",
    "jsonschema",
    "jsonschema-specifications",
    "referencing",
    "rpds-py",
    "torchdata",
    "remote-pdb",
    "googleapis-common-protos",
    "cloudpickle",
    "imageio",
    "hjson",
    "py-cpuinfo",
    "wcwidth",
    "pydantic",
    "pydantic-core",
    "typing-inspection",
    "typing-extensions",
    "annotated-types",
    "sentencepiece",
)
"""What a machine lacked that had torch with CUDA (docs/performance.md)."""
EXPECTED = (
    "torch",
    "torchvision",
    "numpy",
    "PIL",
    "yaml",
    "safetensors",
    "huggingface_hub",
    "einops",
    "scipy",
    "psutil",
    "requests",
    "tqdm",
    "regex",
    "httpx",
    "pandas",
    "pyarrow",
    "aiohttp",
    "google",
    "cv2",
    "packaging",
    "pytest",
)
"""Modules that the machine has, besides what those need."""
RUN = """#!/usr/bin/env bash
# Unpack the wheels, patch FastVideo, and run a command of the checkout: benchmarks/gpu.sh, or what is given.
#   PYTHON   an interpreter with torch and CUDA (python3)
#   DEVICE=cpu bash run.sh     the same steps at tiny sizes on a CPU
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHON=${PYTHON:-python3}
if [ ! -f "$here/site/.ready" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$here/site" "$here"/wheels/*.whl
  if ! "$PYTHON" -c 'import av' 2>/dev/null; then cp -r "$here/stand_ins/av" "$here/site/"; fi
fi
export PYTHONPATH=$here/checkout:$here/site${PYTHONPATH:+:$PYTHONPATH}
if [ ! -f "$here/site/.ready" ]; then
  "$PYTHON" -m fastvideo_grpo.cli patch apply
  touch "$here/site/.ready"
fi
cd "$here/checkout"
if [ $# -gt 0 ]; then exec "$@"; fi
exec bash benchmarks/gpu.sh "$here/results"
"""
STAND_IN = '''"""In PyAV's place, which the GPU kit leaves out for its size; it can be imported, no more."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(f"av.{name}: PyAV is not on this machine (the GPU kit leaves it out); pip install av")
'''


def main() -> None:
    """Make the folder, say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="of the GPU machine (3.12)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-kit", help="the folder (runs/gpu-kit)")
    arguments = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", arguments.python):
        parser.error(f"--python is {arguments.python}; it is a version like 3.12")
    out = arguments.out
    if out.exists() and not (out / "run.sh").exists():
        parser.error(f"--out {out} is there and is no GPU kit; name another folder")
    shutil.rmtree(out, ignore_errors=True)
    (out / "wheels").mkdir(parents=True)
    print(f"wheels for Python {arguments.python}", flush=True)
    download(arguments.python, out / "wheels")
    checkout(out / "checkout")
    (out / "stand_ins" / "av").mkdir(parents=True)
    (out / "stand_ins" / "av" / "__init__.py").write_text(STAND_IN)
    (out / "run.sh").write_text(RUN)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    count = len(list((out / "wheels").iterdir()))
    print(f"{out}: {count} wheels and the checkout, {size / 1e6:.1f} MB; on the GPU machine: bash run.sh")
    if size > LIMIT:
        sys.exit(f"that is more than {LIMIT / 1e6:.0f} MB")


def locked(python: str) -> dict[str, str]:
    """Package -> version in requirements/lock.txt, for this Python on Linux."""
    from packaging.requirements import Requirement

    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    environment |= {"platform_machine": "x86_64", "platform_system": "Linux", "implementation_name": "cpython"}
    found = {}
    for line in (ROOT / "requirements" / "lock.txt").read_text().splitlines():
        line = line.split("#")[0].strip()
        if not line or line.startswith("-"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            found[requirement.name.lower()] = str(requirement.specifier).removeprefix("==")
    return found


def download(python: str, folder: Path) -> None:
    """The wheels, and those of what is published as source alone and of this project (for its metadata)."""
    versions = locked(python)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wanted = [f"{name}=={versions[name]}" for name in WHEELS if name != "deepspeed"]
    target = ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp"]
    for tag in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"):
        target += ["--platform", tag]
    subprocess.run([*pip, "download", "--no-deps", *target, "--dest", folder, *wanted], check=True)
    # Its extensions are compiled when they are first used; none is here.
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([*build, f"deepspeed=={versions['deepspeed']}"], check=True, env=environment, stdout=subprocess.DEVNULL)
    subprocess.run([*build, str(ROOT)], check=True, stdout=subprocess.DEVNULL)


def checkout(folder: Path) -> None:
    """The project as it is committed."""
    folder.mkdir()
    with tempfile.TemporaryFile() as archive:
        subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=archive, check=True)
        archive.seek(0)
        with tarfile.open(fileobj=archive) as files:
            files.extractall(folder, filter="data")


if __name__ == "__main__":
    main()
