"""What weight files hold: names, dtypes and shapes, read from their headers."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from fastvideo_grpo.model_files.pointers import refuse_pointer
from fastvideo_grpo.model_files.selection import Selection, WeightFilesError
from fastvideo_grpo.model_files.torch_files import read_torch

_FILE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Entry(NamedTuple):
    """A tensor of a file.

    Attributes:
        file: where it is.
        start: its first byte there; None in a torch file, which is not read by bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int | None


def read_entries(selection: Selection) -> dict[str, Entry]:
    """Every tensor of a component by its name, in the order of the files. Of tensors nothing is read.

    Raises:
        WeightFilesError: a file that cannot be read or is cut short, a tensor that the index promises and the file lacks.
    """
    found: dict[str, Entry] = {}
    for file in selection.files:
        entries = read_header(file) if file.suffix == ".safetensors" else read_torch_header(file)
        for name, entry in entries.items():
            if selection.promised is None or selection.promised.get(name) == file:
                found[name] = entry
    lost = [name for name in selection.promised or () if name not in found]
    if lost:
        assert selection.promised is not None
        raise WeightFilesError(
            f"{selection.folder}: the index promises {lost[0]} in {selection.promised[lost[0]].name}, which has no such tensor "
            f"({len(lost)} of this kind); download the checkpoint again"
        )
    return found


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file.

    Raises:
        WeightFilesError: it cannot be read, is a Git LFS pointer, is cut short, or is no safetensors file.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(64)
            refuse_pointer(start, "a safetensors file")
            length = int.from_bytes(start[:8], "little")
            size = os.fstat(file.fileno()).st_size
            if not 0 < length <= size - 8:
                raise ValueError("its header is longer than the file")
            file.seek(8)
            header = json.loads(file.read(length))
        _check_metadata(header.pop("__metadata__", {}))
        entries = {}
        end = 8 + length
        # One behind the other, without a gap, as everybody who reads whole files demands.
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            if 8 + length + first != end:
                raise ValueError(f"{name} begins at byte {8 + length + first}, not at {end}, where the one before ends")
            dtype, shape = _FILE_DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            if dtype is None:
                raise ValueError(f"{name} has dtype {entry['dtype']}; known are {', '.join(_FILE_DTYPES)}")
            if last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {last - first} bytes, not those of {dtype} {shape}")
            entries[name] = Entry(dtype, shape, path, 8 + length + first)
            end += last - first
        if end != size:
            raise ValueError(f"it has {size} bytes of {end}")
    except OSError as failure:
        raise WeightFilesError(f"{path} cannot be read ({failure.strerror or failure})") from failure
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as failure:
        raise WeightFilesError(f"{path} is no whole safetensors file: {failure}; download or copy it again") from failure
    return entries


def _check_metadata(found: object) -> None:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("its __metadata__ is no object of texts")


def read_torch_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file that ``torch.save`` wrote; see :func:`mapped_tensors`."""
    return {name: Entry(tensor.dtype, tuple(tensor.shape), path, None) for name, tensor in mapped_tensors(path).items()}


def mapped_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that ``torch.save`` wrote, mapped (of the format before torch 1.6: read).

    Raises:
        WeightFilesError: it cannot be read, is a Git LFS pointer, is cut short, or holds anything but tensors by name.
    """
    try:
        content = read_torch(path)
        if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
            raise ValueError(f"expected tensors by name, found a {type(content).__name__}")
    except OSError as failure:
        raise WeightFilesError(f"{path} cannot be read ({failure.strerror or failure})") from failure
    except ValueError as failure:
        raise WeightFilesError(f"{path}: {failure}; download or copy it again") from failure
    return content
