"""From what was given (files, ``key=value`` words, Python) to a configuration's dataclasses: layers, types, and what is wrong.

What a key is comes from its field: the type, and ``path=True`` beside it. Nothing here knows the keys by name.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from fastvideo_grpo.characters import unusable
from fastvideo_grpo.config.files import Given, parse
from fastvideo_grpo.config.paths import as_typed, expanded
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.extensions import nearest

LARGEST_SEED = 2**63 - 1
"""torch's generators take no larger one."""
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Key:
    """What is known of a key: its sort, whether null unsets it, and what its field says.

    ``sort``: "section" (of a dataclass ``of``), "names" (name -> section ``of``), "free" (any mapping), "list" (of values of
    the type ``of``), "text", "whole", "number", "truth", and inside of free ones "any".
    """

    sort: str
    optional: bool
    of: Any = None
    metadata: Any = field(default_factory=dict)

    @property
    def help(self) -> str:
        """`` (MEANING)``, or nothing."""
        return f" ({self.metadata['help']})" if self.metadata.get("help") else ""


_SORTS = {str: "text", int: "whole", float: "number", bool: "truth"}


_keys: dict[type[Any], dict[str, tuple[str, Key]]] = {}  # found once: a configuration asks some hundred times


def keys(cls: type[Any]) -> dict[str, tuple[str, Key]]:
    """The keys of a section: name as files have it -> (name of the field, what is known of it). Not to be changed."""
    if cls not in _keys:
        hints = get_type_hints(cls)
        _keys[cls] = {name_in_file(f.name): (f.name, _key_of(hints[f.name], f.metadata)) for f in fields(cls)}
    return _keys[cls]


def _key_of(hint: Any, metadata: Any) -> Key:
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    optional = type(None) in alternatives
    (hint,) = (one for one in alternatives if one is not type(None))
    if is_dataclass(hint):
        return Key("section", optional, hint, metadata)
    if get_origin(hint) is dict:
        inner = get_args(hint)[1]
        return Key("names" if is_dataclass(inner) else "free", optional, inner, metadata)
    if get_origin(hint) is list:
        return Key("list", optional, get_args(hint)[0], metadata)
    return Key(_SORTS[hint], optional, None, metadata)


def name_in_file(name: str) -> str:
    """A field's name as files have it."""
    return name.rstrip("_")


def known_keys(cls: type[Any], prefix: str = "") -> Iterator[str]:
    """All keys of a section and those below it, as files have them; ``*`` stands for a name that a run gives."""
    for name, (_, key) in keys(cls).items():
        yield prefix + name
        if key.sort in ("section", "names"):
            yield from known_keys(key.of, f"{prefix}{name}{'.*' if key.sort == 'names' else ''}.")


# --- what was given ---------------------------------------------------------------------------------------------------------


def of_words(cls: type[Any], words: Sequence[str]) -> Given:
    """What ``key=value`` words give. A text is what stands behind the first ``=``, as it is; other values are YAML.

    Raises:
        ConfigError: a word is none of that form, or a value no YAML.
    """
    tree = Given({})
    for word in words:
        dotted, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"override {word!r} must be written key=value, for example run.iterations=10")
        *above, last = dotted.split(".")
        node = tree
        for part in above:
            inner = node.value.get(part)
            if inner is None or not isinstance(inner.value, dict):
                # A null before says that what is below counts no more.
                inner = node.value[part] = Given({}, anew=inner is not None and inner.value is None)
            node = inner
        node.value[last] = _of_word(_key_at(cls, [*above, last]), dotted, text)
    return tree


def _of_word(key: Key | None, dotted: str, text: str) -> Given:
    if key is None:
        return Given(text)  # told as unknown
    if key.sort == "text":
        return Given(None, text) if key.optional and text == "null" else Given(text)
    if key.sort in ("whole", "number", "truth"):
        bare = text.strip()
        return Given(None if bare in ("null", "~") else bare, bare)
    if not text.strip():
        raise ConfigError(f"{dotted}= is empty; it must be {_wanted(key)}{key.help}")
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{dotted}={Given(text).plain()}: {str(error).removeprefix('the value: ')}{key.help}") from error


def _key_at(cls: type[Any], path: Sequence[str]) -> Key | None:
    """What is known of the key at a path; None: there is none."""
    key: Key | None = Key("section", False, cls)
    for part in path:
        if key is None or key.sort not in ("section", "names", "free", "any"):
            return None
        key = _inner(key, part)
    return key


def layered(cls: type[Any], below: Given, above: Given) -> Given:
    """``above`` over ``below``. Sections are merged key by key; a name (of a reward, of an output) that is null is removed, and
    an entry that is given another ``kind`` starts anew.

    Raises:
        ConfigError: a name is removed that is not there.
    """
    return _layered(Key("section", False, cls), below, above, ())


def _layered(key: Key, below: Given | None, above: Given, path: tuple[str, ...]) -> Given:
    if not isinstance(above.value, dict):
        if key.sort in ("section", "names", "free") and not key.optional and _left_empty(above):
            return below or Given({}, where=above.where)
        return Given({}, where=above.where) if key.sort == "names" and above.value is None else above
    merged = dict(below.value) if below is not None and isinstance(below.value, dict) and not above.anew else {}
    for name, value in above.value.items():
        inner, under = _inner(key, name), merged.get(name)
        if key.sort == "names" and value.value is None and not _left_empty(value):
            if under is None:
                dotted, there = ".".join((*path, name)), ", ".join(merged) or "none"
                raise ConfigError(
                    f"{dotted}=null{value.place} removes what is not there{nearest(name, merged)}; there are: {there}"
                )
            del merged[name]
            continue
        if key.sort == "names" and under is not None and _of_another_kind(under, value):
            under = None  # its other keys were those of the other kind
        merged[name] = value if inner is None else _layered(inner, under, value, (*path, name))
    return Given(merged, where=above.where)


def _left_empty(given: Given) -> bool:
    """Whether a file has a key with nothing behind it."""
    return given.value is None and given.text == ""


def _of_another_kind(below: Given, above: Given) -> bool:
    kinds = [entry.value["kind"].value for entry in (below, above) if isinstance(entry.value, dict) and "kind" in entry.value]
    return len(kinds) == 2 and kinds[0] != kinds[1]


def _inner(key: Key, name: str) -> Key | None:
    """What is known of a key inside of ``key``; None: it is no key, which is told later."""
    if key.sort == "section":
        return keys(key.of)[name][1] if name in keys(key.of) else None
    return Key("section", False, key.of) if key.sort == "names" else Key("any", True)


# --- filling dataclasses ----------------------------------------------------------------------------------------------------


@dataclass
class Filled:
    """A dataclass filled from what was given, the required keys that nobody gave, and what is wrong."""

    config: Any
    missing: list[str]
    problems: list[str]


def filled(cls: type[Any], given: Given) -> Filled:
    """``given`` as an object of the dataclass ``cls``, whose keys' own defaults stand for what is left out."""
    filling = _Filling(cls)
    return Filled(filling.section(Key("section", False, cls), given, ()), sorted(filling.missing), filling.problems)


class _Filling:
    def __init__(self, cls: type[Any]) -> None:
        self.cls = cls
        self.missing: list[str] = []
        self.problems: list[str] = []

    def wrong(self, path: tuple[str, ...], key: Key, given: Given, must: str | None = None) -> None:
        shown = given.shown()
        self.problems.append(f"{'.'.join(path)} is {shown}{given.place}; it must be {must or _wanted(key)}{key.help}")

    def section(self, section: Key, given: Given, path: tuple[str, ...]) -> Any:
        if not isinstance(given.value, dict):
            self.wrong(path, section, given)
            return section.of()
        known, values = keys(section.of), {}
        for name, value in given.value.items():
            if name in known:
                field_name, key = known[name]
                values[field_name] = self.value(key, value, (*path, name))
            else:
                self.unknown(section, value, (*path, name))
        for f in fields(section.of):
            if f.metadata.get("required") and f.name not in values:
                key = known[name_in_file(f.name)][1]
                self.missing.append(f"{'.'.join((*path, name_in_file(f.name)))}{key.help}")
        # A required key inside a section that nobody gave.
        for name, (field_name, key) in known.items():
            if key.sort == "section" and not key.optional and field_name not in values:
                values[field_name] = self.section(key, Given({}), (*path, name))
        return section.of(**values)

    def unknown(self, section: Key, given: Given, path: tuple[str, ...]) -> None:
        dotted = ".".join(path)
        near = difflib.get_close_matches(dotted, list(known_keys(self.cls)), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        self.problems.append(f"unknown key {dotted}{given.place}: {hint}keys here: {', '.join(keys(section.of))}")

    def value(self, key: Key, given: Given, path: tuple[str, ...]) -> Any:
        if given.value is None and key.optional:
            return None
        if key.sort == "section":
            return self.section(key, given, path)
        if key.sort in ("names", "free"):
            if given.value is None:
                return {}
            if not isinstance(given.value, dict):
                self.wrong(path, key, given)
                return {}
            if key.sort == "free":
                return given.plain()
            entry = Key("section", False, key.of)
            return {name: self.section(entry, inner, (*path, name)) for name, inner in given.value.items()}
        if key.sort == "list":
            if not isinstance(given.value, list):
                self.wrong(path, key, given)
                return []
            item = _key_of(key.of, {})
            return [self.value(item, inner, (*path, str(index))) for index, inner in enumerate(given.value)]
        if key.sort == "text":
            return self.text(key, given, path)
        found = _number(key.sort, given.value)
        if found is None:
            self.wrong(path, key, given)
            return 0
        return found

    def text(self, key: Key, given: Given, path: tuple[str, ...]) -> str:
        value, text = given.value, given.text
        if key.metadata.get("choices") is not None and text is not None and not isinstance(value, (dict, list)):
            value, text = text, None  # what is allowed is told with all other values
        if key.metadata.get("path") and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str) and text is None:
            try:
                return expanded(value) if key.metadata.get("path") and given.typed else _text(value)
            except ValueError as error:
                unset = ", but null for none" if key.optional and not value else ""
                self.problems.append(f"{'.'.join(path)} is {given.shown()}{given.place}: {error}{unset}")
                return value
        if text is None:
            self.wrong(path, key, given)
        elif text == "":
            self.problems.append(
                f'{".".join(path)} is left empty{given.place}, but it is a text: write "" for an empty one{key.help}'
            )
        else:
            read = {bool: "a truth value", type(None): "nothing"}.get(type(value), "a date" if _is_date(given) else "a number")
            self.problems.append(
                f'{".".join(path)} is {text}{given.place}, which YAML reads as {read}, but is a text: write "{text}"{key.help}'
            )
        return ""


def _text(text: str) -> str:
    problem = unusable(text)
    if problem is not None:
        raise ValueError(f"a text cannot hold {problem}")
    return text


def _is_date(given: Given) -> bool:
    return isinstance(given.value, str) and bool(re.match(r"\d{4}-\d", given.value))


def _number(sort: str, value: Any) -> Any:
    """A value as a whole number, a number or a truth value; None where it is none."""
    if sort == "truth":
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            return value if isinstance(value, bool) else None
        return _TRUTH.get(str(value).lower())
    if isinstance(value, bool):
        return None
    if sort == "whole":
        if isinstance(value, str) and _INTEGER.fullmatch(value) and len(value) < 100:
            return int(value)
        return value if isinstance(value, int) and not isinstance(value, bool) else None
    try:
        return float(value) if isinstance(value, (int, float, str)) else None
    except ValueError:
        return None
    except OverflowError:
        return math.inf


def _wanted(key: Key) -> str:
    if key.sort == "any":
        return "a value, or '\"\"' for an empty text"
    if key.sort in ("section", "names", "free"):
        what = {"section": "a section, {key: value, ...}", "names": "names with a section each, {name: {key: value}}"}
        return what.get(key.sort, "{name: value, ...}") + (", or null for none" if key.optional else "")
    if key.sort == "list":
        return f"a list, for example {'[a, b]' if key.of is str else '[0.5, 1]'}" + (
            ", or null for none" if key.optional else ""
        )
    name = {"text": "a text", "whole": "a whole number", "number": "a number", "truth": "true or false"}[key.sort]
    return name + (", or null for none" if key.optional else "")


# --- writing ----------------------------------------------------------------------------------------------------------------


def plain(config: Any) -> dict[str, Any]:
    """A configuration as nested plain containers, under the names that files have."""
    return {name: _plain(getattr(config, field_name)) for name, (field_name, _) in keys(type(config)).items()}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return plain(value)
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def typed(config: Any) -> dict[str, Any]:
    """Like :func:`plain`, with paths as a file has to have them, so that none is expanded twice."""
    written: dict[str, Any] = {}
    for name, (field_name, key) in keys(type(config)).items():
        value = getattr(config, field_name)
        if is_dataclass(value) and not isinstance(value, type):
            written[name] = typed(value)
        elif key.sort == "names":
            written[name] = {inner: typed(entry) for inner, entry in value.items()}
        else:
            written[name] = as_typed(value) if key.metadata.get("path") and isinstance(value, str) else _plain(value)
    return written
