"""Packaging: metadata, extras and the console script.

Tool settings are in pyproject.toml, locked versions in requirements/.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    lines = (
        line.split("#")[0].strip() for line in (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    )
    return [line for line in lines if line]


class BuildWithResources(build_py):
    """Copies patches/ and data/ into the built package; in a checkout they are used where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in ("patches", "data"):
            if (ROOT / folder).is_dir():
                shutil.copytree(ROOT / folder, Path(self.build_lib) / "fastvideo_grpo" / folder, dirs_exist_ok=True)


version = re.search(r'__version__ = "(.+)"', (ROOT / "fastvideo_grpo" / "__init__.py").read_text(encoding="utf-8"))
assert version is not None
readme = ROOT / "README.md"

setup(
    name="fastvideo-grpo",
    version=version[1],
    description="GRPO reinforcement learning for image and video generators, on FastVideo",
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["fastvideo_grpo", "fastvideo_grpo.*"]),
    cmdclass={"build_py": BuildWithResources},
    install_requires=requirements("base.in"),
    extras_require={"flash": ["flash-attn"], "dev": requirements("dev.in")},
    entry_points={"console_scripts": ["fastvideo-grpo = fastvideo_grpo.cli:main"]},
)
