"""The processes of a run, and the few exchanges between them that the trainer needs.

Everything here moves CPU tensors and Python objects over gloo, so that what is exchanged does not depend on the device;
only `all_reduce_sum_in_place` follows its tensor to the device. With one process and no process group every call is the
identity."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastvideo_grpo import launcher
from fastvideo_grpo.errors import UserError, one_line

# torch can make a gloo group only once per run on every rank; World.current() may be called from several places.
_cpu_group: dist.ProcessGroup | None = None
_cpu_group_of: dist.ProcessGroup | None = None


def make_group_of_one(device: torch.device, timeout: timedelta | None = None) -> None:
    """torch's process group of this process alone, where a library wants one and there is none; it needs no port. It is taken
    down when the process ends, however it does: nccl warns of one that is left."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    atexit.register(_take_down)


def _take_down() -> None:
    global _cpu_group, _cpu_group_of
    if dist.is_initialized() and dist.get_world_size() == 1:
        _cpu_group = _cpu_group_of = None
        dist.destroy_process_group()


@dataclass
class World:
    """The processes of this run as one of them sees them.

    `sequence_parallel` consecutive ranks share the tokens of one sample (as FastVideo's groups do); such a group has one
    data rank, and its first rank is the leader, which decodes, scores and keeps what was sampled.

    Attributes:
        rank: index of this process, 0 to size - 1.
        size: number of processes.
        local_rank: index of this process on its machine.
        device: where this process computes, `cuda:LOCAL_RANK` or `cpu`.
        sequence_parallel: processes a sample is shared by; divides size.

    `World()` is a run of one process without a process group.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cpu_group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    sequence_parallel: int = 1

    def __post_init__(self) -> None:
        if self.sequence_parallel < 1 or self.size % self.sequence_parallel:
            raise ValueError(
                f"{self.size} processes cannot be cut into sequence-parallel groups of {self.sequence_parallel} "
                "(engine.sequence_parallel); use a divisor of the number of processes"
            )

    @property
    def data_rank(self) -> int:
        """Index of this process's sequence-parallel group."""
        return self.rank // self.sequence_parallel

    @property
    def data_size(self) -> int:
        """Number of sequence-parallel groups: how many micro-batches are worked on at once."""
        return self.size // self.sequence_parallel

    @property
    def leads(self) -> bool:
        """Whether this process is the first of its sequence-parallel group."""
        return self.rank % self.sequence_parallel == 0

    @classmethod
    def current(cls, device: str | None = None, timeout_minutes: float = 30, sequence_parallel: int = 1) -> World:
        """The world of this process: an initialised process group (FastVideo may have made it), else torchrun's
        environment, else one process.

        Args:
            device: "cuda" or "cpu"; default: cuda where there is one.
            timeout_minutes: how long a rank waits for the others in one exchange; used for the groups made here.
            sequence_parallel: processes that share one sample.

        Raises:
            ValueError: `sequence_parallel` does not divide the number of processes.
            RuntimeError: cuda was asked for and is not there.
            UserError: torchrun's environment is incomplete or damaged.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("device is 'cuda', but torch sees no GPU; use device 'cpu' or a machine with a GPU")
        local_rank = launcher.number("LOCAL_RANK", 0)
        place = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
        if not (dist.is_available() and dist.is_initialized()):
            launcher.check(complete=True)
            if "WORLD_SIZE" not in os.environ:
                return cls(device=place, sequence_parallel=sequence_parallel)
            if device == "cuda":
                torch.cuda.set_device(place)
            backend = "nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
        group = _gloo_group(timeout_minutes)
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, place, group, sequence_parallel)

    @property
    def distributed(self) -> bool:
        """Whether there is a process group (which may hold one process only)."""
        return self.cpu_group is not None

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.distributed:
            dist.barrier(group=self.cpu_group)

    def leave(self) -> None:
        """Leave the others when all work is done: wait for them, then take the process groups down.

        A process that ends with its groups up may be aborted on the way out by threads of theirs (seen with torch 2.12 and
        gloo: "terminate called without an active exception", exit code -6), and torchrun ends the others when one has left.
        """
        global _cpu_group, _cpu_group_of
        if self.size > 1:
            self.barrier()
            self.cpu_group = _cpu_group = _cpu_group_of = None  # a group lives as long as somebody holds it
            dist.destroy_process_group()

    def all_gather_object(self, value: Any) -> list[Any]:
        """One picklable object of every rank, in rank order."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def on_rank_0(self, action: Callable[[], Any]) -> Any:
        """Rank 0's result of `action` there, None elsewhere. What it raises there, the others raise as a UserError, so that
        none waits for a rank that has left."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = action()
            except Exception as failure:
                error = failure
        told = None if error is None else str(error) if isinstance(error, UserError) else one_line(error)
        told = self.broadcast_object(told)
        if error is not None:
            raise error
        if told is not None:
            raise UserError(told)
        return result

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The picklable object of rank `source`, on every rank."""
        if not self.distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=source, group=self.cpu_group)
        return values[0]

    def all_true(self, flag: bool) -> bool:
        """Whether `flag` holds on every rank."""
        return all(self.all_gather_object(bool(flag)))

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of all ranks, concatenated in rank order.

        Args:
            rows: CPU tensor [n, ...] of any dtype, with the same shape and dtype on every rank.

        Returns:
            CPU tensor [size * n, ...].

        Raises:
            ValueError: the tensor is not on the CPU or has no row axis.
        """
        if rows.device.type != "cpu" or rows.dim() == 0:
            raise ValueError(
                f"all_gather_rows takes CPU tensors [n, ...], got shape {tuple(rows.shape)} on {rows.device}; call .cpu() first"
            )
        if not self.distributed:
            return rows
        # As bytes: gloo does not know every dtype.
        sent = rows.contiguous().reshape(-1).view(torch.uint8)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent, group=self.cpu_group)
        return torch.cat([part.view(rows.dtype).reshape(rows.shape) for part in received])

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, added in rank order so that every rank and every repetition gets the same bits.

        Args:
            values: CPU float64 tensor, same shape on every rank.

        Returns:
            A new tensor of the same shape and dtype.
        """
        if values.dtype != torch.float64:
            raise ValueError(f"all_reduce_sum takes float64, got {values.dtype}; call .double() first")
        return self.all_gather_rows(values.detach()[None]).sum(dim=0) if self.distributed else values.detach().clone()

    def all_reduce_sum_in_place(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` (any device, contiguous) by its sum over ranks, and return it. The order of summation is the
        backend's."""
        if self.distributed and self.size > 1:
            # The gloo group knows no device tensors; the default group does.
            dist.all_reduce(tensor, group=self.cpu_group if tensor.device.type == "cpu" else None)
        return tensor

    def exchange(
        self,
        rows: dict[Hashable, Tensor],
        wanted: Sequence[Sequence[Hashable]],
        owner: dict[Hashable, int],
    ) -> dict[Hashable, Tensor]:
        """Send each wanted row from the rank that has it to every rank that wants it.

        Args:
            rows: what this rank owns: key -> CPU tensor of any shape and dtype.
            wanted: for every rank the keys it wants; the same lists on every rank.
            owner: key -> rank that has it in `rows`; the same on every rank.

        Returns:
            This rank's wanted rows, in the order of its list. Rows it owns itself are handed back as they are, not
            copied.

        Raises:
            ValueError: on every rank, naming the keys that have no owner or that their owner does not hold.
        """
        if len(wanted) != self.size:
            raise ValueError(
                f"exchange: `wanted` has {len(wanted)} lists for {self.size} ranks; give one list (possibly empty) per rank"
            )
        unowned = sorted({repr(key) for keys in wanted for key in keys if not 0 <= owner.get(key, -1) < self.size})
        if unowned:
            raise ValueError(f"exchange: no rank owns {', '.join(unowned[:5])}; every wanted key needs an entry in `owner`")
        # All ranks build the same list, so a transfer's index can serve as its tag.
        transfers = [(reader, key) for reader, keys in enumerate(wanted) for key in dict.fromkeys(keys) if owner[key] != reader]
        mine = {key for keys in wanted for key in keys if owner[key] == self.rank}
        sent_keys = {key for _, key in transfers if owner[key] == self.rank}
        missing = sorted(repr(key) for key in mine if key not in rows)
        on_device = sorted(repr(key) for key in mine if key in rows and rows[key].device.type != "cpu")
        layout = {key: (rows[key].shape, rows[key].dtype) for key in sent_keys if key in rows}
        layouts: dict[Hashable, tuple[torch.Size, torch.dtype]] = {}
        # Errors travel with the layouts, so that no rank is left waiting for a row that will not come.
        for rank, (lacks, off_cpu, part) in enumerate(self.all_gather_object((missing, on_device, layout))):
            if lacks:
                raise ValueError(f"exchange: rank {rank} owns {', '.join(lacks[:5])} but has no such row")
            if off_cpu:
                raise ValueError(f"exchange: rank {rank} holds {', '.join(off_cpu[:5])} on a device; rows must be CPU tensors")
            layouts.update(part)

        received: dict[Hashable, Tensor] = {}
        pending = []
        for tag, (reader, key) in enumerate(transfers):
            shape, dtype = layouts[key]
            size = shape.numel() * dtype.itemsize
            if reader == self.rank:
                buffer = torch.empty(size, dtype=torch.uint8)
                received[key] = buffer.view(dtype).reshape(shape)
                if size:
                    pending.append((dist.irecv(buffer, src=owner[key], group=self.cpu_group, tag=tag), buffer))
            elif owner[key] == self.rank and size:
                buffer = rows[key].detach().contiguous().reshape(-1).view(torch.uint8)
                pending.append((dist.isend(buffer, dst=reader, group=self.cpu_group, tag=tag), buffer))
        for work, _ in pending:
            if work is not None:
                work.wait()
        return {key: rows[key] if owner[key] == self.rank else received[key] for key in wanted[self.rank]}


def _gloo_group(timeout_minutes: float) -> dist.ProcessGroup:
    global _cpu_group, _cpu_group_of
    default = dist.group.WORLD
    assert default is not None
    if _cpu_group is None or _cpu_group_of is not default:
        if dist.get_backend() == "gloo":
            _cpu_group = default
        else:
            _cpu_group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        _cpu_group_of = default
    return _cpu_group
