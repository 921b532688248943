"""Configuration files: YAML as trees of values that remember where and how they were written.

What a value means depends on its key: ``no`` is a truth value for one and a text for another. So nothing is decided here that
:mod:`fastvideo_grpo.config.values` could not take back.
"""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastvideo_grpo.config.paths import expanded
from fastvideo_grpo.errors import ConfigError

_YAML = "tag:yaml.org,2002:"
# YAML 1.1, which PyYAML reads, wants a dot and a sign in 1e-4; nobody who writes a learning rate does.
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
LARGEST_FILE = 2**24
"""Bytes of a configuration file; what is larger is something else (a checkpoint, say) and not read."""


@dataclass(frozen=True)
class Given:
    """A value as it was given.

    Attributes:
        value: None, a bool, int, float or str, a list of these, or a dict from names to these.
        text: a scalar as it was written, where YAML reads it as something else than a text; else None.
        where: "FILE, line N", or nothing for what the command line or Python gave.
        typed: by a person, in whose paths ``~`` and variables are to be expanded; not what Python code gives.
        anew: of a dict: it takes the place of what stood under its key before, and does not only change it.
    """

    value: Any
    text: str | None = None
    where: str = ""
    typed: bool = True
    anew: bool = False

    def plain(self) -> Any:
        """The value with nothing around it."""
        if isinstance(self.value, dict):
            return {key: inner.plain() for key, inner in self.value.items()}
        return [inner.plain() for inner in self.value] if isinstance(self.value, list) else self.value

    def shown(self) -> str:
        """The value for a message, as it was written where that is known; long ones cut."""
        shown = repr(self.text if self.text is not None else self.plain())
        return shown if len(shown) <= 80 else f"{shown[:77]}..."

    @property
    def place(self) -> str:
        """`` (FILE, line N)``, or nothing."""
        return f" ({self.where})" if self.where else ""

    @classmethod
    def of(cls, value: Any) -> Given:
        """What Python code gives."""
        if isinstance(value, Mapping):
            return cls({str(key): cls.of(inner) for key, inner in value.items()}, typed=False)
        return cls([cls.of(inner) for inner in value] if isinstance(value, (list, tuple)) else value, typed=False)


class _Loader(yaml.SafeLoader):
    """YAML without Python objects."""


class _Dumper(yaml.SafeDumper):
    """Writes what :class:`_Loader` reads back: a text that it would read as something else is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML folds and loses these where it does not escape them.
    style = '"' if any(mark in text for mark in "\r\x85\u2028\u2029") else None
    return dumper.represent_scalar(f"{_YAML}str", text, style)


_Dumper.add_representer(str, _represent)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_YAML}float"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver(f"{_YAML}float", _FLOAT, list("-+0123456789."))


def dump(values: Mapping[str, Any]) -> str:
    """YAML that :func:`read` gives back as it was."""
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text


def read(path: Path) -> list[tuple[Path, Given]]:
    """A configuration file and the files that it builds on by ``base:``, those first: each with its mapping, without ``base``.

    Raises:
        ConfigError: a file is missing, cannot be read, is no mapping or no YAML, or builds on itself; says the file and, where
            it can be had, the line.
        FileNotFoundError: the file itself is missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such configuration file: {path}{_near(path)}")
    files: list[tuple[Path, Given]] = []
    chain = [path]
    while True:
        tree = _mapping(chain[-1])
        base = tree.value.pop("base", None)
        files.insert(0, (chain[-1], tree))
        if base is None or base.value is None:
            return files
        if not isinstance(base.value, str) or not base.value:
            raise ConfigError(f"base is {base.shown()}{base.place}; it must be a file, for example base: base/flux.yaml")
        try:
            below = chain[-1].parent / expanded(base.value)
        except ValueError as error:
            raise ConfigError(f"base is {base.shown()}{base.place}: {error}") from error
        if not below.is_file():
            what = "that is a folder" if below.is_dir() else f"there is no such file: {below}{_near(below)}"
            raise ConfigError(f"base is {base.shown()}{base.place}; {what}")
        chain.append(below)
        if any(below.resolve() == other.resolve() for other in chain[:-1]):
            raise ConfigError(f"base goes round in a circle: {' -> '.join(map(str, chain))}; remove one of them")


def parse(text: str, where: str = "", *, first_line: int = 1) -> Given:
    """A YAML document, or the value of one key.

    Raises:
        ConfigError: it is no YAML, or asks for what a configuration cannot hold.
    """
    place = where or "the value"
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return Given(None, "") if node is None else _given(loader, node, where, first_line, ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + first_line}, column {mark.column + 1}" if mark is not None and where else ""
        raise ConfigError(f"{place}{line}: not valid YAML: {' '.join(str(error.problem or error.context).split())}") from error
    except yaml.reader.ReaderError as error:
        line = f", line {text.count(chr(10), 0, error.position) + first_line}" if where else ""
        raise ConfigError(f"{place}{line}: not valid YAML: a character {chr(error.character)!r}") from error
    except RecursionError as error:
        raise ConfigError(f"{place}: not valid YAML: nested too deeply") from error


def _near(path: Path) -> str:
    """`` (did you mean ...?)`` with the files of the folder that have a name like it, or what is there."""
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder})"
    there = sorted(file.name for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
    near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.6)
    if near:
        return f" (did you mean {' or '.join(str(folder / name) for name in near)}?)"
    return f" (in {folder}: {', '.join(there[:20])}{', ...' * (len(there) > 20)})" if there else f" (no .yaml file in {folder})"


def _mapping(path: Path) -> Given:
    if not path.is_file():
        there = path / "config.yaml"
        hint = f"; its configuration is {there}" if there.is_file() else ""
        raise ConfigError(f"{path} is {'a folder' if path.is_dir() else 'no file'}, but a YAML file is needed{hint}")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"{path} has {path.stat().st_size / 2**20:.0f} MiB, which is no configuration; give a YAML file")
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: not valid YAML: byte 0x{data[error.start]:02x} is no {'UTF-16' if wide else 'UTF-8'}; is "
            "it a text file? Save it as UTF-8"
        ) from error
    tree = parse(text, str(path))
    if tree.value is None and not tree.text:
        return Given({}, where=str(path))  # nothing but comments
    if not isinstance(tree.value, dict):
        raise ConfigError(
            f"{path} holds a {'list' if isinstance(tree.value, list) else 'single value'}; it must hold sections with keys, "
            "for example `run: {dir: runs/mine}`"
        )
    return tree


def _given(loader: _Loader, node: yaml.Node, file: str, first_line: int, above: tuple[int, ...]) -> Given:
    where = f"{file}, line {node.start_mark.line + first_line}" if file else ""
    if id(node) in above:
        raise yaml.constructor.ConstructorError(None, None, "an anchor that holds itself", node.start_mark)
    above = (*above, id(node))
    if isinstance(node, yaml.ScalarNode):
        return _scalar(loader, node, where)
    if node.tag == f"{_YAML}seq" and isinstance(node, yaml.SequenceNode):
        return Given([_given(loader, item, file, first_line, above) for item in node.value], where=where)
    if node.tag != f"{_YAML}map" or not isinstance(node, yaml.MappingNode):
        raise _not_allowed(node)
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key that is no name", key.start_mark)
        if key.value in seen and key.tag != f"{_YAML}merge":
            raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
        seen.add(key.value)
    loader.flatten_mapping(node)  # <<: *anchor
    # A name is a text, also where YAML would read it as something else.
    return Given({key.value: _given(loader, value, file, first_line, above) for key, value in node.value}, where=where)


def _scalar(loader: _Loader, node: yaml.ScalarNode, where: str) -> Given:
    sort, text = node.tag.removeprefix(_YAML), node.value
    if sort in ("str", "value", "merge"):
        return Given(text, where=where)
    if sort not in ("null", "bool", "int", "float", "timestamp"):
        raise _not_allowed(node)
    if sort == "timestamp":
        return Given(text, text, where)
    if sort == "int" and not _INTEGER.fullmatch(text):
        return Given(text, text, where)  # octal, sexagesimal or with underscores: nobody knows what was meant
    try:
        value = int(text) if sort == "int" else loader.construct_object(node)
    except (ValueError, KeyError, IndexError) as error:  # of a tag that does not fit: !!bool perhaps
        raise yaml.constructor.ConstructorError(None, None, f"{text!r} is no {sort}", node.start_mark) from error
    return Given(value, text, where)


def _not_allowed(node: yaml.Node) -> yaml.YAMLError:
    problem = f"the tag {node.tag.replace(_YAML, '!!')} is not for configurations"
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
