"""What the fork server makes is a process like those of `subprocess`: its exit code, files, signals and surroundings."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from tests import conftest, fork_server
from tests.trainer import runs


def run(code, *arguments, **options):
    return fork_server.run([sys.executable, "-c", code, *arguments], **options)


@pytest.mark.parametrize(
    "code, expected, told",
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no such file')", 1, "no such file\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os; os._exit(7)", 7, ""),
    ],
)
def test_it_leaves_as_an_interpreter_does(code, expected, told):
    done = run(code)
    assert done.returncode == expected and done.stderr.endswith(told) and bool(done.stderr) == bool(told)


def test_it_has_the_arguments_the_environment_the_folder_and_the_modules_that_it_is_given(tmp_path):
    (tmp_path / "mine.py").write_text("name = 'a module of mine'\n")
    code = "import os, sys, mine; print(sys.argv, os.getcwd(), dict(os.environ), mine.name, __name__)"
    done = run(code, "a", "b", env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert done.stdout == f"['-c', 'a', 'b'] {tmp_path} {{'PYTHONPATH': '{tmp_path}'}} a module of mine __main__\n", done.stderr


def test_a_module_is_run_as_one():
    done = fork_server.run([sys.executable, "-m", "fastvideo_grpo.cli", "study", "--list"])
    assert done.returncode == 0 and "initial_noise" in done.stdout


def test_it_reads_and_writes_what_it_is_given_and_nothing_of_the_servers():
    ours, theirs = os.pipe()
    code = f"""
import os
from multiprocessing import resource_tracker
os.write({theirs}, b"passed on")
for number in os.listdir("/proc/self/fd"):
    if os.path.islink(f"/proc/self/fd/{{number}}") and int(number) != resource_tracker.getfd():
        print(number, os.readlink(f"/proc/self/fd/{{number}}"))
"""
    with os.fdopen(ours, "rb") as pipe:
        try:
            process = fork_server.Popen([sys.executable, "-c", code], stdout=fork_server.PIPE, text=True, pass_fds=[theirs])
        finally:
            os.close(theirs)
        printed, _ = process.communicate()
        assert pipe.read() == b"passed on"
    files = dict(line.split(" ", 1) for line in printed.splitlines())
    talks = {number for number, file in files.items() if file.startswith(("socket:", "pipe:", "anon_inode:"))}
    assert talks - {"2"} == {"1", str(theirs)}, files


def test_a_signal_reaches_it_and_a_wait_has_its_limit():
    process = fork_server.Popen(
        [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"], stdout=fork_server.PIPE
    )
    assert process.stdout.readline() == b"here\n" and process.poll() is None
    with pytest.raises(fork_server.TimeoutExpired):
        process.wait(0.01)
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM == process.poll()
    process.stdout.close()


def test_it_ends_with_who_has_it(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from tests import conftest, fork_server
from tests.trainer import runs
process = fork_server.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path({str(tmp_path / "pid")!r}).write_text(str(process.pid))
"""
    assert run(code).returncode == 0
    child, end = int((tmp_path / "pid").read_text()), time.monotonic() + 60
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_a_server_said_that_has_ended_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv(fork_server.SESSION_VARIABLE, str(tmp_path))
    (tmp_path / "fork_server.log").write_text("ModuleNotFoundError: No module named 'fastvideo'")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with ours, pytest.raises(RuntimeError, match="No module named 'fastvideo'"):
        fork_server._received(ours)


def test_ports_are_told_once_and_are_none_that_the_system_gives_away():
    ports = [runs.free_port() for _ in range(5)]
    first_of_system = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len(set(ports)) == 5 and all(runs.LOWEST_PORT <= port < first_of_system for port in ports)


def test_a_worker_gets_a_file_or_a_model_of_a_promise_and_long_files_exist():
    unit = conftest.FilesAndModels._split_scope
    assert unit(None, "tests/test_grpo.py::test_a[flux, b]") == "tests/test_grpo.py"
    of_wan = "tests/promises/test_resume.py wan"
    assert {unit(None, f"tests/promises/test_resume.py::test_{case}") for case in ("a[wan, ZeRO 2]", "b[wan]")} == {of_wan}
    for start in conftest.LONGEST:
        assert list(fork_server.ROOT.glob(f"{start}*")), start
