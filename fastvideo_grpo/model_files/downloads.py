"""Where published models are to be had, and which of their files are needed: what README, scripts and errors print."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Download:
    """Files of a Hugging Face repository.

    Attributes:
        repository: its name.
        folder: where recipes look for them.
        gigabytes: (1e9 bytes) of the files that are needed; None: not known.
        whole: of all files of the repository, where that is more.
        files: names of single files; none: all, as ``include`` and ``exclude`` say.
        include, exclude: patterns of names.
        inside: the folder below ``folder`` that they go to.
        gated: its terms have to be accepted on its page first.
    """

    repository: str
    folder: str
    gigabytes: float | None = None
    whole: float | None = None
    files: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    inside: str = ""
    gated: bool = False

    def command(self, folder: str | Path | None = None) -> str:
        """The command line that fetches them.

        Args:
            folder: another than the recipes'.
        """
        words = ["hf", "download", self.repository, *self.files]
        for flag, patterns in (("--include", self.include), ("--exclude", self.exclude)):
            words += [word for pattern in patterns for word in (flag, pattern)]
        return shlex.join([*words, "--local-dir", str(Path(folder or self.folder) / self.inside)])


@dataclass(frozen=True)
class Source:
    """What makes up a model's folder.

    Attributes:
        downloads: into the same folder.
        edit: a command that runs behind them, with ``{folder}`` in it; "": none.
    """

    downloads: tuple[Download, ...]
    edit: str = ""

    @classmethod
    def of(cls, repository: str, folder: str, *arguments: Any, **settings: Any) -> Source:
        """One :class:`Download`, of these arguments."""
        return cls((Download(repository, folder, *arguments, **settings),))

    @property
    def folder(self) -> str:
        """Where recipes look for it."""
        return self.downloads[0].folder

    def commands(self, folder: str | Path | None = None) -> list[str]:
        """The command lines that make the folder, in their order."""
        lines = [part.command(folder) for part in self.downloads]
        return lines + ([self.edit.format(folder=shlex.quote(str(folder or self.folder)))] if self.edit else [])

    def advice(self, folder: str | Path | None = None) -> str:
        """How to get it, for the end of an error: the commands as one line, and how much they fetch."""
        known = [part.gigabytes for part in self.downloads if part.gigabytes is not None]
        whole = sum(part.whole or part.gigabytes or 0.0 for part in self.downloads)
        notes = [f"{sum(known):.3g} GB" + (f" of {whole:.3g}" if whole > sum(known) else "")] if known else []
        notes += ["after you accepted its terms on its page and ran hf auth login"] * any(part.gated for part in self.downloads)
        return " && ".join(self.commands(folder)) + (f" ({'; '.join(notes)})" if notes else "")
