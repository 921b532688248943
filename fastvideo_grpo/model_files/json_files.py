"""JSON files as people have them: read whatever mark they begin with, or told what they are instead."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from fastvideo_grpo.model_files.pointers import refuse_pointer

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, in UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

    Raises:
        ValueError: it holds something else.
    """
    content = path.read_bytes()
    refuse_pointer(content[:64], "JSON")
    if not content.strip():
        raise ValueError("expected JSON, found an empty file")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are
        raise ValueError(f"expected JSON, found {len(content)} bytes that are not ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found a {type(found).__name__}")
    return found


def is_marked(path: Path) -> bool:
    """Whether it begins with a byte order mark, which most libraries do not read."""
    with path.open("rb") as file:
        return file.read(3).startswith(_MARKS)


def unmarked(path: Path) -> bytes:
    """The file's text in UTF-8 without a mark."""
    content = path.read_bytes()
    return content.decode(json.detect_encoding(content)).encode()
