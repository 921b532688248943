"""A user's own DeepSpeed JSON beside our keys: what says the same is taken, what tunes goes through, what contradicts
is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo_grpo.config.keys import OptimConfig
from fastvideo_grpo.errors import ConfigError

# Adam's sections of the optimizer's parameters that choose an implementation of the same step.
_SAME_STEP = ("torch_adam", "foreach", "fused")
# Sections of which nothing reaches DeepSpeed: the optimiser and its learning rate are handed over as objects, fp16 is off.
_OURS_ALONE = ("optimizer", "scheduler", "fp16", "bfloat16")


@dataclass(frozen=True)
class Stated:
    """A DeepSpeed key whose value follows from our keys.

    Attributes:
        key: dotted, as in the JSON.
        values: what the JSON may say, ours first.
        source: our key and its value, for the message.
        way_out: what to do about another value.
    """

    key: str
    values: tuple[Any, ...]
    source: str
    way_out: str = ""


def merge_json(config: dict[str, Any], path: str | os.PathLike[str], stated: list[Stated]) -> dict[str, Any]:
    """`config` with the keys of a DeepSpeed JSON laid over it.

    "auto" (or null), anywhere, means what is there without the key. A key in `stated` may repeat what we say. All other
    keys are DeepSpeed's business and reach it as they are.

    Raises:
        ConfigError: the file cannot be read or is no JSON object; a value contradicts `stated`, each with both sides and
            what to do.
    """
    try:
        extra = json.loads(Path(path).read_text())
    except (OSError, ValueError) as failure:
        raise ConfigError(f"engine.deepspeed_json {path} cannot be read: {failure}") from failure
    if not isinstance(extra, dict):
        raise ConfigError(f"engine.deepspeed_json {path} holds a {type(extra).__name__}; DeepSpeed takes an object")
    extra = _without_auto(extra)
    problems = []
    sections = {key.rpartition(".")[0] for key in (entry.key for entry in stated)} - {""}
    for section in sorted(sections):
        value = _take(extra, section, keep=True)
        if value is not None and not isinstance(value, dict):
            problems.append(f"{section} is {_text(value)}; it is an object in DeepSpeed's configuration")
    if not problems:
        for entry in stated:
            value = _take(extra, entry.key)
            if value is not None and not any(_same(value, allowed) for allowed in entry.values):
                way_out = entry.way_out or f'set it to "auto" or {_text(entry.values[0])}, leave it out, or change ours'
                problems.append(f"{entry.key} is {_text(value)}, but {entry.source}: {way_out}")
        for name in ("optimizer", "scheduler"):
            left = extra.get(name, {})
            for key, value in [*left.items(), *left.get("params", {}).items()]:
                if key != "params" and not (name == "optimizer" and key in _SAME_STEP):
                    where = name if key in left else f"{name}.params"
                    problems.append(f"{where}.{key} is {_text(value)}, which has no counterpart in optim.*: leave it out")
    if problems:
        raise ConfigError(f"engine.deepspeed_json {path}: " + "; ".join(problems))
    for name in _OURS_ALONE:
        extra.pop(name, None)
    zero = extra.get("zero_optimization", {})
    for name in ("offload_optimizer", "offload_param"):
        if name not in config["zero_optimization"]:
            zero.pop(name, None)  # it said "none", as we do; how it would be tuned is moot
    return _laid_over(config, extra)


def optimizer_stated(optim: OptimConfig) -> list[Stated]:
    """What the JSON's `optimizer` and `scheduler` may say beside our AdamW with its linear warm-up."""
    lr, warmup = optim.lr, optim.warmup_steps or 0
    ours = "the optimiser here is torch's AdamW"
    remove = "leave the section out"
    stated = [
        Stated("optimizer.type", ("AdamW", "Adam", "adamw", "adam"), ours, remove),
        Stated("optimizer.params.lr", (lr,), f"optim.lr is {lr}"),
        Stated("optimizer.params.betas", (list(optim.betas),), f"optim.betas is {list(optim.betas)}"),
        Stated("optimizer.params.weight_decay", (optim.weight_decay,), f"optim.weight_decay is {optim.weight_decay}"),
        Stated("optimizer.params.eps", (1e-8,), f"{ours} with eps 1e-8", 'set it to "auto" or leave it out'),
        # DeepSpeed's "Adam" is AdamW unless this says otherwise.
        Stated("optimizer.params.adam_w_mode", (True,), ours, "set it to true or leave it out"),
        Stated("optimizer.params.amsgrad", (False,), f"{ours} without amsgrad", "leave it out"),
        Stated("optimizer.params.bias_correction", (True,), f"{ours} with bias correction", "leave it out"),
        Stated(
            "scheduler.type",
            ("WarmupLR",),
            "the learning rate rises linearly over optim.warmup_steps and then stays",
            "leave the section out and set optim.warmup_steps",
        ),
        Stated("scheduler.params.warmup_min_lr", (0,), "the warm-up begins at 0", 'set it to "auto" or leave it out'),
        Stated("scheduler.params.warmup_max_lr", (lr,), f"optim.lr is {lr}"),
        Stated("scheduler.params.warmup_num_steps", (warmup,), f"optim.warmup_steps is {warmup}"),
        Stated(
            "scheduler.params.warmup_type",
            ("linear",) if warmup > 1 else ("linear", "log"),
            "the warm-up of optim.warmup_steps is linear",
            'set it to "linear" or leave it out',
        ),
    ]
    return stated


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(entry) for key, entry in value.items() if entry is not None and entry != "auto"}
    return value


def _take(values: dict[str, Any], dotted: str, keep: bool = False) -> Any:
    """The value of a dotted key (None: not there), taken out unless `keep`."""
    *path, last = dotted.split(".")
    for name in path:
        found = values.get(name)
        if not isinstance(found, dict):
            return None
        values = found
    return values.get(last) if keep else values.pop(last, None)


def _same(value: Any, ours: Any) -> bool:
    # JSON's true is not 1 to anyone who wrote it.
    return value == ours and isinstance(value, bool) == isinstance(ours, bool)


def _laid_over(config: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _laid_over(merged[key], value) if both else value
    return merged


def _text(value: Any) -> str:
    return json.dumps(value)
