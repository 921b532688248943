"""A reward in its own process, and in its own Python environment where one is named."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fastvideo_grpo
from fastvideo_grpo.rewards.base import MediaKind, RewardRequest, RewardResult
from fastvideo_grpo.rewards.placement import wire

START_TIMEOUT_S = 1800.0
"""Seconds in which a reward must have loaded its weights the first time."""
MIN_RESTART_TIMEOUT_S = 60.0


class RewardProcessError(RuntimeError):
    """The process died, or the reward in it raised."""


class ProcessReward:
    """The reward ``kind`` in a process that this one starts, restarts when it died or hung, and ends.

    Whatever happens there, a crash of a library included, comes back as an exception of :meth:`score`. What it prints
    goes to standard error.

    Args:
        kind, checkpoint, params: as in ``rewards.models``.
        python: interpreter of another environment, which must have torch, numpy, Pillow and what the reward needs; this package
            is found there without being installed. None: this one.
        device: where the reward's weights lie.
        timeout_s: seconds in which a request must be answered; then the process is killed.

    Attributes:
        restarts: how often it was started anew.
        restart_s: seconds in which it must have loaded its weights then: three times what the first start took.

    Raises:
        ValueError: no such interpreter, or the reward cannot be made there.
    """

    def __init__(
        self,
        kind: str,
        *,
        checkpoint: str | None = None,
        params: dict[str, Any] | None = None,
        python: str | None = None,
        device: str | torch.device = "cpu",
        timeout_s: float = 600.0,
    ) -> None:
        self.python, self.timeout_s = find_python(python), timeout_s
        self._creation = {
            "call": "create", "kind": kind, "checkpoint": checkpoint, "params": params or {}, "device": str(device)
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self.restarts, self.restart_s = -1, START_TIMEOUT_S
        self._closed = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        begun = time.monotonic()
        try:
            description = self._start()
        except (RewardProcessError, TimeoutError) as error:
            raise ValueError(f"the process of the reward ({self.python}) did not start: {error}") from error
        self.restart_s = max(MIN_RESTART_TIMEOUT_S, 3 * (time.monotonic() - begun))
        self.outputs: tuple[str, ...] = tuple(description["outputs"])
        self.media_kind: MediaKind = description["media_kind"]

    def score(self, request: RewardRequest) -> RewardResult:
        """Raises TimeoutError when no answer came in time, RewardProcessError when the process died or the reward raised."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        header, payload = self._call({"call": "score"}, request, self.timeout_s)
        return wire.unpack_result(header, payload)

    def _start(self) -> dict[str, Any]:
        self._end()
        if self._closed:
            raise RewardProcessError("the reward was closed")
        ours, theirs = socket.socketpair()
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [self._package_path(), environment.get("PYTHONPATH")]))
        if os.path.realpath(self.python) != os.path.realpath(sys.executable):
            environment.pop("VIRTUAL_ENV", None)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # it is no rank of the run
            environment.pop(name, None)
        command = [self.python, "-m", "fastvideo_grpo.rewards.placement.worker", str(theirs.fileno())]
        # What it prints goes to standard error, whatever sys.stderr is here (a notebook's has no file behind it).
        # A session of its own: Ctrl-C in the terminal is for the run, which then ends it; and all it started dies with it.
        self._process = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2,
            start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._connection = ours
        self.restarts += 1
        try:
            return self._call(self._creation, None, self.restart_s)[0]
        except BaseException:
            self._end()  # a process without its reward is of no use: the next request starts another one
            raise

    def _package_path(self) -> str:
        """A folder with this package and nothing else: where it is installed, the trainer's packages lie beside it, and
        those of the other environment must win."""
        if self._folder is None or not Path(self._folder.name, "fastvideo_grpo").exists():  # something tidied up
            self._folder = tempfile.TemporaryDirectory(prefix="fastvideo-grpo-reward-")
            (Path(self._folder.name) / "fastvideo_grpo").symlink_to(Path(fastvideo_grpo.__file__).parent)
        return self._folder.name

    def _call(
        self, header: dict[str, Any], request: RewardRequest | None, timeout_s: float
    ) -> tuple[dict[str, Any], memoryview]:
        assert self._connection is not None and self._process is not None
        deadline = time.monotonic() + timeout_s
        payload: memoryview = memoryview(b"")
        if request is not None:
            fields, payload = wire.pack_request(request)
            header = {**header, **fields}
        message = wire.pack(header, payload)  # what does not go into one is no fault of the process
        try:
            wire.send(self._connection, message, deadline)
            answer, body = wire.receive(self._connection, deadline)
        except TimeoutError:
            self._end()
            raise TimeoutError(f"no answer within {timeout_s:g} s; the process was killed") from None
        except (EOFError, OSError, wire.WireError) as error:
            code = self._exit_code()
            self._end()
            raise RewardProcessError(f"the process ended {code} ({error})") from error
        if "error" in answer:
            raise RewardProcessError(str(answer["error"]))
        return answer, body

    def _exit_code(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its connection without leaving"
        return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def to(self, device: torch.device | str) -> ProcessReward:
        """Does nothing: the process keeps the weights where ``device`` said, since moving them would cost it its place."""
        return self

    def close(self) -> None:
        """End the process, and what it started, for good."""
        self._closed = True
        self._end()
        if self._folder is not None:
            self._folder.cleanup()

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it and all of its group are gone
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def find_python(python: str | None) -> str:
    """The interpreter to start; None: the one that runs this. Raises ValueError where there is none."""
    found = shutil.which(python or sys.executable)
    if found is None:
        raise ValueError(f"python is {python!r}; it must be the interpreter of an environment, for example env/bin/python")
    return found
