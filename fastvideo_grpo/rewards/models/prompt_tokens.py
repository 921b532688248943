"""Prompts as the networks of rewards read them: a tokenizer's folder, and the tokens that it makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Tokenizer = TypeVar("Tokenizer")


def load_tokenizer(kind: str, folder: Path, load: Callable[[str], Tokenizer], advice: str) -> Tokenizer:
    """What `load` makes of the files in `folder`. Raises ValueError for damaged files, with the reward's `kind` and `advice`,
    where to get them."""
    try:
        return load(str(folder))
    except Exception as error:  # whatever the libraries underneath raise for a damaged file
        raise ValueError(
            f"{kind}: the tokenizer {folder} cannot be read ({type(error).__name__}: {error}); {advice}"
        ) from error


def tokenized(tokenizer: Any, prompts: list[str], length: int) -> Any:
    """The tokenizer's tensors, int64 [P, length]: prompts padded and cut to `length` tokens."""
    return tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
        split_special_tokens=True,  # a prompt that spells out a special token cannot end itself
    )
