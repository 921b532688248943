"""Pieces of float32 tensors on disk.

    FOLDER/engine.json                     which engine wrote it, counters, name and shape of every trainable parameter
    FOLDER/weights-RRRRR.safetensors       rank R's pieces of the float32 weights: NAME
    FOLDER/optimizer-RRRRR.safetensors     of AdamW's moments: exp_avg.NAME, exp_avg_sq.NAME; absent before an update
    FOLDER/ema-RRRRR.safetensors           of an average of the weights ("ema" or "old"): NAME; absent where there is none

A piece is a flat run of the flattened tensor; the header's metadata says where each begins. Pieces of all ranks tile
the tensor, so any number of ranks can read what any other number wrote.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastvideo_grpo.errors import UserError

ENGINE_JSON = "engine.json"


class EngineStateError(UserError):
    """A saved engine folder is incomplete, unreadable, or of another model."""


def write_tensors(path: Path, entries: Mapping[str, tuple[int, int, Callable[[], Tensor]]]) -> None:
    """Write a safetensors file piece by piece, so that memory holds one piece at a time.

    Args:
        path: the file.
        entries: key -> (start, count, get): `get()` gives the flat float32 piece of `count` elements that begins at
            `start`.

    Raises:
        OSError: the disk refused.
    """
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "starts": json.dumps({key: start for key, (start, _, _) in entries.items()})}
    }
    offset = 0
    for key, (_, count, _) in entries.items():
        header[key] = {"dtype": "F32", "shape": [count], "data_offsets": [offset, offset + 4 * count]}
        offset += 4 * count
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for key, (_, count, get) in entries.items():
            piece = get().detach().to("cpu", torch.float32).contiguous()
            if piece.numel() != count:
                raise ValueError(f"{path.name}: piece {key} has {piece.numel()} elements, announced {count}")
            file.write(piece.numpy().data)


def read_engine_json(folder: Path) -> dict[str, Any]:
    """engine.json of a saved folder.

    Raises:
        EngineStateError: missing, not JSON, or of another format.
    """
    path = folder / ENGINE_JSON
    try:
        description = json.loads(path.read_text())
    except OSError as failure:
        raise EngineStateError(
            f"{path} cannot be read ({failure.strerror}); give the folder that holds engine.json and weights-*.safetensors"
        ) from failure
    except ValueError as failure:
        raise EngineStateError(f"{path} is not JSON ({failure}); use another checkpoint") from failure
    if description.get("format") != 1:
        raise EngineStateError(f"{path} has format {description.get('format')}; this version reads format 1")
    # Of versions that knew no other average.
    description.setdefault("averages", {} if description.get("ema_decay") is None else {"ema": description["updates"]})
    return description


class SavedTensors:
    """The pieces of one part ("weights", "optimizer", "ema" or "old") of a saved folder; read lazily from mapped files.

    Raises:
        EngineStateError: a file is missing or unreadable.
    """

    def __init__(self, folder: str | os.PathLike[str], part: str, world_size: int) -> None:
        self.folder = Path(folder)
        self.part = part
        self._files = []
        self._pieces: dict[str, list[tuple[int, int, int]]] = {}
        for rank in range(world_size):
            path = self.folder / f"{part}-{rank:05d}.safetensors"
            try:
                file = safe_open(path, framework="pt")
                starts = json.loads(file.metadata()["starts"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as failure:
                raise EngineStateError(f"{path} cannot be read ({failure}); use another checkpoint") from failure
            self._files.append(file)
            for key, start in starts.items():
                self._pieces.setdefault(key, []).append((start, file.get_slice(key).get_shape()[0], rank))
        for pieces in self._pieces.values():
            pieces.sort()

    def read(self, key: str, start: int, count: int) -> Tensor:
        """Elements start to start + count of a flattened tensor, float32 on the CPU, put together from whoever wrote
        them.

        Raises:
            EngineStateError: some of them were never written.
        """
        result = torch.empty(count, dtype=torch.float32)
        filled = 0
        for piece_start, piece_count, rank in self._pieces.get(key, []):
            first = max(start, piece_start)
            last = min(start + count, piece_start + piece_count)
            if first < last:
                result[first - start : last - start] = self._files[rank].get_slice(key)[
                    first - piece_start : last - piece_start
                ]
                filled += last - first
        if filled != count:
            raise EngineStateError(
                f"{self.folder}: {self.part} files hold {filled} of {count} elements of {key}; use another checkpoint"
            )
        return result
