"""Weights & Biases, on rank 0 only."""

from __future__ import annotations

import configparser
import contextlib
import json
import netrc
import os
import secrets
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from fastvideo_grpo.disk.durable_files import write_atomic
from fastvideo_grpo.errors import UserError


def missing_key(mode: str) -> str | None:
    """What is wrong where ``mode`` is ``online`` and nobody is logged in; None: nothing is. Looks into the environment and the
    files where ``wandb login`` leaves a key, imports nothing and asks no server."""
    if mode != "online" or any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return None
    settings = _settings()
    url = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or "https://api.wandb.ai"
    if settings.get("api_key") or _in_netrc(urlsplit(url).netloc):
        return None
    return (
        f"run.wandb is online, but there is no key for {url} (WANDB_API_KEY, or an entry in {_netrc_file()}): call `wandb "
        "login`, or set run.wandb=offline and call `wandb sync` later"
    )


def _settings() -> dict[str, str]:
    """wandb's own settings, of the user and of the working directory."""
    parser = configparser.ConfigParser(interpolation=None)
    user = Path(os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb"))
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):  # wandb does without them, too
        parser.read([user / "settings", Path(os.environ.get("WANDB_DIR") or ".") / "wandb" / "settings"], encoding="utf-8")
    return dict(parser["default"]) if "default" in parser else {}


def _netrc_file() -> Path:
    places = [Path(os.path.expanduser(place)) for place in (os.environ.get("NETRC") or "~/.netrc", "~/_netrc")]
    return places[1] if places[1].exists() and not places[0].exists() and not os.environ.get("NETRC") else places[0]


def _in_netrc(host: str) -> bool:
    try:
        found = netrc.netrc(_netrc_file()).authenticators(host)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
    return bool(found and found[2])


def _identity(file: Path) -> str:
    """wandb's id of a run: what an earlier start left, or a new one."""
    if not file.is_file():
        return secrets.token_hex(4)
    try:
        return str(json.loads(file.read_bytes())["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged, and says which run of Weights & Biases this one goes on with: remove it to begin a new one"
        ) from error


class WandbRun:
    """A wandb run that a resumed training continues; with mode ``disabled`` nothing is imported and every call is a no-op.

    Args:
        mode: ``disabled``, ``offline`` (written under the run folder, uploaded with ``wandb sync``) or ``online``.
        folder: the run's folder; the wandb id is kept in ``wandb.json`` there.

    Raises:
        UserError: wandb does not begin (a key of another form, no server), or ``wandb.json`` is damaged.
    """

    def __init__(self, mode: str, folder: Path, config: dict[str, Any]) -> None:
        self._run: Any = None
        if mode == "disabled":
            return
        import wandb

        self._wandb = wandb
        known = folder / "wandb.json"
        identity = _identity(known)
        try:
            self._run = wandb.init(
                project="fastvideo_grpo",
                name=folder.name,
                id=identity,
                resume="allow",
                mode=cast(Literal["offline", "online"], mode),
                dir=folder,
                config=config,
            )
        except wandb.errors.Error as error:
            raise UserError(f"run.wandb={mode}: {error}; repair it, or set run.wandb=offline or disabled") from error
        write_atomic(known, json.dumps({"id": identity}).encode())

    def log(self, metrics: dict[str, Any]) -> None:
        """Log the metrics of an iteration, under its number."""
        if self._run is not None:
            numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
            self._run.log(numbers, step=metrics["iteration"])

    def log_pictures(self, iteration: int, files: list[Path], captions: list[str]) -> None:
        """Log captioned pictures, or clips (files that end in ``.mp4``), under an iteration."""
        if self._run is not None:
            # By path: from arrays wandb would encode clips itself, with a library that this project does not need.
            samples = [
                self._wandb.Video(str(file), caption=text, format="mp4")
                if file.suffix == ".mp4"
                else self._wandb.Image(str(file), caption=text)
                for file, text in zip(files, captions, strict=True)
            ]
            self._run.log({"samples": samples}, step=iteration)

    def finish(self) -> None:
        """Flush and close."""
        if self._run is not None:
            self._run.finish()
