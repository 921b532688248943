"""docs/configuration.md, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from functools import reduce
from typing import Any, get_args, get_type_hints

from fastvideo_grpo.config.keys import REQUIRED, Config
from fastvideo_grpo.config.values import name_in_file
from fastvideo_grpo.extensions import Registry
from fastvideo_grpo.grpo.objectives import OBJECTIVES

HEAD = """\
# Configuration

Every key of a run, as `fastvideo_grpo/config/keys.py` defines it; this page is written from there
(`python docs/configuration.py`).

A run is a YAML file and, over it, `key=value` words of the command line, of which the last counts where a key comes twice
(in a shell that has run `. .venv/bin/activate`):

    fastvideo-grpo train my_run.yaml optim.lr=3e-4 sample.negative_prompt='blurry, #1' rewards.models.hps=null

**Texts.** On the command line a text (also a path, or a choice such as `model.precision`) is what stands behind the first
`=`, as it is: `no` is "no", `0123` is "0123", nothing is the empty text, and quotes that the shell leaves stay. Only `null` is
no text, where a key may be null. In a file YAML reads `no`, `0123`, `1e5` or `2024-11-27` as something else than a text: there
they need quotes, and without them they are refused. `${...}` is not replaced. All other values are YAML in both places:
numbers, `true`, `[a, b]`, `{top: 1, bottom: 1}`.

**Paths** (the tables say which keys are, [rewards.md](rewards.md) which parameters of rewards). A leading `~` or `~USER` is
that home, `$NAME` and `${NAME}` are variables of the environment, `$$` is a dollar sign; a home or variable that is not there
is an error, and so is an empty path. So it is in files, on the command line, and in every argument of a command that is a path.
A relative path is relative to the working directory. The `config.yaml` that a run writes has them expanded.

**`base: FILE`** at the top of a file names another one, relative to it, that is read first; the file then says what is
different. Sections are merged key by key. A section that is left empty says nothing; null unsets what may be null, and
so does nothing behind its colon.

**Rewards** (and their `outputs`) have names. `rewards.models.hps=null` removes one, `rewards.models=null` all of them, here or
in a file with a `base:`. An entry that is given another `kind` starts anew: its other keys were those of the kind before.

    bash train_scripts/flux_t2i.sh released rewards.models.hps=null rewards.models.size.kind=jpeg_size
    bash train_scripts/flux_t2i.sh released rewards.models.hps.kind=pickscore rewards.models.hps.checkpoint=~/PickScore_v1

"""


def reference(models: Registry[Any]) -> str:
    """Every key with default and meaning, as Markdown (docs/configuration.md).

    Args:
        models: what ``model.kind`` may name.
    """
    lines = []
    for section in fields(Config):
        cls = get_type_hints(Config)[section.name]
        lines += [f"## {section.name}", "", str(cls.__doc__), "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        lines += list(_reference_rows(cls, section.name + ".", models))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _reference_rows(cls: type[Any], prefix: str, models: Registry[Any]) -> Iterator[str]:
    for f in fields(cls):
        hint = get_type_hints(cls)[f.name]
        inner = next((a for a in (hint, *get_args(hint)) if is_dataclass(a)), None)
        default = f.default if f.default_factory is NO_DEFAULT else f.default_factory()
        shown = "required" if default is REQUIRED else "null" if default is None else str(default)
        if is_dataclass(default):
            shown = ""
        key = prefix + name_in_file(f.name)
        known = models.names if key == "model.kind" else f.metadata["choices"]
        bounds = {"minimum": "at least", "above": "above", "maximum": "at most"}
        limits = [f"{words} {f.metadata[name]}" for name, words in bounds.items() if name in f.metadata]
        limits += ["a path"] * f.metadata["path"]
        allowed = ", ".join((known() if callable(known) else known) if known is not None else limits)
        yield f"| `{key}` | {shown} | {allowed} | {f.metadata['help']}{_left_out(key, models)} |"
        if isinstance(inner, type):
            yield from _reference_rows(inner, f"{prefix}{f.name}.{'NAME.' if isinstance(default, dict) else ''}", models)


def _left_out(key: str, models: Registry[Any]) -> str:
    """What models and objectives have in place of the key's own default."""
    parts = []
    for sort, registry in (("", models), ("objective ", OBJECTIVES)):
        kinds: dict[str, list[str]] = {}
        for name, thing in registry.usable().items():
            value = reduce(
                lambda values, part: values.get(part) if isinstance(values, Mapping) else None,
                key.split("."),
                getattr(thing, "defaults", {}),
            )
            if value is not None and not isinstance(value, Mapping):
                kinds.setdefault(str(value), []).append(name)
        parts += [f"{sort}{', '.join(names)}: {value}" for value, names in kinds.items()]
    return f" ({'; '.join(parts)} if left out)" if parts else ""
