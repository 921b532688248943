"""A reward behind a server (``fastvideo-grpo serve-reward``), asked over HTTP."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from fastvideo_grpo.rewards.base import MediaKind, RewardRequest, RewardResult
from fastvideo_grpo.rewards.placement import wire

TOKEN_VARIABLE = "FASTVIDEO_GRPO_REWARD_TOKEN"
_CONTENT_TYPE = "application/x-fastvideo-grpo"
_START_TIMEOUT_S = 60.0


class RewardServerError(RuntimeError):
    """The server answered with an error, or with something that is no answer."""


class HttpReward:
    """The reward that a server at ``url`` offers.

    Args:
        kind: what the server must offer.
        url: for example http://127.0.0.1:8800.
        timeout_s: seconds without a sign of the server, and for the whole of the answer: the time a request waits there,
            and that in which the server starts a process anew that died, are part of it. Let the server's own --timeout be
            shorter: a request that it has begun to score it ends.
        token_variable: environment variable with the server's token, where it asks for one.

    Raises:
        ValueError: nobody answers there, the token is wrong, or the server offers another reward.
    """

    def __init__(self, kind: str, *, url: str, timeout_s: float = 600.0, token_variable: str = TOKEN_VARIABLE) -> None:
        import httpx

        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        token = os.environ.get(token_variable)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # A request's media may be large, and the server be next door: no proxy of the environment's stands between.
        self._client = httpx.Client(headers=headers, timeout=min(timeout_s, _START_TIMEOUT_S), trust_env=False)
        start = f"start it with fastvideo-grpo serve-reward {kind}"
        try:
            answer = self._client.get(f"{self.url}/describe")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(f"no reward server answers at {self.url} ({type(error).__name__}: {error}); {start}") from error
        if answer.status_code == 401:
            raise ValueError(f"the reward server at {self.url} wants a token: set {token_variable} to that of the server")
        try:
            description = answer.json()
            self.outputs: tuple[str, ...] = tuple(description["outputs"])
            self.media_kind: MediaKind = description["media_kind"]
            served = description["kind"]
        except (ValueError, KeyError, TypeError) as error:
            status = answer.status_code
            raise ValueError(f"what answers at {self.url} is no reward server (status {status}); {start}") from error
        if served != kind:
            raise ValueError(f"the server at {self.url} offers the reward {served}, not {kind}")

    def score(self, request: RewardRequest) -> RewardResult:
        """Raises TimeoutError, RewardServerError, and httpx.TransportError when nobody answers."""
        import httpx

        header, payload = wire.pack_request(request)
        pieces = wire.pack(header, payload)
        headers = {"Content-Type": _CONTENT_TYPE, "Content-Length": str(sum(len(piece) for piece in pieces))}
        deadline = time.monotonic() + self.timeout_s
        try:
            with self._client.stream(
                "POST", f"{self.url}/score", content=_chunks(pieces, deadline), headers=headers, timeout=self.timeout_s
            ) as answer:
                body = bytearray()
                for chunk in answer.iter_bytes():
                    body += chunk
                    if len(body) > wire.MAX_HEADER:
                        raise RewardServerError("the answer is larger than scores can be")
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("the answer came too slowly")
        except httpx.TimeoutException as error:
            raise TimeoutError(f"no answer from {self.url} within {self.timeout_s:g} s") from error
        if answer.status_code != 200:
            raise RewardServerError(f"{self.url} answered {answer.status_code}: {_reason(bytes(body))}")
        return wire.unpack_result(*wire.unpack(body))

    def to(self, device: torch.device | str) -> HttpReward:
        """Does nothing: the weights are with the server."""
        return self

    def close(self) -> None:
        self._client.close()


def _chunks(pieces: list[bytes | memoryview], deadline: float) -> Iterator[bytes]:
    import httpx

    for piece in pieces:
        for start in range(0, len(piece), 2**20):
            if time.monotonic() > deadline:
                raise httpx.WriteTimeout("the request was read too slowly")
            yield bytes(piece[start : start + 2**20])


def _reason(body: bytes) -> Any:
    import json

    try:
        return json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return body[:200]
