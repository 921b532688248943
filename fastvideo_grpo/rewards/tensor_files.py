"""Tensors from files that somebody downloaded: mapped where possible, and with an error that says what the file is."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_INDEX = "model.safetensors.index.json"


def read_torch_file(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a torch file. Its tensors are mapped from the file: copy what is to outlive it.

    Raises ValueError, with what was expected and what was found, for any other file.
    """
    found = f"{path.stat().st_size} bytes"
    with path.open("rb") as file:
        start = file.read(64)
    if not zipfile.is_zipfile(path):
        # The list of contents is at the end.
        what = "the beginning of one, which is not complete" if start.startswith(b"PK") else _what(start)
        raise ValueError(f"{path}: expected a torch file, found {what} ({found})")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, pickle and zip errors; its advice is to trust the file
        raise ValueError(
            f"{path}: expected a torch file of tensors, found {found} that torch.load refuses ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        keys = f" with the keys {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else ""
        raise ValueError(f"{path}: expected a dict of tensors, found a {type(content).__name__}{keys}")
    return dict(content)


def read_safetensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file whose names are `wanted`; nothing else is read.

    Raises ValueError, with what was expected and what was found, for any other file.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except Exception as error:  # the errors of the Rust library
        with path.open("rb") as raw:
            start = raw.read(64)
        raise ValueError(
            f"{path}: expected a safetensors file, found {_what(start)} ({path.stat().st_size} bytes): "
            f"{error}; it is not complete, or another file"
        ) from error


def read_model_folder(folder: Path, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The `wanted` tensors of a transformers folder, in one safetensors file or several with an index.

    Raises FileNotFoundError when there are none or one of them is missing, ValueError for a file that is not one.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            places: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index}: expected an index of safetensors files ({type(error).__name__}: {error})") from error
        files = [folder / name for name in sorted({file for name, file in places.items() if wanted(name)})]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}")
    return {name: tensor for file in files for name, tensor in read_safetensors(file, wanted).items()}


def _what(start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, which stands for the file until it is fetched"
    return f"something that begins with {start[:16]!r}"
