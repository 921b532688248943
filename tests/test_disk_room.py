"""Disks that are full, read only or too small: a line before anything is loaded, in the dry run, too; nothing left behind."""

import errno
import os
import re
import tempfile

import pytest

from fastvideo_grpo.checkpoints import folder
from fastvideo_grpo.checkpoints.folder import CheckpointRoom, room_caution, room_problem
from fastvideo_grpo.checkpoints.store import CheckpointStore
from fastvideo_grpo.disk import room as disk_room
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.models import run_config
from tests.test_checkpoint_store import SmallDisk


def everything(path):
    return sorted((str(entry), entry.lstat().st_mtime_ns) for entry in path.rglob("*"))


@pytest.fixture
def refuse(monkeypatch):
    """Disks answer with an error wherever a file is tried."""

    def with_error(number):
        def refused(dir):
            raise OSError(number, os.strerror(number), f"{dir}/tmp1234")

        monkeypatch.setattr(tempfile, "TemporaryFile", refused)

    return with_error


def in_the_way(path, what):
    """Makes `path` something that cannot be a folder's parent, or cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if what == "a file":
        path.write_text("mine")
    elif what == "a link":
        path.symlink_to("nowhere")
    elif what == "too long":
        return path / ("x" * 300)
    return path


@pytest.mark.parametrize("below", ["", "deep/er"])
@pytest.mark.parametrize("what, why", [("a file", "a file, not a folder"), ("a link", "a link to nowhere, which is not there")])
def test_what_is_in_the_way_of_a_folder_is_named(tmp_path, what, why, below):
    path = in_the_way(tmp_path / "there", what)
    before = everything(tmp_path)
    answer = disk_room.refusal(path / below)
    assert why in answer.reason and str(path) in answer.reason and not answer.full
    assert everything(tmp_path) == before


def test_a_folder_is_tried_where_it_will_be_and_nothing_is_left(tmp_path):
    for path in (tmp_path, tmp_path / "new" / "newer"):
        assert disk_room.refusal(path) is None and not list(tmp_path.iterdir())
    assert "File name too long" in disk_room.refusal(tmp_path / ("x" * 300) / "run").reason
    assert disk_room.refusal(disk_room.Path("/proc/1/run")) is not None


@pytest.mark.parametrize(
    "number, full", [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EROFS, False), (errno.EACCES, False)]
)
def test_what_the_disk_answers_is_told_with_the_folder_that_is_there(tmp_path, refuse, number, full):
    refuse(number)
    answer = disk_room.refusal(tmp_path / "runs" / "mine")
    assert answer.reason == f"{os.strerror(number)} ({tmp_path})" and answer.full == full


def a_config(tmp_path, **run):
    values = {"model": {"kind": "flux", "path": "unused"}, "prompts": {"path": "unused"}}
    values |= {"rewards": {"models": {"size": {"kind": "jpeg_size"}}}, "run": {"dir": str(tmp_path / "run"), **run}}
    return run_config.build(values)


@pytest.mark.parametrize(
    "name, makes", [("config.yaml", "mkdir"), ("metrics.jsonl", "mkdir"), ("checkpoints", "touch"), ("samples", "touch")]
)
def test_what_lies_in_run_dir_in_the_way_is_named(tmp_path, name, makes):
    config = a_config(tmp_path)
    (tmp_path / "run").mkdir()
    getattr(tmp_path / "run" / name, makes)()
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match=rf"run\.dir=.*cannot be written: a f.*, not a f.*\(.*{name}\); repair it, or choose"):
        folder.make_writable(config)
    assert everything(tmp_path) == before


def saved(config, *iterations):
    store = CheckpointStore(folder.run_store(config).folder, keep=len(iterations))
    for iteration in iterations:
        assert store.save(iteration, lambda place: (place / "weights").write_bytes(bytes(1000)) and None)
    return store


def test_on_a_full_disk_a_start_lets_go_of_what_is_beyond_keep(tmp_path, monkeypatch, caplog):
    """As the run that could not save had advised: its disk has not a byte left."""
    store = saved(a_config(tmp_path), 10, 20, 30)
    (store.folder / ".saving-000040").mkdir()

    a_file = tempfile.TemporaryFile

    def full_with(count):
        if len(list(store.folder.iterdir())) >= count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return a_file()

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: full_with(3))
    with pytest.raises(
        ConfigError, match=r"No space left .*; free space there, start it with run\.keep=1, for which 10, 20 would go, or"
    ):
        folder.make_writable(a_config(tmp_path, keep=4))
    assert [path.name for path in sorted(store.folder.iterdir())] == ["000010", "000020", "000030"]  # what a kill left went
    folder.make_writable(a_config(tmp_path, keep=1))
    assert store.iterations() == [30] and "10, 20, beyond run.keep=1" in caplog.text
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: full_with(1))
    with pytest.raises(ConfigError, match=r"free space there, or choose another run\.dir"):
        folder.make_writable(a_config(tmp_path, keep=1))
    assert store.iterations() == [30]


GIB = 2**30


OLDEST_FIRST = "the oldest goes before a save"


@pytest.mark.parametrize(
    "free, there, to_come, keep, refused, cautioned",
    [
        # Full FLUX: 133 GiB a checkpoint.
        (71, 0, 6, 3, r"takes 133\.0 GiB, and its disk has 71\.0 GiB free, where 2 must fit .*; free space", None),
        (150, 0, 6, 1, "150.0 GiB free, where 2 must fit", None),
        (150, 0, 1, 3, None, None),
        (270, 0, 6, 1, None, None),
        (270, 0, 6, 3, None, r"saving will fail when they are there; set run\.keep=2"),
        (400, 0, 6, 3, None, OLDEST_FIRST),
        (540, 0, 6, 3, None, None),
        # Going on: what is there counts, as far as `keep` lets it go.
        (0, 3, 2, 3, None, OLDEST_FIRST),
        (0, 2, 2, 3, r"where 1 more must fit.*, set run\.keep=2, or train LoRA", None),
        (0, 2, 2, 2, None, OLDEST_FIRST),
        (0, 1, 1, 1, r"free space there, choose a run\.dir on another disk, or train LoRA", None),
        (0, 3, 0, 3, None, None),
    ],
)
def test_whether_checkpoints_fit_is_told_with_numbers_and_ways_out(tmp_path, free, there, to_come, keep, refused, cautioned):
    config, room = a_config(tmp_path), CheckpointRoom(133 * GIB, free * GIB, there, to_come, keep)
    for found, expected in ((room_problem(config, room), refused), (room_caution(config, room), cautioned)):
        assert (found is None) == (expected is None), found
        assert expected is None or re.search(expected, found), found


QUICK = ((1, 1), (2, 3), (3, 3))


@pytest.mark.parametrize(
    "fit, keep",
    [
        pytest.param(fit, keep, marks=() if (fit, keep) in QUICK else pytest.mark.slow)
        for fit in range(7)
        for keep in (1, 2, 3, 4, 6)
    ],
)
def test_what_is_told_of_the_room_comes_true(tmp_path, monkeypatch, fit, keep):
    """Every size of disk: refused are the runs that cannot save, those that are not can, and as the caution says."""
    config = a_config(tmp_path, keep=keep, iterations=60, save_every=10)
    store = folder.run_store(config)
    store.folder.mkdir(parents=True)
    disk = SmallDisk(store.folder, fit, monkeypatch)
    monkeypatch.setattr(folder, "SPARE", 0)
    room = folder.checkpoint_room(config, disk.size)
    room = CheckpointRoom(disk.size, disk.free(), room.there, room.to_come, keep)
    assert room.to_come == 6 and room.fit == fit
    done = [store.save(iteration, disk.write) for iteration in range(10, 70, 10)]
    problem, caution = room_problem(config, room), room_caution(config, room)
    assert (problem is not None) == (done[1] is False)
    if caution is not None and "set run.keep" in caution:
        assert not all(done)
        advised = CheckpointStore(store.folder, keep=fit)
        assert all(advised.save(iteration, disk.write) for iteration in range(70, 120, 10))
    elif problem is None:
        assert all(done)
