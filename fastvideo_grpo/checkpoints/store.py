"""Checkpoints on disk.

    FOLDER/000100/trainer.json     iteration, versions, sha256 of every other file, and what the trainer adds
    FOLDER/000100/...              whatever the trainer wrote
    FOLDER/.saving-000100/         being written; never read
    FOLDER/.replaced-000100/       an older 000100, out of the way for the moment of a rename
    FOLDER/.removing-000050/       being deleted

They appear by rename when complete, and are verified by checksum when read.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvideo_grpo.disk.durable_files import sync_directory, write_synced
from fastvideo_grpo.disk.room import Refusal, describe, folder_bytes, free_bytes
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.printed_sizes import gib

logger = logging.getLogger(__name__)

TRAINER_JSON = "trainer.json"
SPARE = 1 << 20
"""Bytes of a disk that are left to what else is written."""

_LEFT = (".saving-", ".removing-")
_RESERVED = ("iteration", "versions", "checksums", "checksum")
_PACKAGES = ("fastvideo-grpo", "fastvideo", "torch", "deepspeed", "diffusers", "transformers", "safetensors", "numpy")


class CheckpointError(UserError):
    """A checkpoint that was asked for is missing, damaged or unreadable."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they lie; the same folder on every rank (a shared file system when there are several machines).
        keep: how many to keep, at least 1.
        world: the processes of the run; every method but `iterations` and `load_trainer_json` is called by all of them
            together.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int, world: World | None = None) -> None:
        if keep < 1:
            raise ValueError(f"run.keep is {keep}; at least 1 checkpoint must be kept")
        self.folder = Path(folder)
        self.keep = keep
        self.world = world or World()
        self._damaged: set[int] = set()
        self._written = 0  # bytes on the disk when the last save was refused; rank 0 knows

    def path(self, iteration: int) -> Path:
        """Where the checkpoint of an iteration lies, or would lie."""
        return self.folder / f"{iteration:06d}"

    def iterations(self) -> list[int]:
        """Iterations of the complete checkpoints, rising. They are not verified."""
        if not self.folder.is_dir():
            return []
        names = [entry.name for entry in self.folder.iterdir() if entry.name.isdecimal() and entry.is_dir()]
        return sorted(int(name) for name in names if self.path(int(name)).name == name)  # others' folders may be numbers, too

    def all_damaged(self) -> str:
        """What is said where there are checkpoints, and none is whole."""
        return f"every checkpoint in {self.folder} is damaged; to start over, choose another run.dir or move the folder away"

    def save(self, iteration: int, write: Callable[[Path], dict[str, Any] | None]) -> bool:
        """Write the checkpoint of `iteration`; afterwards remove the oldest beyond `keep`, or before where the disk has no
        room else (:meth:`make_room`).

        Args:
            iteration: number of finished iterations.
            write: called on every rank with the same folder, which is empty; writes files of names no other rank uses.
                What rank 0 returns goes into trainer.json. An OSError it raises must not leave other ranks waiting
                inside it (`Engine.save` exchanges nothing). Called a second time if the disk was full and old checkpoints
                could go.

        Returns:
            True when the checkpoint is there. False when the disk refused (full, over quota, read-only): the partial
            folder is removed, earlier checkpoints stay, the error is logged, and the run can go on and save again
            later.
        """
        free = self._free_bytes()
        if self.world.broadcast_object(free < 1.02 * self.next_bytes() + SPARE):
            self.make_room(iteration, free)
        failure = self._attempt(iteration, write)
        # Quotas are not seen in the free space, but in how far writing came.
        if failure is not None and failure.full and self.make_room(iteration, self._written):
            failure = self._attempt(iteration, write)
        if failure is not None:
            if self.world.rank == 0:
                self._report(iteration, failure)
            self.world.barrier()
            return False
        self._damaged.discard(iteration)
        if self.world.rank == 0:
            self._remove(self._older(iteration, self.keep - 1))
        self.world.barrier()
        return True

    def make_room(self, saving: int | None = None, free: int = 0) -> list[int]:
        """Remove what is beyond `keep`, the checkpoint of iteration `saving` that will come (None: the next) counted among
        the kept. Nothing goes unless a newer one's checksums hold, which stays, so with `keep=1` two are there in the end; or
        if what goes and the `free` bytes would not do for the next.

        Returns:
            Iterations of those that are gone.
        """
        kept = max(1, self.keep - 1)
        enough = self.world.rank == 0 and self._would_do(self._older(saving, kept), free)
        if not self.world.broadcast_object(enough):
            return []
        if self.newest() is None:  # from here on damaged ones are known
            return []
        gone: list[int] = []
        if self.world.rank == 0:
            surplus = self._older(saving, kept)
            gone = self._remove(surplus) if self._would_do(surplus, free) else []
            if gone:
                logger.warning(
                    "checkpoints %s, beyond run.keep=%d, were removed before the next is saved: the disk of %s has no room",
                    _listed(gone),
                    self.keep,
                    self.folder,
                )
        return self.world.broadcast_object(gone)

    def _would_do(self, surplus: list[int], free: int) -> bool:
        """Whether the next checkpoint is likely to fit when these are gone: one in the place of one is."""
        freed = sum(folder_bytes(self.path(number)) for number in surplus)
        return bool(surplus) and free + freed >= 0.98 * self.next_bytes()

    def next_bytes(self) -> int:
        """What the next checkpoint will take, by those that are there; 0 if none are."""
        return max((folder_bytes(self.path(number)) for number in self.iterations()), default=0)

    def leftover_bytes(self) -> int:
        """What :meth:`clean` gives back."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sum(folder_bytes(entry) for entry in found if entry.name.startswith(_LEFT))

    def _free_bytes(self) -> int:
        """Free bytes of the disk, the same answer on every rank; an ample number where it cannot be asked."""
        free = 1 << 60
        if self.world.rank == 0:
            with suppress(OSError):  # saving will meet it, and say so
                free = free_bytes(self.folder)
        return self.world.broadcast_object(free)

    def _attempt(self, iteration: int, write: Callable[[Path], dict[str, Any] | None]) -> Refusal | None:
        """Write, hash and publish a checkpoint; after a refusal nothing of it is left."""
        target = self.path(iteration)
        partial = self.folder / f".saving-{target.name}"
        refused = self._on_rank_0(lambda: self._make_partial(partial))
        content: dict[str, Any] | None = None
        if refused is None:
            local = None
            try:
                content = write(partial)
            except OSError as failure:
                local = Refusal.of(failure)
            refused = self._agree(local)
        checksums: dict[str, str] = {}
        if refused is None:
            checksums, refused = self._seal(partial)
        if refused is None:
            refused = self._on_rank_0(lambda: self._publish(partial, target, iteration, content or {}, checksums))
        if refused is not None:
            if self.world.rank == 0:
                self._written = folder_bytes(partial)
                shutil.rmtree(partial, ignore_errors=True)
            self.world.barrier()
        return refused

    def _report(self, iteration: int, refused: Refusal) -> None:
        """Tell that a checkpoint was not saved, why, and what would help."""
        there, size = self.iterations(), self.next_bytes()
        if not refused.full:
            way_out = f"repair what is wrong with {self.folder}"
        else:
            way_out = f"free space on the disk of {self.folder}" + (f" ({gib(size)} are needed)" if size else "")
            if self.keep > 1 and self._would_do(there[:-1], self._written):
                way_out += f", or start it again with run.keep=1, for which {_listed(there[:-1])} would go,"
            elif there:
                way_out += f" (that of {there[-1]} stays until the next one is whole)"
        logger.error(
            "checkpoint %s was not saved: %s. Checkpoints still there: %s. The run goes on; %s before the next save.",
            self.path(iteration).name,
            refused.reason,
            _listed(there),
            way_out,
        )

    def newest(self, required: bool = False) -> Path | None:
        """The newest checkpoint whose checksums hold. Damaged ones are named in a warning, left as they are, and
        skipped.

        Args:
            required: raise instead of returning None.

        Raises:
            CheckpointError: `required`, and none is whole.
        """
        found = self.world.broadcast_object(self.iterations())
        for iteration in reversed(found):
            problem = self._verify(iteration)
            if problem is None:
                self._damaged.discard(iteration)
                return self.path(iteration)
            self._damaged.add(iteration)
            if self.world.rank == 0:
                logger.warning("checkpoint %s is damaged and skipped: %s", self.path(iteration), problem)
        if required:
            state = f"{len(found)} found, all damaged ({', '.join(map(str, found))})" if found else "none found"
            raise CheckpointError(f"no whole checkpoint in {self.folder}: {state}; check run.dir, or start without resuming")
        return None

    def at(self, iteration: int) -> Path:
        """The checkpoint of one iteration, verified.

        Raises:
            CheckpointError: it is missing or damaged; names the file and what is there instead.
        """
        found = self.world.broadcast_object(self.iterations())
        if iteration not in found:
            there = ", ".join(map(str, found)) or "none"
            raise CheckpointError(f"no checkpoint of iteration {iteration} in {self.folder}; there are: {there}")
        problem = self._verify(iteration)
        if problem is not None:
            others = ", ".join(str(number) for number in found if number != iteration) or "none"
            raise CheckpointError(f"checkpoint {self.path(iteration)} is damaged: {problem}; others: {others}")
        return self.path(iteration)

    def clean(self) -> None:
        """Remove what killed saves left behind. Call it once at the start of a run, when nobody is saving."""
        self.world.on_rank_0(self._clean)

    def _clean(self) -> None:
        for entry in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if entry.name.startswith(".replaced-"):
                target = self.folder / entry.name.removeprefix(".replaced-")
                if target.exists():
                    shutil.rmtree(entry)
                else:  # killed between the two renames: the older one is the only one
                    os.rename(entry, target)
            elif entry.name.startswith(_LEFT):
                shutil.rmtree(entry)

    def _make_partial(self, partial: Path) -> None:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)

    def _seal(self, partial: Path) -> tuple[dict[str, str], Refusal | None]:
        """Hash every file and push it to the disk; the files are dealt over ranks."""
        names = self.world.broadcast_object(_files(partial) if self.world.rank == 0 else None)
        share: dict[str, str] = {}
        local = None
        try:
            for name in names[self.world.rank :: self.world.size]:
                share[name] = _sha256(partial / name, sync=True)
        except OSError as failure:
            local = Refusal.of(failure)
        checksums: dict[str, str] = {}
        for part in self.world.all_gather_object(share):
            checksums.update(part)
        return dict(sorted(checksums.items())), self._agree(local)

    def _publish(self, partial: Path, target: Path, iteration: int, content: dict[str, Any], checksums: dict[str, str]) -> None:
        clash = [key for key in _RESERVED if key in content]
        if clash:
            raise ValueError(f"trainer.json keys {clash} are written by the store; give them other names")
        document = {**content, "iteration": iteration, "versions": _versions(), "checksums": checksums}
        document["checksum"] = _document_checksum(document)
        write_synced(partial / TRAINER_JSON, json.dumps(document, indent=1).encode())
        for directory in sorted({(partial / name).parent for name in checksums} | {partial}):
            sync_directory(directory)
        replaced = self.folder / f".replaced-{target.name}"
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(target, replaced)
        try:
            os.rename(partial, target)
        except OSError:
            if replaced.exists():
                os.rename(replaced, target)
            raise
        sync_directory(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _older(self, saved: int | None, kept: int) -> list[int]:
        """Iterations of the checkpoints before `saved` (None: all) that are beyond the newest `kept` of them."""
        # Known damaged ones do not count as kept: `keep` promises usable checkpoints.
        older = [n for n in self.iterations() if (saved is None or n < saved) and n not in self._damaged]
        return older[: max(0, len(older) - kept)]

    def _remove(self, numbers: list[int]) -> list[int]:
        """Remove checkpoints; returns those that are gone."""
        gone = []
        for number in numbers:
            removing = self.folder / f".removing-{number:06d}"
            try:
                os.rename(self.path(number), removing)
                shutil.rmtree(removing)
                gone.append(number)
            except OSError as failure:
                left = removing if removing.exists() else self.path(number)
                logger.warning("old checkpoint %s could not be removed (%s); remove it by hand", left, describe(failure))
        return gone

    def _verify(self, iteration: int) -> str | None:
        """What is wrong with a checkpoint, the same answer on every rank; None when it is whole."""
        folder = self.path(iteration)
        document: dict[str, Any] | None = None
        problem = None
        if self.world.rank == 0:
            try:
                document = self.load_trainer_json(folder)
            except CheckpointError as failure:
                problem = str(failure)
        document, problem = self.world.broadcast_object((document, problem))
        if document is None:
            return problem
        names = sorted(document["checksums"])
        for name in names[self.world.rank :: self.world.size]:
            expected = document["checksums"][name]
            try:
                found = _sha256(folder / name)
            except OSError as failure:
                found = describe(failure)
            if found != expected:
                problem = f"{name}: sha256 expected {expected}, found {found}"
                break
        return next((answer for answer in self.world.all_gather_object(problem) if answer), None)

    @staticmethod
    def load_trainer_json(folder: str | os.PathLike[str]) -> dict[str, Any]:
        """trainer.json of one checkpoint folder: what the trainer wrote, and `iteration`, `versions`, `checksums`,
        `checksum`.

        Raises:
            CheckpointError: it is missing, is not JSON, or does not match its own checksum.
        """
        path = Path(folder) / TRAINER_JSON
        try:
            document = json.loads(path.read_bytes())
        except OSError as failure:
            raise CheckpointError(f"{path} cannot be read: {describe(failure)}; choose another checkpoint") from failure
        except ValueError as failure:
            raise CheckpointError(f"{path} is not JSON ({failure}); choose another checkpoint") from failure
        if not isinstance(document, dict) or any(key not in document for key in _RESERVED):
            raise CheckpointError(f"{path} lacks one of {', '.join(_RESERVED)}; it was not written by a checkpoint store")
        expected = document["checksum"]
        found = _document_checksum(document)
        if found != expected:
            raise CheckpointError(f"{path}: sha256 expected {expected}, found {found}; choose another checkpoint")
        return document

    def _on_rank_0(self, action: Callable[[], None]) -> Refusal | None:
        """Run on rank 0; the disk's refusal, on every rank, or None."""
        local = None
        if self.world.rank == 0:
            try:
                action()
            except OSError as failure:
                local = Refusal.of(failure)
        return self._agree(local)

    def _agree(self, local: Refusal | None) -> Refusal | None:
        """The first rank's refusal, on every rank."""
        for rank, refused in enumerate(self.world.all_gather_object(local)):
            if refused is not None:
                return Refusal(f"rank {rank}: {refused.reason}", refused.full) if self.world.size > 1 else refused
        return None


def _files(folder: Path) -> list[str]:
    return sorted(entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.is_file())


def _sha256(path: Path, sync: bool = False) -> str:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
    return digest


def _document_checksum(document: dict[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "checksum"}
    # Through JSON once, so that tuples, integer keys and the like hash as they will be read back.
    return hashlib.sha256(json.dumps(json.loads(json.dumps(rest)), sort_keys=True).encode()).hexdigest()


def _listed(iterations: list[int]) -> str:
    return ", ".join(map(str, iterations)) or "none"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
