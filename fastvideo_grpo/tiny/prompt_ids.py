"""Prompts as a pretraining reads them: through the tokenizer that is written into its checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def read_back(write: Callable[[Path], Any]) -> Any:
    """The tokenizer that `write` writes into a folder, as transformers reads it."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "tokenizer"))
        return AutoTokenizer.from_pretrained(Path(folder, "tokenizer"))


def padded_ids(write: Callable[[Path], Any], prompts: Sequence[str], length: int) -> torch.Tensor:
    """Token ids of `prompts` by the tokenizer that `write` writes, int64 [prompts, length], padded and cut as pipelines do."""
    tokenizer = read_back(write)
    return tokenizer(list(prompts), max_length=length, padding="max_length", truncation=True, return_tensors="pt").input_ids
