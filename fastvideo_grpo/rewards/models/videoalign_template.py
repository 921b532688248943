"""VideoAlign's prompt template: read from the user's copy of VideoAlign, or from a text file, and checked.

The text belongs to VideoAlign and is not part of this project. Every character of it counts, blanks at the end of a line
too: the weights were trained on these tokens.
"""

from __future__ import annotations

import ast
import string
from pathlib import Path

TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
"""Tokens at which the scores are read, in the order of the scores."""

FIELD = "text_prompt"
"""The template is a format string with this one field, for the prompt of the clip."""

_FILE = "prompt_template.py"
_GET = (
    "set params.template to a copy of VideoAlign (git clone https://github.com/KwaiVGI/VideoAlign checkpoints/VideoAlign), "
    f"to its {_FILE}, or to a text file that holds the template"
)


def read_template(source: Path, name: str) -> str:
    """The template that VideoAlign calls `name`, such as "detailed_special".

    source: a folder with prompt_template.py, this file itself (any .py file), or a text file that holds the template and
        nothing else. A Python file is parsed, not executed.

    Raises FileNotFoundError when there is no such file, ValueError when it does not hold a template with the field
    `text_prompt` and each of the reward tokens once, in order.
    """
    path = source / _FILE if source.is_dir() else source
    if not path.is_file():
        found = f"the folder {source} has no {_FILE}" if source.is_dir() else f"there is no {source}"
        raise FileNotFoundError(f"videoalign: {found}; {_GET}")
    try:
        text = path.read_text(encoding="utf-8")
        template = _string_behind(name, text) if path.suffix == ".py" else text
        _check(template)
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"videoalign: the template {path}: {error}; {_GET}") from error
    return template


def _string_behind(name: str, source: str) -> str:
    """The module-level string that `source` returns, formatted, in the branch that compares something with `name`."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"it is not Python ({error})") from error
    strings = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    used = {
        part.id
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and _compares_with(branch.test, name)
        for statement in branch.body
        for part in ast.walk(statement)
        if isinstance(part, ast.Name) and part.id in strings
    }
    if len(used) != 1:
        raise ValueError(f"expected one string for the name '{name}', found {', '.join(sorted(used)) or 'none'}")
    return strings[used.pop()]


def _compares_with(test: ast.expr, name: str) -> bool:
    return (
        isinstance(test, ast.Compare)
        and isinstance(test.ops[0], ast.Eq)
        and any(isinstance(side, ast.Constant) and side.value == name for side in (test.left, *test.comparators))
    )


def _check(template: str) -> None:
    # str.format raises ValueError for single braces.
    fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    if fields != {FIELD}:
        found = ", ".join(f"{{{field}}}" for field in sorted(fields)) or "none"
        raise ValueError(f"expected the field {{{FIELD}}} and no other, found {found}")
    counts = {token: template.count(token) for token in TOKENS}
    if set(counts.values()) != {1}:
        found = ", ".join(f"{token} {count} times" for token, count in counts.items())
        raise ValueError(f"expected each reward token once, found {found}")
    places = [template.index(token) for token in TOKENS]
    if places != sorted(places):
        raise ValueError(f"expected the reward tokens in the order {', '.join(TOKENS)}, in which the scores are read")
