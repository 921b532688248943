"""A run's folder before anything is loaded: whether it can be written, and whether its checkpoints will fit the disk."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from fastvideo_grpo.checkpoints.lock import lock_folder
from fastvideo_grpo.checkpoints.store import SPARE, CheckpointStore
from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.disk.room import Refusal, free_bytes, refusal, refused_file
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.printed_sizes import gib

_FOLDERS = ("checkpoints", "samples")
_FILES = ("config.yaml", "lock", "metrics.jsonl", "evaluation_before.json")


def run_store(config: Config) -> CheckpointStore:
    """The checkpoints of ``run.dir``, as one process sees them."""
    return CheckpointStore(Path(config.run.dir) / "checkpoints", config.run.keep)


def refused(config: Config) -> Refusal | None:
    """Why ``run.dir`` cannot be written, or something in it that a run writes; None if all can. Nothing is changed."""
    folder = Path(config.run.dir)
    tried = [refusal(folder)]
    if tried[0] is None:
        tried += [refusal(path) for path in map(folder.joinpath, _FOLDERS) if path.is_symlink() or path.exists()]
        tried += [refused_file(folder / name) for name in _FILES]
    return next((answer for answer in tried if answer is not None), None)


def make_writable(config: Config) -> None:
    """Refuse a ``run.dir`` that cannot be written. Of a full disk what killed saves left, and the checkpoints beyond
    ``run.keep``, are removed first.

    Raises:
        ConfigError: it cannot; says why, and what would help.
        UserError: another process trains there.
    """
    answer = refused(config)
    store = run_store(config)
    if answer is not None and answer.full and store.folder.is_dir():
        with closing(lock_folder(Path(config.run.dir))):
            store.clean()
            if refused(config) is not None:
                store.make_room()
        answer = refused(config)
    if answer is not None:
        raise ConfigError(not_written(config, answer))


def not_written(config: Config, answer: Refusal) -> str:
    """A line for the user."""
    there = run_store(config).iterations() if answer.full else []
    lower = f", start it with run.keep=1, for which {', '.join(map(str, there[:-1]))} would go" if len(there) > 1 else ""
    repair = f"free space there{lower if config.run.keep > 1 else ''}" if answer.full else "repair it"
    return f"run.dir={config.run.dir} cannot be written: {answer.reason}; {repair}, or choose another run.dir"


@dataclass(frozen=True)
class CheckpointRoom:
    """How many checkpoints a disk holds, and how many a run asks for.

    Attributes:
        each: bytes of a checkpoint.
        free: bytes that are free, or held by what killed saves left.
        there: how many are there.
        to_come: how many the run will save yet.
        keep: ``run.keep``.
    """

    each: int
    free: int
    there: int
    to_come: int
    keep: int

    @property
    def fit(self) -> int:
        """How many there can be, those that are there among them."""
        return self.there + max(0, self.free - SPARE) // self.each

    @property
    def needed(self) -> int:
        """How many must fit, so that the run can save: beside the next one what is within ``keep`` stays, and the newest."""
        if self.to_come == 0:
            return 0
        return max(min(self.there, max(1, self.keep - 1)) + 1, min(2, self.there + self.to_come))

    @property
    def wanted(self) -> int:
        """How many there are at most while one is saved."""
        return min(self.keep + 1, self.there + self.to_come) if self.to_come else 0


def checkpoint_room(config: Config, each: int) -> CheckpointRoom:
    """What the disk of ``run.dir`` holds of checkpoints of ``each`` bytes. Nothing is changed.

    Raises:
        OSError: the disk cannot be asked.
    """
    run, store = config.run, run_store(config)
    there = store.iterations()
    done = there[-1] if there else 0
    saves = run.iterations // run.save_every - done // run.save_every + (run.iterations % run.save_every > 0)
    free = free_bytes(Path(run.dir)) + store.leftover_bytes()
    return CheckpointRoom(each, free, len(there), saves if done < run.iterations else 0, run.keep)


def room_problem(config: Config, room: CheckpointRoom) -> str | None:
    """Why the run could not save, and ways out; None if it can."""
    if room.fit >= room.needed:
        return None
    ways_out = ["free space there", "choose a run.dir on another disk"]
    if room.keep > room.fit >= 2:
        ways_out.append(f"set run.keep={room.fit}")
    if config.model.lora is None:
        ways_out.append("train LoRA (model.lora.rank), whose checkpoints are small")
    more = f"{room.needed - room.there} more" if room.there else str(room.needed)
    return (
        f"run.dir={config.run.dir}: a checkpoint takes {gib(room.each)}, and its disk has {gib(room.free)} free, where {more} "
        f"must fit (the newest stays until the next is whole); {', '.join(ways_out[:-1])}, or {ways_out[-1]}"
    )


def room_caution(config: Config, room: CheckpointRoom) -> str | None:
    """What becomes of ``run.keep`` where not all of them fit; None if they do, or if :func:`room_problem` says more."""
    if room.fit >= room.wanted or room.fit < room.needed:
        return None
    known = (
        f"run.keep={room.keep}: while one is saved there are {room.wanted} checkpoints of {gib(room.each)}, and {room.fit} fit "
        f"the disk of run.dir={config.run.dir} ({gib(room.free)} are free): "
    )
    if room.fit >= room.keep:
        return known + "the oldest goes before a save, not after it"
    return known + f"saving will fail when they are there; set run.keep={room.fit}, or free space there"
