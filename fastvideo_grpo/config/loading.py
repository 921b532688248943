"""From YAML files and dotted overrides to a checked configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastvideo_grpo import launcher
from fastvideo_grpo.config import files, values
from fastvideo_grpo.config.checks import check
from fastvideo_grpo.config.files import Given
from fastvideo_grpo.config.keys import Config, RewardConfig
from fastvideo_grpo.config.paths import expanded
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.extensions import Registry
from fastvideo_grpo.grpo import objectives
from fastvideo_grpo.rewards import registry

logger = logging.getLogger(__name__)


def load(path: str | Path, overrides: list[str] | None = None, *, models: Registry[Any]) -> Config:
    """Read a YAML file, apply ``key=value`` overrides, and check every value on its own and against the others.

    A top-level ``base: FILE`` (relative to the file) is read first and overridden. Relative paths in values are relative to
    the working directory. docs/configuration.md says what is a text, how paths are expanded, and how rewards are removed.

    Args:
        models: what ``model.kind`` may name; the chosen one's ``defaults`` lie under what the file says.

    Raises:
        ConfigError: unknown key, wrong type, value out of range, missing key, impossible combination.
        FileNotFoundError: no such file.
    """
    return _built([given for _, given in files.read(Path(path))], overrides, models)


def build(nested: Mapping[str, Any], overrides: list[str] | None = None, *, models: Registry[Any]) -> Config:
    """Like :func:`load`, from nested values in place of a file; paths among them are taken as they are.

    Raises:
        ConfigError: as :func:`load` does.
    """
    return _built([Given.of(nested)], overrides, models)


def _built(layers: list[Given], overrides: list[str] | None, models: Registry[Any]) -> Config:
    given = _layered([*layers, values.of_words(Config, overrides or [])])
    of_objective = _defaults(given, "grpo", "objective", objectives.OBJECTIVES)
    of_model = _defaults(given, "model", "kind", models)
    config = filled(_layered([of_objective, of_model, given]))
    check(config, models.names())
    return config


def _layered(layers: list[Given]) -> Given:
    merged = Given({})
    for layer in layers:
        merged = values.layered(Config, merged, _without_foreign_eval_path(merged, layer))
    return merged


def _without_foreign_eval_path(lower: Given, upper: Given) -> Given:
    """Prompts kept out of a recipe's list are not kept out of another: where ``upper`` sets prompts.path and says nothing of
    prompts.eval_path, that of ``lower`` goes, with a word."""
    before, now = (_inside(given, "prompts") for given in (lower, upper))
    if not ("path" in now and {"path", "eval_path"} <= before.keys()) or "eval_path" in now:
        return upper
    kept_out = before["eval_path"].value
    if kept_out is None or now["path"].value == before["path"].value:
        return upper
    if launcher.rank() == 0:
        logger.warning(
            "prompts.eval_path=%s goes with prompts.path=%s, which is %s now: no prompts are kept out, and pictures are of %s; "
            "set prompts.eval_path, too, to have some",
            *(kept_out, before["path"].value, now["path"].value, now["path"].value),
        )
    prompts = replace(upper.value["prompts"], value={**now, "eval_path": Given(None, typed=False)})
    return replace(upper, value={**upper.value, "prompts": prompts})


def _defaults(given: Given, section: str, name: str, registry: Registry[Any]) -> Given:
    """What the thing named by a key has instead of other keys' own defaults."""
    chosen = _inside(given, section).get(name)
    if chosen is None or chosen.value not in registry.names():
        return Given({})  # told with all other wrong values, or left out
    key = f"{section}.{name}"
    try:
        defaults = getattr(registry[chosen.value], "defaults", {})
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
    found = Given.of(dict(defaults))
    problems = values.filled(Config, found).problems
    if problems:
        raise ConfigError(f"{key}={chosen.value} brings defaults that cannot be: {'; '.join(problems)}")
    return found


def filled(given: Given) -> Config:
    """The configuration of what was given, over the keys' own defaults.

    Raises:
        ConfigError: unknown key, wrong type, missing key.
    """
    problems: list[str] = []
    for name, entry in _inside(given, "rewards", "models").items():
        kind = _inside(entry).get("kind")
        if kind is not None:
            problems += _expand_params(kind.value, _inside(entry, "params"), f"rewards.models.{name}.params")
    found = values.filled(Config, given)
    problems += found.problems
    if found.missing and not problems:  # a misspelt key, told alone, is often the one that is missing
        problems.append(f"missing: {'; '.join(found.missing)}")
    if problems:
        raise ConfigError("\n".join(problems))
    config: Config = found.config
    return config


def reward_params(kind: str, words: Sequence[str]) -> dict[str, Any]:
    """``rewards.models.NAME.params`` of a reward of ``kind`` from ``key=value`` words.

    Raises:
        ConfigError: a value is no YAML, or a path cannot be expanded.
    """
    params = _inside(values.of_words(RewardConfig, [f"params.{word}" for word in words]), "params")
    problems = list(_expand_params(kind, params, "params"))
    if problems:
        raise ConfigError("\n".join(problems))
    return {name: value.plain() for name, value in params.items()}


def _expand_params(kind: Any, params: dict[str, Given], prefix: str) -> Iterator[str]:
    """Expand the paths among a reward's parameters, in place; what is wrong with them."""
    for name in sorted(registry.paths(kind) & params.keys()) if isinstance(kind, str) else ():
        value = params[name]
        if not isinstance(value.value, str) or not value.typed:
            continue
        try:
            params[name] = replace(value, value=expanded(value.value))
        except ValueError as error:
            yield f"{prefix}.{name} is {value.shown()}{value.place}: {error}"


def _inside(given: Given | None, *path: str) -> dict[str, Given]:
    """What is given under a path; nothing where there is no section."""
    for part in path:
        given = _inside(given).get(part)
    return given.value if given is not None and isinstance(given.value, dict) else {}
