"""SIGUSR1: noted by one process, agreed on by all, handed on by train_scripts/torchrun.py."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.trainers.stopping import EXIT_STOPPED, StopSignal

ROOT = Path(__file__).parent.parent

# What a training process does about it, without the training.
WORKER = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
rank = int(os.environ["RANK"])
(folder / f"started-{rank}").write_text(str(os.getpid()))
while not (folder / "listen").exists():
    time.sleep(0.05)
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.trainers.stopping import EXIT_STOPPED, StopSignal
stop = StopSignal()
world = World.current("cpu")
for iteration in range(600):
    if stop.agreed(world):
        (folder / f"stopped-{rank}").write_text(str(iteration))
        world.leave()
        sys.exit(EXIT_STOPPED)
    (folder / f"iteration-{rank}").write_text(str(iteration))
    time.sleep(0.05)
"""


@pytest.fixture
def restored():
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_is_noted_and_one_that_came_blocked_too(restored):
    stop = StopSignal()
    assert not stop.agreed(World())
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.agreed(World()) and stop.agreed(World())
    # To this thread: the test's process has others, which do not block the signal and would take it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    assert signal.SIGUSR1 in signal.sigpending()
    assert StopSignal().agreed(World())


def _wait_for(*files, seconds=300):
    end = time.monotonic() + seconds
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < end, f"{[file.name for file in files]} did not appear"
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path):
    """Starts two workers; returns the process of torchrun.py."""
    started = []

    def start(worker):
        (tmp_path / "worker.py").write_text(worker)
        command = [sys.executable, "train_scripts/torchrun.py", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command += [str(tmp_path / "worker.py"), str(tmp_path)]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.communicate()


def test_torchrun_hands_the_signal_on_even_before_anybody_listens(start, tmp_path):
    process = start(WORKER)
    _wait_for(tmp_path / "started-0", tmp_path / "started-1")
    process.send_signal(signal.SIGUSR1)
    time.sleep(1)
    (tmp_path / "listen").touch()
    assert process.wait(300) == EXIT_STOPPED, process.stderr.read()
    assert (tmp_path / "stopped-0").read_text() == (tmp_path / "stopped-1").read_text() == "0"


def test_one_signalled_process_stops_all_after_the_same_iteration(start, tmp_path):
    (tmp_path / "listen").touch()
    process = start(WORKER)
    _wait_for(tmp_path / "iteration-0", tmp_path / "iteration-1")
    os.kill(int((tmp_path / "started-1").read_text()), signal.SIGUSR1)
    assert process.wait(300) == EXIT_STOPPED, process.stderr.read()
    assert (tmp_path / "stopped-0").read_text() == (tmp_path / "stopped-1").read_text() != "0"


def test_other_failures_are_told_and_are_no_stop(start):
    process = start("import sys\nsys.exit(3)\n")
    assert process.wait(300) == 1
    assert "exitcode  : 3" in process.stderr.read()
