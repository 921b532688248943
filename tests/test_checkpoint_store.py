"""Nothing lost: a checkpoint appears when complete, is verified when read, and a full disk stops saving, not the
saved."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastvideo_grpo.checkpoints import store as store_module
from fastvideo_grpo.checkpoints.store import CheckpointError, CheckpointStore
from fastvideo_grpo.disk import room as disk_room
from fastvideo_grpo.disk.durable_files import write_atomic


def write(text="weights"):
    def action(folder):
        (folder / "state").mkdir()
        (folder / "state" / "a.bin").write_bytes(text.encode() * 100)
        (folder / "b.bin").write_bytes(b"b" * 10)
        return {"prompt_order": [3, 1, 2]}

    return action


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_saved_checkpoint_is_whole_and_says_what_is_in_it(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.newest() is None
    assert store.save(100, write())
    assert store.newest() == tmp_path / "checkpoints" / "000100" == store.at(100)
    document = store.load_trainer_json(store.newest())
    assert document["prompt_order"] == [3, 1, 2]
    assert document["iteration"] == 100
    assert sorted(document["checksums"]) == ["b.bin", "state/a.bin"]
    assert document["versions"]["torch"]


def test_the_oldest_go_and_the_new_one_stays(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for iteration in (10, 20, 30, 40):
        assert store.save(iteration, write())
    assert store.iterations() == [30, 40]
    assert store.save(35, write())  # after going back to 30: the later one is another story's, and stays
    assert store.iterations() == [30, 35, 40]
    assert names(tmp_path) == ["000030", "000035", "000040"]


def test_folders_of_others_are_no_checkpoints(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    assert store.save(10, write())
    for name in ("50", "0000060", "\u00b3", "\u0661" * 6, "000070 (copy)"):
        (tmp_path / name).mkdir()
    (tmp_path / "000080").write_text("a file")
    assert store.iterations() == [10] and store.newest() == tmp_path / "000010"


def test_saving_again_replaces(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    assert store.save(5, write("old"))
    assert store.save(5, write("new"))
    assert (store.at(5) / "state" / "a.bin").read_bytes() == b"new" * 100
    assert names(tmp_path) == ["000005"]


@pytest.mark.parametrize("damage", ["changed", "cut", "deleted", "trainer.json", "no trainer.json"])
def test_a_damaged_checkpoint_is_named_and_the_next_whole_one_used(tmp_path, caplog, damage):
    store = CheckpointStore(tmp_path, keep=3)
    for iteration in (1, 2):
        store.save(iteration, write())
    victim = tmp_path / "000002" / ("trainer.json" if "trainer" in damage else "state/a.bin")
    content = bytearray(victim.read_bytes())
    if damage == "changed":
        content[50] ^= 1
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[:-1])
    elif damage == "trainer.json":
        victim.write_bytes(content.replace(b'"iteration": 2', b'"iteration": 9'))
    else:
        victim.unlink()
    with caplog.at_level(logging.WARNING):
        assert store.newest() == tmp_path / "000001"
    assert "000002" in caplog.text
    assert victim.name in caplog.text
    if damage in ("changed", "cut", "trainer.json"):
        assert "expected" in caplog.text
        assert "found" in caplog.text
    assert (tmp_path / "000002").is_dir()
    with pytest.raises(CheckpointError, match="damaged"):
        store.at(2)


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for iteration in (1, 2):
        store.save(iteration, write())
    (tmp_path / "000002" / "b.bin").unlink()
    assert store.newest() == tmp_path / "000001"
    store.save(3, write())
    assert store.iterations() == [1, 2, 3]


def test_asking_for_what_is_not_there_says_what_is(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    with pytest.raises(CheckpointError, match="none found"):
        store.newest(required=True)
    store.save(7, write())
    with pytest.raises(CheckpointError, match="there are: 7"):
        store.at(8)
    (tmp_path / "000007" / "b.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="all damaged"):
        store.newest(required=True)
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.load_trainer_json(tmp_path)
    with pytest.raises(ValueError, match=r"run\.keep is 0"):
        CheckpointStore(tmp_path, keep=0)


def test_a_full_disk_stops_saving_not_the_saved(tmp_path, caplog):
    store = CheckpointStore(tmp_path, keep=1)
    assert store.save(1, write())

    def full(folder):
        write()(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with caplog.at_level(logging.ERROR):
        assert store.save(2, full) is False
    assert "No space left on device" in caplog.text
    assert "free space" in caplog.text
    assert names(tmp_path) == ["000001"]
    assert store.newest() == tmp_path / "000001"
    assert store.save(3, write())
    assert names(tmp_path) == ["000003"]


class SmallDisk:
    """A disk with room for so many checkpoints (:meth:`write` makes one) at `folder`, told by statvfs or a quota."""

    def __init__(self, folder, room, monkeypatch, quota=False):
        self.folder, self.size, self.monkeypatch = folder, 100_000, monkeypatch
        self.capacity = int(room * 1.05 * self.size)
        monkeypatch.setattr(store_module, "SPARE", 0)
        monkeypatch.setattr(store_module, "free_bytes", lambda folder: 1 << 40 if quota else self.free())
        self.tried = []

    def free(self):
        return self.capacity - disk_room.folder_bytes(self.folder)

    def write(self, folder):
        self.tried.append(sorted(int(name) for name in os.listdir(self.folder) if name.isdigit()))
        written = min(self.size, max(0, self.free()))
        (folder / "weights").write_bytes(bytes(written))
        if written < self.size:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize("quota", [False, True], ids=["free space", "quota"])
def test_what_is_beyond_keep_goes_before_a_save_that_has_no_room(tmp_path, monkeypatch, caplog, quota):
    """With room for three, ``keep=3`` cannot hold four for a moment; and lowering ``run.keep``, as advised, helps."""
    disk = SmallDisk(tmp_path, 3.4, monkeypatch, quota)
    store = CheckpointStore(tmp_path, keep=3)
    for iteration in (1, 2, 3, 4):
        assert store.save(iteration, disk.write)
    assert store.iterations() == [2, 3, 4] and disk.tried[-1] == [2, 3] and "000001" not in caplog.text
    assert "checkpoints 1, beyond run.keep=3" in caplog.text
    greedy = CheckpointStore(tmp_path, keep=4)
    assert not greedy.save(5, disk.write)
    assert names(tmp_path) == ["000002", "000003", "000004"]
    assert "start it again with run.keep=1, for which 2, 3 would go" in caplog.text
    caplog.clear()
    advised = CheckpointStore(tmp_path, keep=1)
    assert advised.save(5, disk.write)
    assert disk.tried[-1] == [4] and names(tmp_path) == ["000005"]
    assert "checkpoints 2, 3, beyond run.keep=1, were removed" in caplog.text


@pytest.mark.parametrize("quota", [False, True], ids=["free space", "quota"])
def test_the_only_whole_checkpoint_stays_until_the_next_is_whole(tmp_path, monkeypatch, caplog, quota):
    disk = SmallDisk(tmp_path, 1.5, monkeypatch, quota)
    store = CheckpointStore(tmp_path, keep=1)
    assert store.save(1, disk.write)
    assert not store.save(2, disk.write)
    assert names(tmp_path) == ["000001"] and store.newest() == tmp_path / "000001"
    assert "that of 1 stays until the next one is whole" in caplog.text and "run.keep" not in caplog.text


@pytest.mark.parametrize("quota", [False, True], ids=["free space", "quota"])
def test_nothing_goes_for_a_save_that_would_not_fit_then_either(tmp_path, monkeypatch, quota):
    """The oldest is small (it lost its weights), and something else fills the disk."""
    disk = SmallDisk(tmp_path, 3.4, monkeypatch, quota)
    store = CheckpointStore(tmp_path, keep=3)
    for iteration in (1, 2, 3):
        assert store.save(iteration, disk.write)
    (tmp_path / "000001" / "weights").unlink()
    disk.capacity = disk_room.folder_bytes(tmp_path) + disk.size // 2
    assert not store.save(4, disk.write)
    assert names(tmp_path) == ["000001", "000002", "000003"]


def test_nothing_goes_before_a_save_but_for_a_whole_one(tmp_path, monkeypatch):
    """The newest that count as there are damaged: what is beyond `keep` without them stays."""
    disk = SmallDisk(tmp_path, 4.5, monkeypatch)
    store = CheckpointStore(tmp_path, keep=4)
    for iteration in (1, 2, 3, 4):
        assert store.save(iteration, disk.write)
    for iteration in (3, 4):
        content = bytearray((tmp_path / f"{iteration:06d}" / "weights").read_bytes())
        content[7] ^= 1
        (tmp_path / f"{iteration:06d}" / "weights").write_bytes(content)
    assert not CheckpointStore(tmp_path, keep=3).save(5, disk.write)
    assert names(tmp_path) == ["000001", "000002", "000003", "000004"]
    assert CheckpointStore(tmp_path, keep=1).save(5, disk.write)
    assert names(tmp_path) == ["000003", "000004", "000005"] and disk.tried[-1] == [2, 3, 4]
    for damaged in (1, 2):
        (tmp_path / f"{damaged:06d}").mkdir()
    (tmp_path / "000005" / "weights").unlink()
    assert not CheckpointStore(tmp_path, keep=1).make_room()
    assert names(tmp_path) == ["000001", "000002", "000003", "000004", "000005"]


def test_with_room_old_ones_go_only_after_a_save(tmp_path, monkeypatch):
    disk = SmallDisk(tmp_path, 9, monkeypatch)
    store = CheckpointStore(tmp_path, keep=2)
    for iteration in (1, 2, 3):
        assert store.save(iteration, disk.write)
    assert disk.tried == [[], [1], [1, 2]] and store.iterations() == [2, 3]


def test_a_read_only_folder_is_not_told_to_be_full(tmp_path, caplog):
    def read_only(folder):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "state")

    store = CheckpointStore(tmp_path, keep=1)
    for iteration in (1, 2):
        store.save(iteration, write())
    (tmp_path / "000001").mkdir()
    assert not store.save(3, read_only)
    assert "Read-only file system" in caplog.text and "repair what is wrong" in caplog.text
    assert "free space" not in caplog.text and names(tmp_path) == ["000001", "000002"]


def test_a_disk_full_at_the_last_file_stops_saving_too(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    assert store.save(1, write())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        assert store.save(2, write()) is False
    assert names(tmp_path) == ["000001"]


def test_another_error_is_not_swallowed(tmp_path):
    def broken(folder):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        CheckpointStore(tmp_path, keep=1).save(1, broken)


def test_killed_in_the_middle_of_a_save(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, write())
    script = (
        "import sys, time\n"
        "from fastvideo_grpo.checkpoints.store import CheckpointStore\n"
        "def slow(folder):\n"
        "    (folder / 'a.bin').write_bytes(b'half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "CheckpointStore(sys.argv[1], keep=1).save(2, slow)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    process.stdout.close()
    assert names(tmp_path) == [".saving-000002", "000001"]
    restarted = CheckpointStore(tmp_path, keep=1)
    assert restarted.newest() == tmp_path / "000001"
    restarted.clean()
    assert names(tmp_path) == ["000001"]
    assert restarted.save(2, write())
    assert names(tmp_path) == ["000002"]


def test_clean_brings_back_what_a_replacement_had_put_aside(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, write())
    os.rename(tmp_path / "000001", tmp_path / ".replaced-000001")
    (tmp_path / ".removing-000000").mkdir()
    store.clean()
    assert names(tmp_path) == ["000001"]
    assert store.newest() == tmp_path / "000001"


def test_reserved_keys_are_refused(tmp_path):
    with pytest.raises(ValueError, match="iteration"):
        CheckpointStore(tmp_path, keep=1).save(1, lambda folder: {"iteration": 3})


def test_write_atomic_shows_old_or_new(tmp_path, monkeypatch):
    path = tmp_path / "index.json"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["index.json"]
    write_atomic(path, json.dumps({"time": time.time()}).encode())
    assert "time" in json.loads(path.read_text())
