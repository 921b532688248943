"""Weights from safetensors files straight into ZeRO-3 partitions: no process ever holds a whole model.

    CheckpointReader     the tensors of a folder of safetensors files, one at a time
    FusedWeights         the same under a module's names, where one parameter is several tensors of the files
    load_partitioned     a module on the meta device -> DeepSpeed's partitioned parameters

Rank 0 reads one parameter, DeepSpeed sends it to the others, everyone keeps its share and frees the rest. Files are read
with plain reads instead of being mapped: mapped pages would count as this process's memory until the kernel takes them
back.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvideo_grpo.engines.deepspeed import deepspeed_config, import_deepspeed, with_process_group
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.precision import DTYPES

if TYPE_CHECKING:
    from fastvideo_grpo.config import EngineConfig, OptimConfig

logger = logging.getLogger(__name__)

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
# What diffusers and transformers call their files, without `.safetensors` and `.safetensors.index.json`.
_STEMS = ("diffusion_pytorch_model", "model")
_STAGING_BYTES = 8 * 2**20


class WeightFilesError(UserError):
    """Weight files are missing, damaged, or not those of the model."""


class WeightSource(Protocol):
    """Where weights come from, one tensor at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every tensor there is."""
        ...

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill `out` (contiguous, of `shapes[name]`, any dtype and device) with the tensor, cast to its dtype."""
        ...


class CheckpointReader:
    """The tensors of one component of a checkpoint, read one at a time. Opening reads the files' headers only.

    Args:
        path: a safetensors file, or a folder: with `diffusion_pytorch_model.safetensors.index.json` the files that it
            names, else `diffusion_pytorch_model.safetensors`, else the same with `model`, else all safetensors files.

    Attributes:
        shapes: name -> shape, in the order of the files.
        dtypes: name -> dtype in the file.

    Raises:
        WeightFilesError: no file, one that cannot be read or is cut short, a tensor that the index promises and the file
            lacks, or one that is in two files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._staging: Tensor | None = None
        files, promised = _files(self.path)
        for file in files:
            for name, (dtype, shape, start) in _header(file).items():
                if promised is not None and promised.get(name) != file:
                    continue
                if name in self._places:
                    raise WeightFilesError(
                        f"{name} is in {self._places[name][0]} and in {file}; leave one variant of the weights in the folder, "
                        "or give the file itself"
                    )
                self.shapes[name], self.dtypes[name], self._places[name] = shape, dtype, (file, start)
        lost = [name for name in promised or () if name not in self._places]
        if lost:
            assert promised is not None
            raise WeightFilesError(
                f"{self.path}: the index promises {lost[0]} in {promised[lost[0]].name}, which has no such tensor "
                f"({len(lost)} of this kind); download the checkpoint again"
            )

    def read(self, name: str) -> Tensor:
        """One whole tensor on the CPU, in the file's dtype.

        Raises:
            WeightFilesError: there is no tensor of this name, or its file cannot be read.
        """
        self._check(name)
        out = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self.read_into(name, out)
        return out

    @torch.no_grad()
    def read_into(self, name: str, out: Tensor) -> None:
        """Fill `out` (contiguous, of the tensor's shape, any dtype and device). Beyond `out` it takes 8 MB.

        Raises:
            WeightFilesError: there is no tensor of this name, or its file cannot be read.
            ValueError: `out` has another shape or is not contiguous.
        """
        self._check(name)
        if tuple(out.shape) != self.shapes[name] or not out.is_contiguous():
            raise ValueError(
                f"{name} has shape {self.shapes[name]}; `out` must be contiguous and of that shape, not {tuple(out.shape)}"
            )
        dtype = self.dtypes[name]
        path, start = self._places[name]
        flat = out.detach().view(-1)
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                if out.device.type == "cpu" and out.dtype == dtype:
                    _read_exactly(file, flat)
                    return
                # Kept, and the same for every tensor: memory that comes and goes between what stays leaves holes.
                if self._staging is None:
                    self._staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8)
                staging = self._staging.view(dtype)
                step = len(staging)
                for first in range(0, len(flat), step):
                    target = flat[first : first + step]
                    part = staging[: len(target)]
                    _read_exactly(file, part)
                    target.copy_(part)
        except OSError as failure:
            raise WeightFilesError(f"{path} cannot be read ({failure.strerror or failure})") from failure

    def _check(self, name: str) -> None:
        if name not in self._places:
            raise WeightFilesError(f"{self.path} has no tensor {name}; it has, for example, {', '.join(list(self.shapes)[:5])}")


class FusedWeights:
    """A checkpoint's tensors under a module's names.

    Args:
        reader: the files.
        parts: parameter (or buffer) name -> names of the tensors that make it up, stacked along the first axis.
        ignored: names of tensors in the files that the module has no use for.

    Raises:
        WeightFilesError: a tensor is missing, is taken by no parameter, or does not stack with its neighbours.
    """

    def __init__(self, reader: CheckpointReader, parts: Mapping[str, Sequence[str]], ignored: Collection[str] = ()) -> None:
        self.reader = reader
        self.parts = {name: list(keys) for name, keys in parts.items()}
        taken = {key for keys in self.parts.values() for key in keys}
        _check_names(reader.shapes, taken, set(ignored), f"the tensors of {reader.path}")
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, keys in self.parts.items():
            shapes = [reader.shapes[key] for key in keys]
            if len(shapes) == 1:
                self.shapes[name] = shapes[0]
                continue
            if not shapes or any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
                listed = ", ".join(f"{key} {shape}" for key, shape in zip(keys, shapes, strict=True))
                raise WeightFilesError(
                    f"{reader.path}: {name} cannot be stacked along the first axis from {listed or 'nothing'}"
                )
            self.shapes[name] = (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill `out`, part by part; see :meth:`CheckpointReader.read_into`."""
        keys = self.parts[name]
        if len(keys) == 1:
            self.reader.read_into(keys[0], out)
            return
        start = 0
        for key in keys:
            rows = self.reader.shapes[key][0]
            self.reader.read_into(key, out[start : start + rows])
            start += rows


def fused_parts(names: Collection[str], mapping: Callable[[str], tuple[str, int | None, int | None]]) -> dict[str, list[str]]:
    """The `parts` of :class:`FusedWeights` for a mapping such as FastVideo's models have.

    Args:
        names: of the tensors in the files.
        mapping: tensor name -> (parameter name, position among the parts or None, number of parts or None).

    Raises:
        WeightFilesError: a parameter lacks a part, or two tensors claim one place.
    """
    found: dict[str, dict[int, str]] = {}
    counts: dict[str, int] = {}
    for key in names:
        target, position, count = mapping(key)
        places = found.setdefault(target, {})
        if (position or 0) in places:
            raise WeightFilesError(f"{key} and {places[position or 0]} both map to {target}, part {position or 0}")
        places[position or 0] = key
        counts[target] = count or 1
    for target, places in found.items():
        if sorted(places) != list(range(counts[target])):
            raise WeightFilesError(
                f"{target} is made of {counts[target]} tensors, but only {', '.join(places.values())} "
                "map to it; the checkpoint is incomplete"
            )
    return {target: [places[i] for i in sorted(places)] for target, places in found.items()}


@torch.no_grad()
def load_partitioned(
    module: nn.Module,
    weights: Callable[[], WeightSource],
    optim: OptimConfig,
    engine_config: EngineConfig,
    *,
    precision: str,
    world: World,
    buffers: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Turn the parameters of `module` into ZeRO-3 partitions, one at a time; what `DeepSpeedEngine` and
    `partitioned_reference` then take as it is. Until one of them wraps it, it cannot be called. All ranks call it.

    A rank's memory holds its partitions and, in passing, one whole parameter; with an accelerator that one lies there.
    Names, order, requires_grad and attributes of the parameters stay. Parameters that are not on the meta device and
    that `weights` lacks (adapters) are left to the engine. Buffers are whole on every rank, in their own dtype, on
    `world.device`.

    Args:
        module: built under `torch.device("meta")`.
        weights: opens the source; called on rank 0 only, so that only rank 0 needs the files.
        optim, engine_config, precision, world: those of the engine; `engine_config.zero_stage` is 3.
        buffers: name -> value, for buffers that `weights` lacks and that the module builds on the meta device too.

    Returns:
        `module`.

    Raises:
        WeightFilesError: on every rank: files missing or damaged; parameters or persistent buffers that `weights` lacks,
            tensors that the module lacks, other shapes.
        ValueError: `zero_stage` is not 3, or another setting that DeepSpeedEngine refuses; a buffer is left without value.
    """
    if engine_config.zero_stage != 3:
        raise ValueError(f"weights are loaded in partitions with engine.zero_stage=3 only, not {engine_config.zero_stage}")
    world = with_process_group(world)
    deepspeed = import_deepspeed(world)
    config = deepspeed_config(optim, engine_config, precision, world)
    given = dict(buffers or {})

    source: WeightSource | None = None
    failure: Exception | None = None
    shapes: dict[str, tuple[int, ...]] = {}
    if world.rank == 0:
        try:
            source = weights()
            shapes = dict(source.shapes)
        except Exception as error:  # every rank must hear of it
            failure = error
    _agree(world, failure)
    # From here on what is wrong is wrong on every rank: they check the same names.
    shapes = world.broadcast_object(shapes)
    wanted = _wanted(module, shapes, given)
    _check_names(shapes, wanted, set(), "these weights")
    for name, tensor in wanted.items():
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise WeightFilesError(
                f"{name} has shape {tuple(shapes[name])} in the weights, {tuple(tensor.shape)} in the model; "
                "use the checkpoint's own model configuration"
            )

    def filled(name: str, out: Tensor) -> Tensor:
        """`out` with the tensor in it, on rank 0."""
        problem: Exception | None = None
        if source is not None:
            try:
                source.read_into(name, out)
            except Exception as error:
                problem = error
        _agree(world, problem)
        return out

    # Whole parameters pass through one buffer: allocated one by one, between the partitions that stay, they would leave
    # holes in the process's memory.
    largest = max((p.numel() * _dtype(p, precision).itemsize for p in module.parameters()), default=0)
    passage = torch.empty(largest, dtype=torch.uint8, device=world.device)
    done: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for path, owner in module.named_modules():
        for leaf, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in done:
                name = f"{path}.{leaf}" if path else leaf
                if name not in shapes:
                    continue
                dtype = _dtype(parameter, precision)
                room = passage[: parameter.numel() * dtype.itemsize].view(dtype).view(parameter.shape)
                loaded = nn.Parameter(filled(name, room), requires_grad=parameter.requires_grad)
                loaded.__dict__.update(parameter.__dict__)
                # Init converts every parameter below a module; a holder makes it this one.
                holder = nn.Module()
                holder.register_parameter("parameter", loaded)
                with contextlib.redirect_stdout(io.StringIO()):
                    deepspeed.zero.Init(module=holder, config_dict_or_path=config)
                done[id(parameter)] = loaded
                done[id(loaded)] = loaded
            owner._parameters[leaf] = done[id(parameter)]
        for leaf, buffer in list(owner._buffers.items()):
            if buffer is None:
                continue
            name = f"{path}.{leaf}" if path else leaf
            if name in given:
                buffer = given[name].to(buffer.dtype)
            elif name in shapes:
                buffer = filled(name, torch.empty(shapes[name], dtype=buffer.dtype, device=world.device))
                dist.broadcast(buffer.view(-1).view(torch.uint8), 0)
            owner._buffers[leaf] = buffer.to(world.device)
    return module


def _dtype(parameter: Tensor, precision: str) -> torch.dtype:
    return DTYPES[precision] if parameter.is_floating_point() else parameter.dtype


def _wanted(module: nn.Module, shapes: Mapping[str, Any], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that must come from the weights, by name.

    Raises:
        ValueError: a value was given for something that is no buffer of that shape, or a buffer has none.
    """
    wanted: dict[str, Tensor] = {
        name: parameter for name, parameter in module.named_parameters() if parameter.is_meta or name in shapes
    }
    held = dict(module.named_buffers())
    for name, value in given.items():
        if name not in held or held[name].shape != value.shape:
            known = f"shape {tuple(held[name].shape)}" if name in held else "no such buffer"
            raise ValueError(f"buffers[{name!r}] has shape {tuple(value.shape)}; the module has {known}")
    persistent = module.state_dict(keep_vars=True)
    wanted |= {name: buffer for name, buffer in held.items() if name not in given and (name in persistent or name in shapes)}
    empty = [name for name, buffer in held.items() if buffer.is_meta and name not in wanted and name not in given]
    if empty:
        raise ValueError(
            f"{len(empty)} buffers were built on the meta device and are in no checkpoint, so they have no values "
            f"({', '.join(empty[:3])}); give them as buffers={{name: tensor}}"
        )
    return wanted


def _check_names(found: Collection[str], wanted: Collection[str], ignored: Collection[str], what: str) -> None:
    missing = sorted(set(wanted) - set(found))
    extra = sorted(set(found) - set(wanted) - set(ignored))
    if missing or extra:
        raise WeightFilesError(
            f"{what} do not fit the model: {len(missing)} are missing ({', '.join(missing[:3])}), {len(extra)} are not in the "
            f"model ({', '.join(extra[:3])}); use the checkpoint's own model configuration"
        )


def _agree(world: World, failure: Exception | None) -> None:
    """Raise rank 0's failure on every rank."""
    message = world.broadcast_object(
        None if failure is None else str(failure) if isinstance(failure, UserError) else repr(failure)
    )
    if message is not None:
        raise WeightFilesError(message) from failure


def _files(path: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The safetensors files of a checkpoint and, with an index, where it says each tensor is."""
    if path.is_file():
        return [path], None
    for stem in _STEMS:
        index = path / f"{stem}.safetensors.index.json"
        if index.is_file():
            try:
                promised = {name: path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as failure:
                raise WeightFilesError(f"{index} is not an index of safetensors files ({failure!r})") from failure
            return sorted(set(promised.values())), promised
        if (path / f"{stem}.safetensors").is_file():
            return [path / f"{stem}.safetensors"], None
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise WeightFilesError(f"{path} holds no safetensors file; give a component's folder, such as CHECKPOINT/transformer")
    return files, None


def _header(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """name -> (dtype, shape, first byte in the file) of a safetensors file."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if not 0 < length <= size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        entries = {}
        end = 8 + length
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            dtype, shape = _FILE_DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            if dtype is None:
                raise ValueError(f"{name} has dtype {entry['dtype']}; known are {', '.join(_FILE_DTYPES)}")
            if last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {last - first} bytes, not those of {dtype} {shape}")
            entries[name] = (dtype, shape, 8 + length + first)
            end = max(end, 8 + length + last)
        if end > size:
            raise ValueError(f"it has {size} bytes of {end}")
    except OSError as failure:
        raise WeightFilesError(f"{path} cannot be read ({failure.strerror or failure})") from failure
    except (ValueError, KeyError, TypeError, AttributeError) as failure:
        raise WeightFilesError(f"{path} is no whole safetensors file: {failure}; download or copy it again") from failure
    return entries


def _read_exactly(file: io.RawIOBase | Any, out: Tensor) -> None:
    """Fill a flat CPU tensor from where the file stands."""
    view = out.view(torch.uint8).numpy().data
    while len(view):
        count = file.readinto(view)
        if not count:
            raise OSError("it ended early")
        view = view[count:]
