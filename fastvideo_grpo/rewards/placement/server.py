"""The HTTP server of a reward: /health, /describe and /score.

/score takes a message of :mod:`fastvideo_grpo.rewards.placement.wire` and answers with one. The reward itself runs in processes
beside the server, so that a request can neither block nor end it. Other answers are JSON, errors ``{"error": text}``:
400 for what is no request, 401 without the token, 413 for too much, 422 for media that the reward does not look at, 503
when no process was free in time, 504 when the reward took too long, 500 when it failed.
"""

from __future__ import annotations

import hmac
import ipaddress
import queue
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastvideo_grpo.rewards.base import RewardRequest, RewardResult
from fastvideo_grpo.rewards.placement import wire
from fastvideo_grpo.rewards.placement.process import ProcessReward, RewardProcessError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response


class Busy(RuntimeError):
    """No process became free in time."""


class GaveUp(RuntimeError):
    """Who asked did not wait."""


class RewardPool:
    """Processes of one reward, on several devices; a request goes to one that is free.

    Args:
        devices: one process for each entry.
        timeout_s: seconds for a request to be scored, once a process is free.
    """

    def __init__(
        self, kind: str, *, checkpoint: str | None, params: dict[str, Any], devices: list[str], timeout_s: float
    ) -> None:
        self.kind, self.devices, self.timeout_s = kind, devices, timeout_s
        self._workers: list[ProcessReward] = []
        self._free: queue.Queue[ProcessReward] = queue.Queue()
        try:
            for device in devices:
                worker = ProcessReward(kind, checkpoint=checkpoint, params=params, device=device, timeout_s=timeout_s)
                self._workers.append(worker)
                self._free.put(worker)
        except BaseException:
            self.close()
            raise
        self.outputs, self.media_kind = self._workers[0].outputs, self._workers[0].media_kind

    @property
    def free(self) -> int:
        return self._free.qsize()

    @property
    def restarts(self) -> int:
        return sum(worker.restarts for worker in self._workers)

    def score(self, request: RewardRequest, gave_up: Callable[[], bool] = lambda: False) -> RewardResult:
        """Wait for a free process and let it score.

        Args:
            gave_up: whether who asked has left meanwhile; then nothing is scored.

        Raises:
            Busy: none became free in time. GaveUp, TimeoutError, RewardProcessError.
        """
        try:
            # What a process that has to be started anew may take is part of it.
            worker = self._free.get(timeout=self.timeout_s + max(worker.restart_s for worker in self._workers))
        except queue.Empty:
            raise Busy(f"all {len(self.devices)} processes are busy") from None
        try:
            if gave_up():
                raise GaveUp("the connection was closed while the request waited")
            return worker.score(request)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


def application(pool: RewardPool, *, token: str | None, max_bytes: int) -> Starlette:
    """The server as an ASGI application.

    Args:
        token: what "Authorization: Bearer" must say; None: nothing is asked.
        max_bytes: the largest request.
    """
    from anyio import from_thread
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse
    from starlette.responses import Response as PlainResponse
    from starlette.routing import Route

    def refuse(status: int, error: object) -> Response:
        return JSONResponse({"error": str(error)[:2000]}, status)

    def allowed(request: Request) -> bool:
        given = request.headers.get("authorization", "").encode()
        return token is None or hmac.compare_digest(given, f"Bearer {token}".encode())

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "workers": len(pool.devices), "free": pool.free, "restarts": pool.restarts})

    async def describe(request: Request) -> Response:
        if not allowed(request):
            return refuse(401, "the token is missing or wrong")
        return JSONResponse({"kind": pool.kind, "outputs": list(pool.outputs), "media_kind": pool.media_kind})

    async def score(request: Request) -> Response:
        if not allowed(request):
            return refuse(401, "the token is missing or wrong")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:  # whatever Content-Length says
                return refuse(413, f"the request has more than {max_bytes} bytes")
            if len(body) >= wire.PREFIX_BYTES and len(body) - len(chunk) < wire.PREFIX_BYTES:
                try:
                    wire.read_prefix(bytes(body), max_bytes)  # before the rest of what is no request is read
                except wire.TooLarge as error:
                    return refuse(413, error)
                except wire.WireError as error:
                    return refuse(400, error)
        try:
            asked = wire.unpack_request(*wire.unpack(body, max_bytes))
        except wire.WireError as error:
            return refuse(400, error)
        frames = asked.media.shape[1]
        if (pool.media_kind == "image" and frames > 1) or (pool.media_kind == "video" and frames == 1):
            return refuse(422, f"the reward looks at {pool.media_kind}s, and the samples have {frames} frame(s)")
        try:
            # In one thread from waiting to the answer: threads are few, and a request that had its process while others hold
            # all of them would wait for those, and they for it.
            result = await run_in_threadpool(pool.score, asked, lambda: from_thread.run(request.is_disconnected))
        except Busy as error:
            return refuse(503, error)
        except GaveUp as error:
            return refuse(408, error)
        except TimeoutError as error:
            return refuse(504, error)
        except (RewardProcessError, wire.WireError) as error:
            return refuse(500, error)
        header, payload = wire.pack_result(result)
        return PlainResponse(b"".join(wire.pack(header, payload)), media_type="application/x-fastvideo-grpo")

    return Starlette(routes=[Route("/health", health), Route("/describe", describe), Route("/score", score, methods=["POST"])])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
