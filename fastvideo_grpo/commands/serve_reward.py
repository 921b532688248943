"""``fastvideo-grpo serve-reward``: a reward behind HTTP, for ``placement: http``."""

from __future__ import annotations

import argparse
import os
import socket
from typing import Any

from fastvideo_grpo.commands.arguments import path_argument
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.rewards.placement.http import TOKEN_VARIABLE

EPILOG = f"""\
examples:
  fastvideo-grpo serve-reward hps --checkpoint checkpoints/HPS_v2.1_compressed.pt tokenizer=checkpoints/flux/tokenizer
  fastvideo-grpo serve-reward jpeg_size --workers 2 --port 8801
  {TOKEN_VARIABLE}=... fastvideo-grpo serve-reward hps ... --host 0.0.0.0 --devices cuda:0,cuda:1

A run uses it with rewards.models.NAME: {{kind: hps, placement: http, url: http://HOST:8800}}. On any other address than
loopback it wants a token, the same in the environment of server and run. The connection is not encrypted: between
machines that do not trust their network, put it behind a TLS proxy or an SSH tunnel."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", help="the reward")
    parser.add_argument("params", metavar="key=value", nargs="*", help="what rewards.models.NAME.params would hold")
    parser.add_argument("--checkpoint", type=path_argument, metavar="PATH", help="its weights, for kinds that have some")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    parser.add_argument(
        "--port", type=int, default=8800, help="port to listen on; 0: a free one, which is printed (default: 8800)"
    )
    parser.add_argument(
        "--devices", default="cpu", metavar="LIST", help="where its processes run, e.g. cuda:0,cuda:1 (default: cpu)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on each device (default: 1)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds for a request (default: 600)")
    parser.add_argument("--max-mib", type=int, default=1024, metavar="N", help="largest request in MiB (default: 1024)")
    parser.add_argument(
        "--token-variable",
        default=TOKEN_VARIABLE,
        metavar="NAME",
        help="environment variable with the token (default: %(default)s)",
    )
    parser.epilog = EPILOG


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    import uvicorn

    from fastvideo_grpo.rewards import registry
    from fastvideo_grpo.rewards.placement.entries import check_device
    from fastvideo_grpo.rewards.placement.server import RewardPool, application, is_loopback

    params = parse_params(arguments.kind, arguments.params)
    for name in ("workers", "max_mib", "timeout"):
        if not 0 < getattr(arguments, name) < 1e7:  # as rewards.timeout_s: nobody can wait longer
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be above 0 and below 1e7")
    token = os.environ.get(arguments.token_variable) or None
    if token is None and not is_loopback(arguments.host):
        raise UserError(
            f"--host is {arguments.host}, which other machines reach, and {arguments.token_variable} is not set: set it to a "
            f"long random word, here and where the run is (for example {arguments.token_variable}=$(openssl rand -hex 32))"
        )
    names = arguments.devices.split(",")
    try:
        for device in names:
            check_device("--devices", device)
        registry.check(arguments.kind, checkpoint=arguments.checkpoint, params=params)
        registry.check_types(arguments.kind, params)
    except ValueError as error:
        raise UserError(str(error)) from error
    listener = _listen(arguments.host, arguments.port)
    devices = [device for device in names for _ in range(arguments.workers)]
    try:
        pool = RewardPool(
            arguments.kind, checkpoint=arguments.checkpoint, params=params, devices=devices, timeout_s=arguments.timeout
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        app = application(pool, token=token, max_bytes=arguments.max_mib * 2**20)
        listener.listen(128)  # from here on who connects is served, once the line below is printed and the server runs
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(
            f"{arguments.kind} ({', '.join(pool.outputs)}; {pool.media_kind}) on http://{host}:{port}, {len(devices)} "
            f"process(es) on {arguments.devices}, {'with' if token else 'without'} a token; Ctrl-C ends it",
            flush=True,
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        server.run(sockets=[listener])
    finally:
        pool.close()
    return 0


def parse_params(kind: str, pairs: list[str]) -> dict[str, Any]:
    """``key=value`` as the configuration reads them: numbers, true, false, null, lists; else text, in paths expanded.

    Raises:
        UserError: an entry is not of that form, or a path cannot be expanded.
    """
    from fastvideo_grpo.config.loading import reward_params

    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"{pair!r} must be written key=value, for example batch_size=16")
    return reward_params(kind, pairs)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error}; another one: --port 0") from error
    return listener
