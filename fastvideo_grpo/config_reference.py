"""docs/configuration.md, printed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from functools import reduce
from typing import Any, get_args, get_type_hints

from fastvideo_grpo.config import REQUIRED, Config
from fastvideo_grpo.config_values import name_in_file
from fastvideo_grpo.families import FAMILIES
from fastvideo_grpo.grpo.objectives import OBJECTIVES


def reference() -> str:
    """Every key with default and meaning, as Markdown (docs/configuration.md)."""
    lines = []
    for section in fields(Config):
        cls = get_type_hints(Config)[section.name]
        lines += [f"## {section.name}", "", str(cls.__doc__), "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        lines += list(_reference_rows(cls, section.name + "."))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _reference_rows(cls: type[Any], prefix: str) -> Iterator[str]:
    for f in fields(cls):
        hint = get_type_hints(cls)[f.name]
        inner = next((a for a in (hint, *get_args(hint)) if is_dataclass(a)), None)
        default = f.default if f.default_factory is NO_DEFAULT else f.default_factory()
        shown = "required" if default is REQUIRED else "null" if default is None else str(default)
        if is_dataclass(default):
            shown = ""
        known = f.metadata["choices"]
        bounds = {"minimum": "at least", "above": "above", "maximum": "at most"}
        limits = [f"{words} {f.metadata[name]}" for name, words in bounds.items() if name in f.metadata]
        allowed = ", ".join((known() if callable(known) else known) if known is not None else limits)
        key = prefix + name_in_file(f.name)
        yield f"| `{key}` | {shown} | {allowed} | {f.metadata['help']}{_left_out(key)} |"
        if isinstance(inner, type):
            yield from _reference_rows(inner, f"{prefix}{f.name}.{'NAME.' if isinstance(default, dict) else ''}")


def _left_out(key: str) -> str:
    """What models and objectives have in place of the key's own default."""
    parts = []
    for sort, registry in (("", FAMILIES), ("objective ", OBJECTIVES)):
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


if __name__ == "__main__":
    print("# Configuration\n\nEvery key of a run, as `fastvideo_grpo/config.py` defines it; this page is printed from there")
    print("(`python -m fastvideo_grpo.config_reference > docs/configuration.md`).\n")
    print(reference(), end="")
