"""`fastvideo-grpo doctor`: what is installed, what it would run on, what is missing and the command that repairs it.

FastVideo itself is not imported: that takes 10 seconds and more, and fails in the cases that this command is for.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from fastvideo_grpo import __version__, patching
from fastvideo_grpo.printed_commands import runnable

DISTRIBUTION = "fastvideo-grpo"
REINSTALL = "make env, or pip install --no-deps -r requirements/lock.txt"
_GIB = 1024**3


@dataclass
class Report:
    """What was found: lines to show, and problems with the command that repairs each (empty if the text names it)."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def add(self, what: str, found: str) -> None:
        self.lines.append((what, found))

    def missing(self, what: str, repair: str) -> None:
        self.problems.append((what, repair))


def installed_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine() -> Report:
    """Look at this machine and environment. Nothing is changed, nothing is raised."""
    report = Report()
    report.add("fastvideo-grpo", __version__)
    report.add("python", f"{platform.python_version()} ({sys.executable})")
    _packages(report)
    _machine(report)
    _torch(report)
    _patches(report)
    disk = shutil.disk_usage(Path.cwd())
    report.add("disk free", f"{disk.free / _GIB:.1f} of {disk.total / _GIB:.1f} GiB in {Path.cwd()}")
    return report


def _packages(report: Report) -> None:
    """Versions of what this package requires, held against what it asks for."""
    try:
        from packaging.requirements import Requirement

        required = importlib.metadata.requires(DISTRIBUTION) or []
    except ImportError as error:  # PackageNotFoundError is one
        report.missing(f"the installed package or `packaging` ({error})", REINSTALL)
        return
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        report.add(requirement.name, version or "missing")
        if version is None:
            report.missing(f"{requirement.name} is not installed", REINSTALL)
        elif not requirement.specifier.contains(version, prereleases=True):
            report.missing(f"{requirement.name} is {version}; needed is {requirement.specifier}", REINSTALL)


def _machine(report: Report) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / _GIB:.0f} GiB of memory"
    report.add("CPU", f"{cores} cores{memory}, {platform.machine()}")


def _torch(report: Report) -> None:
    """Devices, attention backend and distributed backends, as torch sees them."""
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        if installed_version("torch") is not None:
            report.missing(f"torch does not import: {error}", REINSTALL)
        return
    cuda = torch.cuda.is_available()
    if not cuda:
        report.add("GPU", "none; everything runs on the CPU")
    for index in range(torch.cuda.device_count() if cuda else 0):
        properties = torch.cuda.get_device_properties(index)
        report.add(f"GPU {index}", f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB")
    flash = installed_version("flash-attn")
    if flash is None:
        report.add("attention", "sdpa; flash-attn is not installed (optional: pip install fastvideo-grpo[flash])")
    else:
        report.add("attention", f"flash (flash-attn {flash}) and sdpa" if cuda else f"sdpa; flash-attn {flash} needs a GPU")
    backends = {
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": dist.is_available() and dist.is_nccl_available() and cuda,
    }
    report.add("distributed", ", ".join(name for name, there in backends.items() if there) or "none")
    needed = "nccl" if cuda else "gloo"
    if not backends[needed]:
        report.missing(f"torch was built without {needed}", REINSTALL)


def _patches(report: Report) -> None:
    try:
        patching.require_patched()
    except (patching.PatchError, OSError) as error:
        report.add("patches", "not applied")
        report.missing(str(error), "")  # a PatchError names the command that fits
    else:
        report.add("patches", "applied")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`fastvideo-grpo doctor` takes no arguments; here so that every command is wired alike."""


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 1 when something needed is missing, else 0."""
    report = examine()
    width = max(len(what) for what, _ in report.lines)
    for what, found in report.lines:
        print(f"{what:{width}}  {found}")
    print()
    for what, repair in report.problems:
        print(runnable(f"missing: {what}" + (f"\n  repair: {repair}" if repair else "")))
    if not report.problems:
        print("Nothing is missing.")
    return 1 if report.problems else 0
