"""Published weight files: read without running anything in them, or told what they are instead."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastvideo_grpo.model_files.headers import read_header
from fastvideo_grpo.model_files.pointers import refuse_pointer
from fastvideo_grpo.model_files.selection import WEIGHTS, promised_by
from fastvideo_grpo.model_files.torch_files import read_torch

OPEN_CLIP = "open_clip_config.json"
OPEN_CLIP_STEMS = ("open_clip_model", "open_clip_pytorch_model")
STEMS = ("model", "pytorch_model")
"""What open_clip and transformers call their weights, without the ending."""

_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")


@contextmanager
def naming(kind: str, path: Path, advice: str) -> Iterator[None]:
    """Put the reward's `kind` and the `path` before the message of a ValueError or FileNotFoundError, and `advice`, where to
    get it, behind."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        sort = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise sort(f"{kind}: {path}: {error}; {advice}") from error


def find_weights(folder: Path, stems: Sequence[str]) -> Path | None:
    """The first file of `folder` called STEM.safetensors, .bin, .pt or .pth, or the index of its shards; None without one."""
    candidates = (folder / (stem + ending) for stem in stems for ending in _ENDINGS)
    return next((path for path in candidates if path.is_file()), None)


def files_read(folder: Path) -> list[Path]:
    """The weight files that are read of a folder, whether they are there or not: those of one library, where there are two
    libraries' (a CLIP's, open_clip's first), and of shards those in the index. Of a folder with neither all of one format;
    folders below do not count.

    Raises ValueError for an index that is none.
    """
    layouts = (OPEN_CLIP_STEMS,) if (folder / OPEN_CLIP).is_file() else ()
    for stems in (*layouts, STEMS):
        found = find_weights(folder, stems)
        if found is not None and found.name.endswith(".index.json"):
            return sorted(set(promised_by(found).values()))
        if found is not None:
            return [found]
    by_format: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in WEIGHTS:
            # An adapter and the rest of its weights lie in two files; the same weights lie there in two formats, too.
            by_format.setdefault(file.suffix, []).append(file)
    return max(by_format.values(), key=lambda files: sum(file.stat().st_size for file in files), default=[])


def check_files(place: Path) -> None:
    """Look at the beginnings of the weight files that are read of a folder and of those below it (checkpoint-N), or at a file.

    Raises ValueError or FileNotFoundError, naming the file, for one that is not there, is empty, is cut short, or is a Git LFS
    pointer.
    """
    folders = [place, *(path for path in sorted(place.iterdir()) if path.is_dir())] if place.is_dir() else []
    for file in [name for folder in folders for name in files_read(folder)] or [place]:
        if file.suffix not in WEIGHTS:
            continue  # what another package's reward makes of it is its own
        if not file.is_file():
            raise FileNotFoundError(f"{file} is listed in the index, but not there; fetch all files of the checkpoint")
        if file.suffix == ".safetensors":
            read_header(file)
            continue
        with file.open("rb") as content:
            start = content.read(64)
        try:
            refuse_pointer(start, "weights")
            if not start:
                raise ValueError("expected weights, found an empty file")
            if start.startswith(b"PK") and not zipfile.is_zipfile(file):
                raise ValueError("it is the beginning of a torch file: it is not complete")
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


def read_weights(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """The tensors whose names are `wanted` of a safetensors or torch file, or of the shards that an index.json lists, on the
    CPU. Of shards and safetensors files nothing else is read.

    A torch file may hold them under the key `state_dict`, and with `module.` before every name, as training scripts save
    them. Raises ValueError, with what was expected and what was found, for anything else; FileNotFoundError for a shard
    that is not there.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path, wanted)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, wanted)
    content = read_torch(path)
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not holds_tensors(weights):
        raise ValueError(f"expected a dict of tensors, found {describe(content)}")
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return {name: tensor for name, tensor in weights.items() if wanted(name)}


def holds_tensors(content: Any) -> bool:
    """Whether it is a dict of tensors by name."""
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    )


def describe(content: Any) -> str:
    """A few words on what a file held: its type, and the first keys of a dict."""
    keys = f"with the keys {some([str(key) for key in content], 5)}" if isinstance(content, dict) and content else ""
    return f"a {type(content).__name__} {keys}".rstrip()


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def checked(
    weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], origin: str = ""
) -> dict[str, torch.Tensor]:
    """Those of `weights` that `expected` (a module's state dict) has, all of them and in its shapes.

    Raises ValueError, with names and shapes, when one is missing or has another shape. origin: whose names they are.
    """
    missing = [name for name in expected if name not in weights]
    if missing:
        raise ValueError(f"no tensor for {some(missing)}{origin}: the weights are incomplete")
    misfits = [
        f"{name} is {list(weights[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if weights[name].shape != tensor.shape
    ]
    if misfits:
        raise ValueError(f"the tensors do not fit together: {some(misfits)}{origin}")
    return {name: weights[name] for name in expected}


def _read_safetensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    found = f"{path.stat().st_size} bytes"
    with path.open("rb") as raw:
        start = raw.read(64)
    refuse_pointer(start, "a safetensors file")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"expected a safetensors file, found {found} beginning with {start[:16]!r} that cannot be read as one "
            f"({error}): another kind of file, or not complete"
        ) from error


def _read_shards(index: Path, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    places = promised_by(index)
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted({shard for name, shard in places.items() if wanted(name)}):
        if not shard.is_file():
            raise FileNotFoundError(f"{index} lists {shard.name}, which is not there; fetch all files of the checkpoint")
        try:
            weights |= read_weights(shard, wanted)
        except ValueError as error:
            raise ValueError(f"{shard.name}: {error}") from error
    missing = [name for name in places if wanted(name) and name not in weights]
    if missing:
        raise ValueError(f"the shards lack {some(missing)}, which the index lists")
    return weights
