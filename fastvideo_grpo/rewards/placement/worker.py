"""A reward in a process of its own: what :class:`~fastvideo_grpo.rewards.placement.process.ProcessReward` starts.

    python -m fastvideo_grpo.rewards.placement.worker FD

FD is a connected socket. It needs torch, numpy and Pillow, this package on the path, and what the reward itself needs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from typing import Any

from fastvideo_grpo.errors import one_line
from fastvideo_grpo.rewards import answers, registry
from fastvideo_grpo.rewards.base import Reward
from fastvideo_grpo.rewards.placement import wire


def serve(connection: socket.socket) -> None:
    """Answer calls until the other side is gone: ``create`` once, then ``score``."""
    reward: Reward | None = None
    while True:
        try:
            header, payload = wire.receive(connection)
        except (EOFError, OSError):
            return
        try:
            if header.get("call") == "create":
                reward = _create(header)
                answer: dict[str, Any] = {"outputs": list(reward.outputs), "media_kind": reward.media_kind}
                body = b""
            else:
                assert reward is not None
                answer, body = _score(reward, header, payload)
            message = wire.pack(answer, body)
        except BaseException as error:  # a reward that calls sys.exit answers, too, and need not be loaded again
            with contextlib.suppress(Exception):  # what it raised may have no text
                traceback.print_exc()
            message = wire.pack({"error": one_line(error)})
        try:
            wire.send(connection, message)
        except OSError:
            return


def _create(header: dict[str, Any]) -> Reward:
    import torch

    device = torch.device(header["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    reward = registry.create(header["kind"], checkpoint=header["checkpoint"], params=header["params"])
    reward.to(device)
    return reward


def _score(reward: Reward, header: dict[str, Any], payload: memoryview) -> tuple[dict[str, Any], bytes]:
    import torch

    request = wire.unpack_request(header, payload)
    with torch.no_grad():
        return wire.pack_result(answers.checked(reward.score(request), len(request.prompts)))


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone: one that hangs would not see the connection close."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    serve(socket.socket(fileno=int(sys.argv[1])))
