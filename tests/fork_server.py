"""Processes that start at once: forked by a server that has imported what takes half a minute.

All pytest workers of a session share one server; who needs it first starts it, and it ends with the last of them. A
:class:`Process` is used like a ``subprocess.Popen``; :func:`Popen` and :func:`run` take the words of a Python command. What is
forked is a process of its own, with its own files, signals and process group, but no fresh interpreter: modules are imported
and have done at import what they do. A test of what a start itself does uses ``subprocess``.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import importlib
import multiprocessing.connection
import os
import pickle
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
SESSION_VARIABLE = "FASTVIDEO_GRPO_TEST_SESSION"
"""A folder that the workers of a session share (tests/conftest.py): the server's socket is in it."""
DEVNULL, PIPE, STDOUT, TimeoutExpired = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT, subprocess.TimeoutExpired
MAX_FILES = 32


class Process:
    """A process that does ``action`` (it is pickled) and leaves with what it returns, if that is a number, else with 0.

    It leaves with 1 where ``action`` raises, and with what ``sys.exit`` is given, as an interpreter does. Arguments, attributes
    and methods are those of ``subprocess.Popen``. It is killed when this object goes, or the process that has it.
    """

    def __init__(
        self,
        action: Callable[[], Any],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool = False,
        pass_fds: Sequence[int] = (),
        start_new_session: bool = False,
    ) -> None:
        self.returncode: int | None = None
        self._lock = threading.Lock()
        with contextlib.ExitStack() as sent:
            null = os.open(os.devnull, os.O_RDWR)
            sent.callback(os.close, null)
            files = {number: number for number in pass_fds}
            files[0], self.stdin = null if stdin in (None, DEVNULL) else _descriptor(stdin), None
            files[1], self.stdout = _opened(stdout, 1, null, text, sent)
            files[2], self.stderr = (files[1], None) if stderr == STDOUT else _opened(stderr, 2, null, text, sent)
            request = {
                "action": pickle.dumps(action),
                "env": dict(os.environ if env is None else env),
                "cwd": str(cwd or Path.cwd()),
                "files": list(files),
                "start_new_session": start_new_session,
            }
            self._server = _connected()
            socket.send_fds(self._server, [pickle.dumps(request)], list(files.values()))
            self.pid = _received(self._server)

    def poll(self) -> int | None:
        with contextlib.suppress(TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not multiprocessing.connection.wait([self._server], timeout):
            raise TimeoutExpired(str(self.pid), timeout or 0)
        with self._lock:  # several threads may wait
            if self.returncode is None:
                self.returncode = _received(self._server)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """What is written to the pipes until they are closed, and wait."""
        read: dict[str, Any] = {"stdout": None, "stderr": None}

        def drain(name: str, file: IO[Any]) -> None:
            with file:
                read[name] = file.read()

        pipes = {name: getattr(self, name) for name in read if getattr(self, name) is not None}
        readers = [threading.Thread(target=drain, args=pipe, daemon=True) for pipe in pipes.items()]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return read["stdout"], read["stderr"]


def Popen(command: Sequence[Any], **options: Any) -> Process:
    """A Python command, ``[interpreter, "-m" | "-c" | FILE, ...]``, in a forked process."""
    interpreter, *words = map(str, command)
    assert os.path.realpath(interpreter) == os.path.realpath(sys.executable), interpreter
    return Process(functools.partial(_interpret, words), **options)


def run(command: Sequence[Any], *, timeout: float | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """``subprocess.run(command, capture_output=True, text=True, ...)`` in a forked process."""
    process = Popen(command, stdout=PIPE, stderr=PIPE, text=True, **options)
    try:
        stdout, stderr = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess([*map(str, command)], process.returncode, stdout, stderr)


def _descriptor(file: int | IO[Any] | None) -> int:
    assert file is not None
    return file if isinstance(file, int) else file.fileno()


def _opened(given: Any, number: int, null: int, text: bool, sent: contextlib.ExitStack) -> tuple[int, IO[Any] | None]:
    """(what the process gets as its descriptor ``number``, the end of a pipe that is ours)."""
    if given == PIPE:
        ours, theirs = os.pipe()
        sent.callback(os.close, theirs)
        return theirs, os.fdopen(ours, "r" if text else "rb")
    if given is None:
        return number, None
    return (null if given == DEVNULL else _descriptor(given)), None


# --- the way to the server


_kept: dict[int, socket.socket] = {}  # process -> a connection that asks for nothing: the server stays while there is one
_started: list[subprocess.Popen[bytes]] = []


def _connected() -> socket.socket:
    """A connection to the session's server, which is started where there is none."""
    folder = Path(os.environ[SESSION_VARIABLE])
    address = str(folder / "fork_server")
    with (folder / "fork_server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            first = _connection(address)
        except (FileNotFoundError, ConnectionRefusedError):
            _start(address)
            _kept.clear()
            first = _connection(address)
        if os.getpid() in _kept:
            return first
        _kept.clear()  # a process that was forked with its parent's
        _kept[os.getpid()] = first
        return _connection(address)


def _connection(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def _start(address: str) -> None:
    Path(address).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, open(f"{address}.log", "a") as log:
        listener.bind(address)
        listener.listen(128)  # who connects while it imports waits
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(listener.fileno())],
            cwd=ROOT, env=environment, pass_fds=[listener.fileno()], start_new_session=True,
            stdin=DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        _started.append(server)  # dropped, it would warn that it still runs


def _received(connection: socket.socket) -> int:
    message = b""
    with contextlib.suppress(ConnectionError):
        message = connection.recv(4)
    if not message:
        log = Path(os.environ[SESSION_VARIABLE], "fork_server.log").read_text()
        raise RuntimeError(f"the fork server has ended; it said:\n{log[-5000:]}")
    return struct.unpack("i", message)[0]


# --- the server


def prepare() -> None:
    """Import what runs and processes of rewards import, and do what each of them would do anew before its work begins."""
    import torch

    from fastvideo_grpo.models import run_config
    from fastvideo_grpo.models.checkpoint import model_facts
    from fastvideo_grpo.models.flux.tiny import write_flux
    from fastvideo_grpo.models.registry import FAMILIES
    from fastvideo_grpo.planning import plan
    from fastvideo_grpo.rewards.registry import kinds
    from tests.trainer import runs

    torch.set_num_threads(1)
    resource_tracker.ensure_running()  # else each process that makes a lock, as progress bars do, starts one of its own
    for family in FAMILIES.usable().values():
        importlib.import_module(family.trainer.partition(":")[0])
    for module in (
        "fastvideo.models.dits.hunyuanvideo",
        "fastvideo.models.dits.wanvideo",
        "httpx",
        "uvicorn",
        "starlette.routing",
    ):
        importlib.import_module(module)
    kinds()  # imports the files of all rewards
    with tempfile.TemporaryDirectory() as folder:
        settings = runs.settings(Path(folder), write_flux(Path(folder) / "model"), run__iterations=1, engine__kind="deepspeed")
        checked = run_config.build({}, settings)
        plan.check_run(checked, model_facts(checked), 1)  # transformers compiles some hundred expressions
        _import_what_a_run_imports(settings, Path(folder) / "imported")
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__  # noqa: B018 (asks a compiler)


def _import_what_a_run_imports(settings: list[str], file: Path) -> None:
    """What is imported when it is first used, found by a run in a process of its own: it leaves threads behind."""
    from tests.trainer import runs

    before = set(sys.modules)
    pid = os.fork()
    if pid == 0:
        try:
            runs.train(settings)
            file.write_text("\n".join(name for name in sys.modules if name not in before))
        except BaseException:
            traceback.print_exc()  # into the server's log: runs begin later, and the first of them says what is wrong
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    for name in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(Exception):  # what cannot be imported by itself is left to who needs it
            importlib.import_module(name)


def serve(listener: socket.socket) -> None:
    """Fork what is asked for until nobody is connected any more."""
    prepare()
    gc.collect()
    gc.freeze()  # a collection in a child would copy the pages of all that is imported
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    waiting = selectors.DefaultSelector()
    for one in (listener, woken):
        waiting.register(one, selectors.EVENT_READ)
    connections: set[socket.socket] = set()
    children: dict[int, socket.socket] = {}

    def leave(connection: socket.socket) -> None:
        connections.discard(connection)
        with contextlib.suppress(KeyError):
            waiting.unregister(connection)
        connection.close()

    def in_child() -> None:
        for one in (listener, woken, wake, *connections):
            one.close()
        waiting.close()

    def ended() -> None:
        with contextlib.suppress(BlockingIOError):
            while woken.recv(64):
                pass
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                connection = children.pop(pid)
                with contextlib.suppress(OSError):  # nobody waits for it
                    connection.send(struct.pack("i", os.waitstatus_to_exitcode(status)))
                leave(connection)

    def asked(connection: socket.socket) -> None:
        for pid, asker in children.items():
            if asker is connection:  # who has it has gone, or has dropped it
                waiting.unregister(connection)
                os.kill(pid, signal.SIGKILL)
                return
        try:
            message, files, _, _ = socket.recv_fds(connection, 1 << 20, MAX_FILES)
        except OSError:
            message, files = b"", []
        if not message:
            leave(connection)
            return
        pid = os.fork()
        if pid == 0:
            try:
                in_child()
                _child(pickle.loads(message), files)
            finally:
                os._exit(1)
        for file in files:
            os.close(file)
        children[pid] = connection
        connection.send(struct.pack("i", pid))

    while True:
        for key, _ in waiting.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                connections.add(connection)
                waiting.register(connection, selectors.EVENT_READ)
            elif key.fileobj is woken:
                ended()
            else:
                asked(key.fileobj)  # type: ignore[arg-type]
        if connections <= set(children.values()):
            return


def _child(request: dict[str, Any], files: list[int]) -> None:
    """In the forked process: become what was asked for, do it, and leave."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    above = max(*request["files"], *files) + 1
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in files]
    for file in files:
        os.close(file)
    for number, file in zip(request["files"], moved, strict=True):
        os.dup2(file, number)
        os.close(file)
    if request["start_new_session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [*path, *(entry for entry in sys.path if entry not in path)]
    importlib.invalidate_caches()
    code = 1
    try:
        result = pickle.loads(request["action"])()
        code = result if isinstance(result, int) else 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BrokenPipeError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Interpreter shutdown after a fork may wait for threads that were not forked.
    os._exit(code)


def _interpret(words: list[str]) -> None:
    """What an interpreter does with the words after its name."""
    kind, rest = words[0], words[1:]
    if kind == "-m":
        sys.argv = rest
        sys.path.insert(0, str(Path.cwd()))
        sys.modules.pop(rest[0], None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(kind).resolve().parent))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
