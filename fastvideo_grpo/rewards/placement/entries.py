"""Entries of ``rewards.models``: what their keys allow together, and the reward made where it belongs (``placement``)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch

from fastvideo_grpo.errors import UserError, one_line
from fastvideo_grpo.rewards import registry
from fastvideo_grpo.rewards.base import Reward
from fastvideo_grpo.rewards.placement.http import TOKEN_VARIABLE, HttpReward
from fastvideo_grpo.rewards.placement.inline import InlineReward
from fastvideo_grpo.rewards.placement.process import ProcessReward, find_python
from fastvideo_grpo.rewards.placement.process_settings import process_settings_kept

logger = logging.getLogger(__name__)

PLACEMENTS = ("inline", "process", "http")
# Keys of an entry of rewards.models that only some placements have.
_ONLY = {
    "checkpoint": ("inline", "process"),
    "params": ("inline", "process"),
    "python": ("process",),
    "device": ("process",),
    "url": ("http",),
    "token_variable": ("http",),
}


def get(entry: Any, key: str) -> Any:
    """A key of an entry that is a mapping or a dataclass; None where it is left out."""
    return entry.get(key) if isinstance(entry, Mapping) else getattr(entry, key, None)


def check_placement(model: str, entry: Any) -> tuple[str, ...] | None:
    """Check an entry's kind, and the keys that go with its placement; loads nothing and opens no file.

    Returns:
        The outputs of the reward, where they can be known before it is made.

    Raises:
        ValueError: with the key.
    """
    placement, kind = get(entry, "placement") or "inline", get(entry, "kind")
    if placement not in PLACEMENTS:
        raise ValueError(f"rewards.models.{model}.placement is {placement!r}; allowed: {', '.join(PLACEMENTS)}")
    if not isinstance(kind, str):
        raise ValueError(f"rewards.models.{model}.kind is {kind!r}; set it to one of {', '.join(registry.kinds())}")
    for key, placements in _ONLY.items():
        if get(entry, key) and placement not in placements:
            where = "the server has its own (fastvideo-grpo serve-reward)" if placement == "http" else "remove it"
            raise ValueError(
                f"rewards.models.{model}.{key} is for placement={' or '.join(placements)}, not {placement}; {where}"
            )
    if get(entry, "device"):
        check_device(f"rewards.models.{model}.device", get(entry, "device"))
    if placement == "http":
        if not get(entry, "url"):
            raise ValueError(
                f"rewards.models.{model}.url is missing; placement=http needs it, for example http://127.0.0.1:8800"
            )
        if not re.match(r"https?://[^/\s]", get(entry, "url")):
            raise ValueError(f"rewards.models.{model}.url is {get(entry, 'url')!r}; it must be like http://127.0.0.1:8800")
        return None
    if get(entry, "python"):
        return None  # the kind may be known in that environment only
    try:
        factory = registry.check(kind, checkpoint=get(entry, "checkpoint"), params=get(entry, "params"))
        registry.check_types(kind, get(entry, "params") or {})
    except ValueError as error:
        raise ValueError(f"rewards.models.{model}: {error}") from error
    known = getattr(factory, "outputs", None)
    return known if isinstance(known, tuple) else None


def check_device(name: str, device: str) -> None:
    """Raise ValueError, with the key or option ``name``, for what is no device of torch; whether it is there, nobody looks."""
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{name} is {device!r}; it must be a device, for example cpu or cuda:1") from error


def check_here(model: str, entry: Any, frames: int) -> None:
    """Raise ValueError, naming the entry, where what a checked entry needs beside its files is not there: the other
    environment's interpreter, the server, which has to look at media of ``frames`` frames."""
    try:
        if get(entry, "python"):
            find_python(get(entry, "python"))
        if get(entry, "placement") != "http":
            return
        served = _http(entry, timeout_s=60.0)
        served.close()
    except ValueError as error:
        raise ValueError(f"rewards.models.{model}: {error}") from error
    check_media(model, served.media_kind, frames)


def check_kind_of_media(model: str, entry: Any, frames: int) -> None:
    """Raise ValueError where the class of a checked entry's kind says that it cannot look at media of ``frames`` frames. Of a
    kind that is known elsewhere only (``python``, a server), nothing is known."""
    if get(entry, "python") or get(entry, "placement") == "http":
        return
    media_kind = getattr(registry.REWARDS[get(entry, "kind")], "media_kind", None)
    if isinstance(media_kind, str):
        check_media(model, media_kind, frames)


def check_media(model: str, media_kind: str, frames: int) -> None:
    """Raise ValueError where a reward that looks at ``media_kind`` cannot look at media of ``frames`` frames."""
    if {"image": frames > 1, "video": frames == 1}.get(media_kind, False):
        raise ValueError(
            f"rewards.models.{model} scores {media_kind}s, but the model makes {frames} frame(s) (sample.frames); use a reward "
            f"for {'images' if frames == 1 else 'videos'}"
        )


def _http(entry: Any, timeout_s: float) -> HttpReward:
    variable = get(entry, "token_variable") or TOKEN_VARIABLE
    return HttpReward(get(entry, "kind"), url=get(entry, "url"), timeout_s=timeout_s, token_variable=variable)


def place(model: str, entry: Any, *, device: torch.device, offload_idle: bool, timeout_s: float) -> Reward:
    """Make the reward of a checked entry where it belongs.

    Args:
        device: of this process; an entry's own ``device`` wins.
        offload_idle: an inline reward waits in host memory.
        timeout_s: seconds for a request.

    Raises:
        ValueError: naming the entry, whatever went wrong; what is no error for the user is logged with its traceback.
    """
    try:
        return _place(entry, device=device, offload_idle=offload_idle, timeout_s=timeout_s)
    except (ValueError, UserError, OSError, ImportError) as error:  # what rewards raise for the user
        raise ValueError(f"rewards.models.{model}: {error}") from error
    except KeyboardInterrupt:  # this is the main thread: it may be Ctrl-C
        raise
    except BaseException as error:  # sys.exit too
        logger.error("rewards.models.%s could not be made", model, exc_info=error)
        raise ValueError(f"rewards.models.{model} could not be made: {one_line(error)}") from error


def _place(entry: Any, *, device: torch.device, offload_idle: bool, timeout_s: float) -> Reward:
    kind, placement = get(entry, "kind"), get(entry, "placement") or "inline"
    made = {"checkpoint": get(entry, "checkpoint"), "params": get(entry, "params")}
    if placement == "inline":
        with process_settings_kept():
            reward = registry.create(kind, **made)
            return InlineReward(reward, timeout_s=timeout_s, device=device, offload_idle=offload_idle)
    if placement == "process":
        place_at = get(entry, "device") or device
        return ProcessReward(kind, **made, python=get(entry, "python"), device=place_at, timeout_s=timeout_s)
    # The client's limit is for each sign of the server; one that drips its answer needs a limit on the whole.
    return InlineReward(_http(entry, timeout_s), timeout_s=1.1 * timeout_s + 1)
