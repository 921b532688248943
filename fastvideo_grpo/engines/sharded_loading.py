"""Weights from a checkpoint's files straight into ZeRO-3 partitions: no process ever holds a whole model.

    CheckpointReader     the tensors of a component's weight files, one at a time
    FusedWeights         the same under a module's names, where one parameter is several tensors of the files
    load_partitioned     a module on the meta device -> DeepSpeed's partitioned parameters

Rank 0 reads one parameter, DeepSpeed sends it to the others, everyone keeps its share and frees the rest. Files are read
with plain reads instead of being mapped: mapped pages would count as this process's memory until the kernel takes them
back.
"""

from __future__ import annotations

import contextlib
import io
import logging
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
from fastvideo_grpo.model_files.headers import mapped_tensors, read_entries
from fastvideo_grpo.model_files.selection import Selection, WeightFilesError, select
from fastvideo_grpo.precision import DTYPES

if TYPE_CHECKING:
    from fastvideo_grpo.config.keys import EngineConfig, OptimConfig

logger = logging.getLogger(__name__)

_STAGING_BYTES = 8 * 2**20


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
        path: a component's folder, of which :func:`~fastvideo_grpo.model_files.selection.select` says what is read, or a file.

    Attributes:
        shapes: name -> shape, in the order of the files.
        dtypes: name -> dtype in the file.

    Raises:
        WeightFilesError: no file, one that cannot be read or is cut short, or a tensor that the index promises and the file
            lacks.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        selection = select(self.path) if self.path.is_dir() else Selection(self.path.parent, None, (self.path,), None, ())
        self._entries = read_entries(selection)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self._entries.items()}
        self._staging: Tensor | None = None

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
        dtype, _, path, start = self._entries[name]
        if start is None:
            out.copy_(mapped_tensors(path)[name])
            return
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
        if name not in self._entries:
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


def _read_exactly(file: io.RawIOBase | Any, out: Tensor) -> None:
    """Fill a flat CPU tensor from where the file stands."""
    view = out.view(torch.uint8).numpy().data
    while len(view):
        count = file.readinto(view)
        if not count:
            raise OSError("it ended early")
        view = view[count:]
