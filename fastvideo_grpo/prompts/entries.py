"""The entries of a prompt file, form by form: what is written of each prompt, before it is made one."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo_grpo.prompts.texts import PromptFileError, lines_of, stripped, visible

_OTHER_NAMES = ("caption", "captions", "text", "texts", "prompts", "description", "instruction", "title", "input", "query")
"""What other tools call a prompt."""


@dataclass(frozen=True)
class Entry:
    """What a file says of a prompt: ``values`` has a "prompt" that can be seen. ``place``: its line, for a person."""

    path: Path
    place: str
    values: dict[str, Any]

    @property
    def where(self) -> str:
        return _where(self.path, self.place)


@dataclass(frozen=True)
class Entries:
    """All entries of a file, and what to say of it."""

    entries: list[Entry]
    notes: list[str]


def _where(path: Path, place: str) -> str:
    return f"{path}:{place.removeprefix('line ')}" if place.startswith("line ") else f"{path}: {place}"


def shortened(text: str, longest: int = 80) -> str:
    """For a message."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def entries_of(path: Path, text: str) -> Entries:
    """The entries of a file's text, by the end of its name (in whichever case).

    Raises:
        PromptFileError: another end, or a text that is not of that form.
    """
    form = _FORMS.get(path.suffix.lower())
    if form is None:
        raise PromptFileError(
            f"{path}: prompt files end in .txt (one prompt a line), .jsonl (one object a line), .json (a list) or .csv (with a "
            "column prompt)"
        )
    return form(path, text)


# --- .txt


def _from_txt(path: Path, text: str) -> Entries:
    entries, comments = [], []
    for number, line in enumerate(lines_of(text), start=1):
        prompt = stripped(line)
        if not visible(prompt):
            continue
        if prompt.startswith("#"):
            comments.append((number, prompt))
            continue
        if prompt.lstrip("\\").startswith("#"):
            prompt = prompt[1:]
        entries.append(Entry(path, f"line {number}", {"prompt": prompt}))
    notes = []
    if comments:
        number, first = comments[0]
        count = len(comments)
        what = f"{count} lines begin with # and are comments" if count > 1 else "1 line begins with # and is a comment"
        notes.append(f"{path}: {what} (line {number}: {shortened(first, 40)!r}); a prompt that begins so is written \\#")
    return Entries(entries, notes)


# --- .jsonl and .json


def _from_jsonl(path: Path, text: str) -> Entries:
    entries: list[Entry] = []
    for number, line in enumerate(lines_of(text), start=1):
        line = stripped(line)
        if not visible(line):
            continue
        place = f"line {number}"
        if not entries and line.startswith("["):
            raise PromptFileError(f"{_where(path, place)}: a list, but in .jsonl each line is an object; name the file .json")
        entries.append(_entry(path, place, _parsed(line, _where(path, place))))
    return Entries(entries, [])


def _from_json(path: Path, text: str) -> Entries:
    text = stripped(text)
    if not visible(text):
        return Entries([], [])
    content = _parsed(text, str(path), whole=True)
    key = ""
    if isinstance(content, dict):
        lists = [name for name, value in content.items() if isinstance(value, list)]
        if "prompts" in lists:
            lists = ["prompts"]
        if len(lists) != 1:
            raise PromptFileError(
                f"{path}: an object with the keys {_named(content)}; a .json file is a list of prompts, or an object with one "
                'list, {"prompts": [...]}'
            )
        key, content = lists[0], content[lists[0]]
    if not isinstance(content, list):
        raise PromptFileError(f"{path}: {shortened(json.dumps(content))}, but a .json file is a list of prompts")
    within = f"{key!r}, " if key else ""
    return Entries([_entry(path, f"{within}entry {n}", value) for n, value in enumerate(content, start=1)], [])


def _parsed(text: str, where: str, *, whole: bool = False) -> Any:
    """JSON; ``whole``: the text is a file's, whose lines the error names."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, where))
    except json.JSONDecodeError as error:
        found = f"{where}:{error.lineno}" if whole else where
        hint = "; is it one object a line? Then name it .jsonl" if whole and error.msg == "Extra data" else ""
        raise PromptFileError(f"{found}: not valid JSON: {error.msg} (character {error.colno}){hint}") from error
    except RecursionError as error:
        raise PromptFileError(f"{where}: not a list of prompts: JSON nested too deeply") from error
    except PromptFileError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise PromptFileError(f"{where}: a number of thousands of digits; write it as a text") from error


def _object(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise PromptFileError(f"{where}: an object has the key {shortened(twice)!r} twice; one of them would be lost")
    return found


def _entry(path: Path, place: str, value: Any) -> Entry:
    """An entry of JSON: an object with a prompt, or the prompt alone."""
    where = _where(path, place)
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise PromptFileError(
            f'{where}: an entry must be an object with a non-empty "prompt", or a text; got {shortened(json.dumps(value))}'
        )
    if "prompt" not in value:
        raise PromptFileError(f'{where}: there is no "prompt"; the keys found are {_named(value)}{_rename(list(value))}')
    prompt = value["prompt"]
    if not isinstance(prompt, str) or not visible(prompt):
        raise PromptFileError(f'{where}: "prompt" is {shortened(json.dumps(prompt))}; it must be a text that can be seen')
    return Entry(path, place, value)


def _named(keys: Any) -> str:
    return ", ".join(shortened(repr(key), 40) for key in list(keys)[:10]) + (", ..." if len(keys) > 10 else "") or "none"


def _rename(keys: list[str]) -> str:
    """What to do about keys that have no "prompt" among them."""
    likely = next((key for key in keys if key.strip().lower() in ("prompt", *_OTHER_NAMES)), None)
    return f": rename {likely!r} to 'prompt'" if likely is not None else ": name the one that holds the prompts 'prompt'"


# --- .csv


def _from_csv(path: Path, text: str) -> Entries:
    rows = _rows(path, text)
    if not rows:
        return Entries([], [])
    (number, first), *rest = rows
    names = [stripped(cell) for cell in first]
    if "prompt" not in names:
        return _from_single_column(path, rows)
    unnamed = [n for n, name in enumerate(names, start=1) if not name]
    twice = sorted({name for name in names if names.count(name) > 1 and name})
    if unnamed or twice:
        what = f"column {unnamed[0]} has no name" if unnamed else f"two columns are called {twice[0]!r}"
        raise PromptFileError(f"{_where(path, f'line {number}')}: {what}; each needs one of its own (pandas: index=False)")
    entries = []
    for number, row in rest:
        where = _where(path, f"line {number}")
        if len(row) != len(names):
            raise PromptFileError(
                f"{where}: {len(row)} cells, but the header has {len(names)} ({', '.join(names)}): a cell with a comma is "
                'written "in quotes, so"'
            )
        values = {name: stripped(cell) for name, cell in zip(names, row, strict=True) if visible(cell)}  # empty: says nothing
        if "prompt" not in values:
            raise PromptFileError(f"{where}: its prompt is empty")
        entries.append(Entry(path, f"line {number}", values))
    return Entries(entries, [])


def _from_single_column(path: Path, rows: list[tuple[int, list[str]]]) -> Entries:
    """A list without a header: each row is a prompt."""
    number, first = rows[0]
    names = [stripped(cell) for cell in first]
    wide = any(len(row) > 1 for _, row in rows)
    heads = [stripped(row[0]) for _, row in rows[:2] if len(row) == 1]  # the first line may be a spreadsheet's "sep=;"
    separator = next(
        (s for s in ";\t|" if any(s in head and "prompt" in map(str.strip, head.split(s)) for head in heads)), None
    )
    if wide or separator is not None or names[0].lower() in ("prompt", *_OTHER_NAMES):
        if separator is not None:
            hint = f": its columns are separated by {separator!r}, not by commas"
        else:
            no_header = ' (a list without a header has one column, and writes a prompt with a comma "in quotes, so")'
            hint = _rename(names) + (no_header if wide else "")
        raise PromptFileError(
            f"{_where(path, f'line {number}')}: there is no column 'prompt'; the columns found are {_named(names)}{hint}"
        )
    note = (
        f"{path} has no header: all of its {len(rows)} rows are taken as prompts, the first too ({shortened(names[0], 40)!r})"
    )
    return Entries([Entry(path, f"line {n}", {"prompt": stripped(row[0])}) for n, row in rows], [note])


def _rows(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """The rows that hold anything, each with the line it begins in."""
    limit = csv.field_size_limit(max(len(text), 1))  # the library's own would end in an error that says nothing
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, begins = [], 1
    try:
        for row in reader:
            if any(map(visible, row)):
                rows.append((begins, row))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise PromptFileError(
            f"{_where(path, f'line {begins}')}: not valid CSV: {error}: a quotation mark within quotes is doubled, and each "
            "opened one is closed"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


_FORMS: dict[str, Callable[[Path, str], Entries]] = {
    ".txt": _from_txt,
    ".jsonl": _from_jsonl,
    ".json": _from_json,
    ".csv": _from_csv,
}
