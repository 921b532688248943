"""Requests and results of rewards as bytes, between processes and over HTTP.

A message is 16 bytes (b"FVG1", the header's length as uint32, the payload's as uint64, both big-endian), then the header,
a JSON object in UTF-8, then the payload: media as raw uint8, scores as raw little-endian float32. Nothing in it can name
code, so that whoever reads it runs none.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from typing import Any

import numpy as np
import torch

from fastvideo_grpo.rewards.base import RewardRequest, RewardResult

MAGIC = b"FVG1"
_PREFIX = struct.Struct(">4sIQ")
PREFIX_BYTES = _PREFIX.size
MAX_HEADER = 8 * 2**20
MAX_PAYLOAD = 4 * 2**30


class WireError(ValueError):
    """Bytes that are no message, or not the one that was expected."""


class TooLarge(WireError):
    """A message that says it is larger than what is allowed."""


def pack(header: dict[str, Any], payload: bytes | memoryview = b"") -> list[bytes | memoryview]:
    """The pieces of a message, to be sent one after the other: large payloads are not copied."""
    try:
        encoded = json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise WireError(f"this does not go into JSON ({type(error).__name__})") from error
    return [_PREFIX.pack(MAGIC, len(encoded), len(payload)), encoded, payload]


def read_prefix(prefix: bytes, max_payload: int = MAX_PAYLOAD) -> tuple[int, int]:
    """Lengths of the header and of the payload.

    Raises:
        TooLarge: one of them is beyond what is allowed.
        WireError: no message begins so.
    """
    if len(prefix) < PREFIX_BYTES or prefix[:4] != MAGIC:
        raise WireError(f"no message begins with {prefix[:8]!r}: expected {MAGIC!r} and two lengths")
    _, header, payload = _PREFIX.unpack(prefix[:PREFIX_BYTES])
    if header > MAX_HEADER:
        raise TooLarge(f"the header would have {header} bytes; allowed: {MAX_HEADER}")
    if payload > max_payload:
        raise TooLarge(f"the payload would have {payload} bytes; allowed: {max_payload}")
    return header, payload


def read_header(encoded: bytes) -> dict[str, Any]:
    """Raises WireError for what is no JSON object."""
    try:
        header = json.loads(encoded, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise WireError(f"the header is no JSON in UTF-8: {type(error).__name__}") from error
    if not isinstance(header, dict):
        raise WireError(f"the header is a JSON {type(header).__name__}; expected an object")
    pack(header)  # numbers beyond float and lone surrogates can be read, but not be passed on
    return header


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def unpack(message: bytes | bytearray, max_payload: int = MAX_PAYLOAD) -> tuple[dict[str, Any], memoryview]:
    """Header and payload of a whole message.

    Raises:
        WireError: anything else than one whole message.
    """
    header, payload = read_prefix(bytes(message[:PREFIX_BYTES]), max_payload)
    if len(message) != PREFIX_BYTES + header + payload:
        raise WireError(f"the message has {len(message)} bytes, but says {PREFIX_BYTES + header + payload}")
    body = memoryview(message)[PREFIX_BYTES:]
    return read_header(bytes(body[:header])), body[header:]


# --- requests and results ---------------------------------------------------------------------------------------------------


def pack_request(request: RewardRequest) -> tuple[dict[str, Any], memoryview]:
    """Header and payload of a request."""
    media = request.media.detach().cpu().contiguous()
    header = {
        "prompts": request.prompts,
        "metadata": request.metadata,
        "fps": request.fps,
        "shape": list(media.shape),
    }
    return header, media.numpy().reshape(-1).data


def unpack_request(header: dict[str, Any], payload: memoryview) -> RewardRequest:
    """Raises WireError for a header that is no request's, or that the payload does not fit."""
    unknown = set(header) - {"call", "prompts", "metadata", "fps", "shape"}
    if unknown:
        raise WireError(f"a request has no {', '.join(sorted(unknown))[:200]}; it has prompts, metadata, fps, shape")
    prompts, metadata, fps, shape = (header.get(key) for key in ("prompts", "metadata", "fps", "shape"))
    if not isinstance(shape, list) or len(shape) != 5 or any(type(n) is not int or n < 1 for n in shape) or shape[-1] != 3:
        raise WireError("shape must be five whole numbers from 1: [batch, frames, height, width, 3]")
    if math.prod(shape) != len(payload):
        raise WireError(f"the shape asks for {math.prod(shape)} bytes of media, the payload has {len(payload)}")
    if not isinstance(prompts, list) or len(prompts) != shape[0] or not all(isinstance(p, str) for p in prompts):
        raise WireError(f"prompts must be {shape[0]} strings, one a sample")
    if metadata is not None and (
        not isinstance(metadata, list)
        or len(metadata) not in (0, shape[0])
        or not all(isinstance(entry, dict) for entry in metadata)
    ):
        raise WireError(f"metadata must be {shape[0]} objects, one a sample, or left out")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6):
        raise WireError("fps must be a number above 0, or null")
    media = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).reshape(shape).copy())
    return RewardRequest(prompts, media, fps=fps, metadata=metadata or [])


def pack_result(result: RewardResult) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a result; scores keep their float32 bits, NaN included."""
    scores = {name: score.detach().cpu().to(torch.float32) for name, score in result.scores.items()}
    header = {
        "outputs": {name: list(score.shape) for name, score in scores.items()},
        "valid": result.valid.detach().cpu().tolist(),
        "invalid_because": result.invalid_because,
    }
    return header, b"".join(score.contiguous().numpy().astype("<f4").tobytes() for score in scores.values())


def unpack_result(header: dict[str, Any], payload: memoryview) -> RewardResult:
    """Raises WireError for a header that is no result's, or that the payload does not fit."""
    outputs, valid, because = (header.get(key) for key in ("outputs", "valid", "invalid_because"))
    if not isinstance(outputs, dict) or not isinstance(valid, list) or not all(isinstance(ok, bool) for ok in valid):
        raise WireError("a result has outputs (name -> shape) and valid (booleans)")
    scores, at = {}, 0
    for name, shape in outputs.items():
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
            raise WireError(f"the shape of output {name} is {shape!r}")
        size = 4 * math.prod(shape)
        if at + size > len(payload):
            raise WireError(f"the payload ends before the scores of {name}")
        values = np.frombuffer(payload[at : at + size], dtype="<f4").astype(np.float32)
        scores[str(name)] = torch.from_numpy(values.reshape(shape))
        at += size
    if at != len(payload):
        raise WireError(f"the payload has {len(payload) - at} bytes too many")
    return RewardResult(scores, torch.tensor(valid, dtype=torch.bool), str(because))


# --- sockets ----------------------------------------------------------------------------------------------------------------


def send(connection: socket.socket, message: list[bytes | memoryview], deadline: float = math.inf) -> None:
    """Send a message (from :func:`pack`) before ``deadline`` (of ``time.monotonic``).

    Raises:
        TimeoutError: the other side did not read it in time.
        OSError: the other side is gone.
    """
    for piece in message:
        rest = memoryview(piece)
        while len(rest):
            _until(connection, deadline)
            rest = rest[connection.send(rest[: 2**20]) :]


def receive(
    connection: socket.socket, deadline: float = math.inf, max_payload: int = MAX_PAYLOAD
) -> tuple[dict[str, Any], memoryview]:
    """The next message.

    Raises:
        TimeoutError: it did not come before ``deadline``.
        EOFError: the other side is gone.
        WireError: what came is no message.
    """
    header, payload = read_prefix(bytes(_exactly(connection, PREFIX_BYTES, deadline)), max_payload)
    return read_header(bytes(_exactly(connection, header, deadline))), memoryview(_exactly(connection, payload, deadline))


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytearray:
    buffer = bytearray(count)
    rest = memoryview(buffer)
    while len(rest):
        _until(connection, deadline)
        got = connection.recv_into(rest)
        if not got:
            raise EOFError("the other side closed the connection")
        rest = rest[got:]
    return buffer


def _until(connection: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no time left")
    connection.settimeout(None if math.isinf(left) else left)
