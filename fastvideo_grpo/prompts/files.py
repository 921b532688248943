"""Prompt files: ``.txt`` (one prompt a line) or ``.jsonl`` (an object with "prompt" and, optionally, "id" a line)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvideo_grpo.errors import UserError


class PromptFileError(UserError, ValueError):
    """A prompt file that cannot be read; the message names file and line."""


@dataclass(frozen=True)
class Prompt:
    """A prompt: its text, an id that keys its noise and embeddings, and whatever else the file says of it."""

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)


def text_id(text: str) -> str:
    """The id of a prompt that has none in its file: a hash of the text, so that the order of the file does not matter."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a prompt file; empty lines and lines that start with ``#`` are skipped in ``.txt``.

    Raises:
        FileNotFoundError: no such file.
        PromptFileError: unknown extension, no prompts, a bad line (file and line are named), or an id given twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such prompt file: {path}")
    if path.suffix not in (".txt", ".jsonl"):
        raise PromptFileError(f"{path}: prompt files end in .txt (one prompt a line) or .jsonl")
    prompts: list[Prompt] = []
    lines_of: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = line.strip()
        if not line or (path.suffix == ".txt" and line.startswith("#")):
            continue
        where = f"{path}:{number}"
        prompt = Prompt(text_id(line), line) if path.suffix == ".txt" else _from_json(line, where)
        first = lines_of.setdefault(prompt.id, number)
        if first != number:
            raise PromptFileError(f"{where}: the prompt id {prompt.id!r} stands in line {first} already; ids must differ")
        prompts.append(prompt)
    if not prompts:
        raise PromptFileError(f"{path} holds no prompts")
    return prompts


def _from_json(line: str, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptFileError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise PromptFileError(f'{where}: each line must be an object with a non-empty "prompt"; got {line[:80]}')
    text = entry["prompt"]
    metadata = {key: value for key, value in entry.items() if key not in ("prompt", "id")}
    return Prompt(str(entry.get("id", text_id(text))), text, metadata)
