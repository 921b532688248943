"""status.json: the next start says how the last run ended, and nothing that happens to the file ends a run."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvideo_grpo.checkpoints import run_status
from fastvideo_grpo.checkpoints.run_status import RunStatus, how_it_ended
from fastvideo_grpo.tracking.statistics import Clock

ROOT = Path(__file__).parents[1]


def killed_during(folder, *, iteration=None, phase=None, rewards=()):
    """What a run leaves that says nothing on its way out."""
    status = RunStatus(folder).__enter__()
    if iteration is not None:
        status.iteration(iteration)
    if phase is not None:
        with Clock(status.doing).phase(phase):
            pass
    status.rewards(set(rewards))
    return status


@pytest.mark.parametrize(
    "state, text",
    [
        ({}, "ended without a word while setting up: killed or out of memory"),
        (
            {"rewards": ["hps"]},
            "ended without a word while setting up, at work reward hps: killed, out of memory, or ended by a reward or a "
            "library from within; rewards.models.hps.placement=process keeps such a reward apart",
        ),
        (
            {"iteration": 12, "phase": "reward", "rewards": ["hps", "clip"]},
            "ended without a word in iteration 12, while scoring with reward clip and hps: killed, out of memory, or ended by "
            "a reward or a library from within; rewards.models.clip.placement=process keeps such a reward apart",
        ),
        ({"iteration": 3, "phase": "update"}, "ended without a word in iteration 3, while updating the weights: killed or"),
    ],
)
def test_the_next_start_says_what_the_last_one_was_doing(tmp_path, state, text):
    killed_during(tmp_path, **state)
    with RunStatus(tmp_path) as status:
        assert f"the last run in {tmp_path} (process {os.getpid()} on " in status.before and text in status.before
        assert "\n" not in status.before


@pytest.mark.parametrize(
    "end, text",
    [
        (lambda status: status.end("finished"), None),
        (lambda status: status.end("stopped"), None),
        (lambda status: None, None),
        (
            lambda status: status.failed(RuntimeError("CUDA error:\n" + "ü" * 5000)),
            "failed in iteration 7, while scoring: Runtime",
        ),
        (lambda status: status.failed(KeyboardInterrupt()), "was interrupted in iteration 7, while scoring"),
        (lambda status: (status.end("finished"), status.failed(RuntimeError("later"))), None),
    ],
)
def test_an_end_that_was_said_is_told_if_it_was_none_to_be_wanted(tmp_path, end, text):
    with RunStatus(tmp_path) as status:
        status.iteration(7)
        status.doing("reward")
        end(status)
        status.rewards(["hps"])  # it is closed after the end
        status.rewards([])
    told = how_it_ended(tmp_path)
    assert told is None if text is None else text in told and "\n" not in told
    with RunStatus(tmp_path):
        pass
    assert how_it_ended(tmp_path) is None, "told once"


def test_a_process_that_is_ended_from_within_leaves_what_it_was_doing(tmp_path):
    code = f"""
import os, torch
from pathlib import Path
from fastvideo_grpo.checkpoints.run_status import RunStatus
from fastvideo_grpo.rewards.base import RewardRequest
from fastvideo_grpo.rewards.registry import register
from fastvideo_grpo.rewards.reward_set import RewardSet
class Ends:
    outputs, media_kind = ("quality",), "any"
    def score(self, request):
        os._exit(0)
    def to(self, device):
        return self
    def close(self):
        pass
register("ends")(Ends)
with RunStatus(Path({str(tmp_path)!r})) as status:
    rewards = RewardSet({{"a": {{"kind": "jpeg_size", "placement": "process"}}, "b": {{"kind": "ends"}}}}, watch=status.rewards)
    status.doing("reward")
    rewards.score(RewardRequest(["x"], torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert "while scoring with reward b: killed" in how_it_ended(tmp_path), "not the one that has a process of its own"


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 4096, b"[]", b'"x"', b'{"ended": null}', b'{"ended": nul', b"\xff\xfe", "folder"]
)
def test_a_file_that_says_nothing_is_no_error(tmp_path, content):
    if content == "folder":
        (tmp_path / run_status.FILE).mkdir()
    else:
        (tmp_path / run_status.FILE).write_bytes(content)
    with RunStatus(tmp_path) as status:
        assert status.before is None
        status.doing("reward")


@pytest.mark.parametrize("fails", ["write_atomic", "pwrite"])
def test_a_disk_that_refuses_is_told_once_and_ends_nothing(tmp_path, monkeypatch, caplog, fails):
    killed_during(tmp_path, iteration=1)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_status if fails == "write_atomic" else os, fails, full)
    with RunStatus(tmp_path) as status:
        for phase in ("rollout", "reward", "update"):
            status.doing(phase)
    assert caplog.text.count("No space left on device; the run goes on without it") == 1
    monkeypatch.undo()
    if fails == "write_atomic":
        assert how_it_ended(tmp_path) is None, "what stood there was another run's"


def test_a_change_costs_no_more_than_a_write(tmp_path, monkeypatch):
    writes = []
    monkeypatch.setattr(os, "fsync", lambda *arguments: writes.append("fsync"))
    with RunStatus(tmp_path) as status:
        at_start = len(writes)
        assert at_start > 0
        pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda *arguments: writes.append("pwrite") or pwrite(*arguments))
        for phase in ("rollout", "rollout", "reward", "reward"):
            status.doing(phase)
        assert writes[at_start:] == ["pwrite", "pwrite"]
    assert json.loads((tmp_path / run_status.FILE).read_text())["doing"] == "scoring"


def test_one_that_is_ended_between_writing_and_cutting_is_read(tmp_path, monkeypatch):
    with RunStatus(tmp_path) as status:
        status.doing("exchange")
        monkeypatch.setattr(os, "ftruncate", lambda *arguments: None)
        status.doing("reward")
        text = (tmp_path / run_status.FILE).read_text()
        assert text.count("}") == 2 and "while scoring" in how_it_ended(tmp_path)


def test_other_ranks_keep_none(tmp_path):
    with RunStatus(None) as status:
        status.iteration(1)
        status.failed(RuntimeError("x"))
    assert not list(tmp_path.iterdir())
