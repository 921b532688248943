"""What every engine promises (`Engine`), and what all of them share (`AdamWEngine`): warm-up, accumulation, averages of the
weights, exact state on disk."""

from __future__ import annotations

import json
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fastvideo_grpo.engines.averages import CALLED, AveragedWeights
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.engines.shards import ENGINE_JSON, EngineStateError, SavedTensors, read_engine_json, write_tensors
from fastvideo_grpo.grpo.decay import Decay
from fastvideo_grpo.precision import DTYPES

if TYPE_CHECKING:
    from fastvideo_grpo.config.keys import OptimConfig

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16")
"""What a network is trained in: fp16 would need its gradients scaled."""

MOMENTS = ("exp_avg", "exp_avg_sq")


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed has split this parameter over ranks (ZeRO-3), so that its own shape says nothing."""
    return hasattr(parameter, "ds_shape")


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of a parameter, also of one that DeepSpeed has split over ranks."""
    return getattr(parameter, "ds_shape", parameter.shape)


def cast_parameters(module: nn.Module, precision: str) -> None:
    """Cast floating-point parameters to `precision`. Buffers stay: they hold things like rotary frequencies, which bf16
    would spoil.

    Raises:
        ValueError: an unknown precision, or parameters split over ranks in another one.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"model.precision is {precision!r}; allowed: {', '.join(PRECISIONS)}")
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            continue
        if is_partitioned(parameter):
            if parameter.dtype != DTYPES[precision]:
                raise ValueError(
                    f"{name} was loaded in partitions as {parameter.dtype}, but model.precision is {precision}; load it in "
                    "the engine's precision"
                )
        else:
            parameter.data = parameter.data.to(DTYPES[precision])


class Engine(Protocol):
    """Who moves the weights.

    One update is `accumulate(n)`, n times `backward(loss)`, `step()`, on every rank alike. Trainable are the parameters
    with requires_grad.

    Attributes:
        module: what the rollout and the replay call.
        world: the processes of the run.
        trainable_names: names of the trainable parameters, as in `named_parameters()` of the module that was handed in,
            without what activation checkpointing adds to them.
        step_calls: calls of `step` so far; the warm-up counts these.
        updates: calls of `step` that changed the weights.
        skipped_updates: calls of `step` that changed nothing, because the gradient was not finite.
        averages: of the weights, by name: "ema" moves with every update, "old" when `move_old_weights` is called.
    """

    module: nn.Module
    world: World
    trainable_names: list[str]
    step_calls: int
    updates: int
    skipped_updates: int
    averages: dict[str, AveragedWeights]

    @property
    def lr(self) -> float:
        """Learning rate that the next call of `step` uses."""
        ...

    def accumulate(self, calls: int) -> None:
        """Say that the next `calls` (>= 1) calls of `backward` make up one update. The number may differ from update to
        update, but not from rank to rank: ZeRO 2 and 3 exchange gradients inside every call."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (scalar). Gradients are summed, over calls and over ranks: divide the loss by the
        number of valid pairs of the whole update beforehand."""
        ...

    def step(self) -> float:
        """Clip to `max_grad_norm` and update the weights.

        Returns:
            Global L2 norm of the summed gradient before clipping; inf when it is not finite (NaN included). Then
            weights, optimiser state and averages stay as they are on every rank, the gradients are dropped, and
            `skipped_updates` rises. Every call counts for the warm-up, skipped or not.
        """
        ...

    def weights_are_finite(self) -> bool:
        """Whether all trainable weights are, the same answer on every rank. All ranks call it."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Trainable weights, whole, as float32 CPU tensors, on every rank. All ranks call it."""
        ...

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Set the trainable weights (whole, any dtype, same on every rank); optimiser state and averages stay. All
        ranks call it."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the exact state: weights, optimiser, counters, averages. All ranks call it with the same existing folder;
        each writes its own files, without any exchange, so an OSError of one rank leaves no other waiting."""
        ...

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Read what `save` wrote: bitwise the same state. Any engine, ZeRO stage and world size reads any other's
        folder. All ranks call it."""
        ...

    def move_old_weights(self) -> None:
        """Let the average "old", if there is one, follow the weights: called once an iteration, after its last update."""
        ...

    def averaged_weights(self, name: str) -> AbstractContextManager[None]:
        """The module with an average's weights inside the block; afterwards bitwise as before. All ranks enter and leave
        together; no update, saving or loading inside.

        With several ranks an error inside leaves those weights in, and the engine refuses to go on: taking them out is
        an exchange, for which a rank alone with its error would wait in vain.
        """
        ...


class AdamWEngine(ABC):
    """Common part of the engines. A subclass says where its pieces of weights and moments lie.

    The state of a parameter is float32: its weight and two moments (AdamW). A rank holds a `span` of it, (start, count)
    in the flattened parameter, or nothing; the spans of all ranks tile the parameter. Saving writes spans, and loading
    reads whatever span is needed from whoever wrote it.
    """

    kind = ""
    zero_stage: int | None = None

    def __init__(self, module: nn.Module, optim: OptimConfig, *, precision: str, world: World) -> None:
        if optim.lr <= 0 or not math.isfinite(optim.lr):
            raise ValueError(f"optim.lr is {optim.lr}; it must be a positive number")
        self.optim = optim
        self.precision = precision
        self.world = world
        self.step_calls = 0
        self.updates = 0
        self.skipped_updates = 0
        self.averages: dict[str, AveragedWeights] = {}
        self._calls_left = 0
        self._calls_made = 0
        self._inside: str | None = None
        # Activation checkpointing renames what it wraps; a saved state fits with and without it.
        self._parameters = {
            name.replace("_checkpoint_wrapped_module.", ""): parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        if not self._parameters:
            raise ValueError(
                "the module has no trainable parameter: it was loaded frozen; call requires_grad_(True) on it, or add LoRA "
                "layers"
            )
        self.trainable_names = list(self._parameters)
        self._shapes = {name: whole_shape(parameter) for name, parameter in self._parameters.items()}
        if self.zero_stage != 3 and any(is_partitioned(parameter) for parameter in module.parameters()):
            raise ValueError(
                "the module's parameters are ZeRO-3 partitions, which only engine.kind=deepspeed with engine.zero_stage=3 "
                "trains; set these, or load the module whole"
            )
        cast_parameters(module, precision)

    # What a subclass provides.

    @abstractmethod
    def span(self, name: str) -> tuple[int, int] | None:
        """This rank's share of a parameter's state, (start, count) in elements; None when it has no share. It writes
        its share when saving, and averages it."""

    def _held(self, name: str) -> tuple[int, int] | None:
        """What this rank holds in memory: its share, or everything where the state is replicated."""
        return self.span(name)

    @abstractmethod
    def _piece(self, name: str, part: str) -> Tensor:
        """The held state, flat float32, sharing its memory. `part` is "weight" or one of MOMENTS."""

    @abstractmethod
    def _refresh_module(self) -> None:
        """Copy the float32 weights into what the module computes with."""

    @abstractmethod
    def _fill_module(self, whole: Callable[[str], Tensor]) -> Callable[[], None]:
        """Put other weights into the module, the float32 ones staying; returns what undoes it."""

    @abstractmethod
    def _adam_states(self) -> list[dict[str, Any]]:
        """The AdamW state dictionaries of this rank, made (zeros) when there are none yet."""

    @abstractmethod
    def _backward(self, loss: Tensor, last: bool) -> None:
        """Add the loss's gradients; ``last``: the next call is :meth:`_update`."""

    @abstractmethod
    def _update(self) -> float:
        """Clip and step with the current `lr`; the norm, not finite when nothing was changed. Gradients are gone
        afterwards."""

    # What follows from it.

    def _start_averages(self, old: Decay | None, device: str | torch.device) -> None:
        decays = {"ema": ema_decay(self.optim), "old": old}
        self.averages = {name: AveragedWeights(decay, device) for name, decay in decays.items() if decay is not None}
        for average in self.averages.values():
            average.start(self._local_weights())

    def _local_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.trainable_names:
            if self.span(name) is not None:
                yield name, self._piece(name, "weight").detach()

    @property
    def lr(self) -> float:
        warmup = self.optim.warmup_steps or 0
        return self.optim.lr * min(1.0, (self.step_calls + 1) / warmup) if warmup > 0 else self.optim.lr

    def accumulate(self, calls: int) -> None:
        if calls < 1:
            raise ValueError(
                f"accumulate({calls}): an update needs at least one call of backward; leave updates without samples "
                "out on every rank"
            )
        if self._calls_made:
            raise RuntimeError(
                f"accumulate({calls}) after {self._calls_made} calls of backward; finish the update with step() first"
            )
        self._calls_left = calls

    def backward(self, loss: Tensor) -> None:
        if self._calls_left == 0:
            raise RuntimeError(
                f"backward call {self._calls_made + 1} of an update announced with accumulate({self._calls_made}); "
                "announce the right number"
            )
        self._calls_left -= 1
        self._calls_made += 1
        self._backward(loss, last=self._calls_left == 0)

    def _refuse_inside(self, call: str) -> None:
        # Where the module's weights are the float32 ones, the averages would pass for them.
        if self._inside is not None:
            raise RuntimeError(
                f"{call}() while the module holds {CALLED[self._inside]}; leave averaged_weights() first (an error inside it "
                "may have kept them in)"
            )

    def step(self) -> float:
        self._refuse_inside("step")
        if self._calls_left or not self._calls_made:
            raise RuntimeError(
                f"step() after {self._calls_made} calls of backward with {self._calls_left} announced calls missing"
            )
        self._calls_made = 0
        norm = self._update()
        self.step_calls += 1
        if math.isfinite(norm):
            self.updates += 1
            if "ema" in self.averages:
                self.averages["ema"].move(self._local_weights())
            return norm
        self.skipped_updates += 1
        return math.inf

    def move_old_weights(self) -> None:
        self._refuse_inside("move_old_weights")
        if "old" in self.averages:
            self.averages["old"].move(self._local_weights())

    def _whole(self, name: str, piece: Tensor | None, device: torch.device | str) -> Tensor:
        """A parameter's float32 state put together from all ranks' pieces, on every rank."""
        share = self.span(name)
        shape = self._shapes[name]
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=device)
        if share is not None and piece is not None:
            whole[share[0] : share[0] + share[1]] = piece.detach().to(whole.device)
        return self.world.all_reduce_sum_in_place(whole).view(shape)

    def weights_are_finite(self) -> bool:
        return self.world.all_true(all(bool(piece.isfinite().all()) for _, piece in self._local_weights()))

    def state_dict(self) -> dict[str, Tensor]:
        self._refuse_inside("state_dict")
        return {
            name: self._whole(name, self._piece(name, "weight") if self.span(name) else None, self.world.device).cpu()
            for name in self.trainable_names
        }

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        self._refuse_inside("load_state_dict")
        self._check_names({name: tuple(weight.shape) for name, weight in weights.items()}, "the given weights")
        with torch.no_grad():
            for name, weight in weights.items():
                held = self._held(name)
                if held is not None:
                    self._piece(name, "weight").copy_(weight.detach().reshape(-1)[held[0] : held[0] + held[1]])
        self._refresh_module()

    def save(self, folder: str | os.PathLike[str]) -> None:
        self._refuse_inside("save")
        if self._calls_made:
            raise RuntimeError("save() in the middle of an update would lose its gradients; call step() first")
        folder = Path(folder)
        shares = [(name, share) for name in self.trainable_names if (share := self.span(name)) is not None]
        parts: dict[str, dict[str, tuple[int, int, Callable[[], Tensor]]]] = {
            "weights": {name: (*share, partial(self._piece, name, "weight")) for name, share in shares}
        }
        if self.updates:
            parts["optimizer"] = {
                f"{moment}.{name}": (*share, partial(self._piece, name, moment)) for moment in MOMENTS for name, share in shares
            }
        for part, average in self.averages.items():
            parts[part] = {name: (*share, partial(average.piece, name)) for name, share in shares}
        for part, pieces in parts.items():
            write_tensors(folder / f"{part}-{self.world.rank:05d}.safetensors", pieces)
        if self.world.rank == 0:
            description = {
                "format": 1,
                "kind": self.kind,
                "zero_stage": self.zero_stage,
                "world_size": self.world.size,
                "precision": self.precision,
                "step_calls": self.step_calls,
                "updates": self.updates,
                "skipped_updates": self.skipped_updates,
                "averages": {name: average.moves for name, average in self.averages.items()},
                "parameters": {name: list(shape) for name, shape in self._shapes.items()},
            }
            (folder / ENGINE_JSON).write_text(json.dumps(description, indent=1))

    def load(self, folder: str | os.PathLike[str]) -> None:
        self._refuse_inside("load")
        folder = Path(folder)
        description = read_engine_json(folder)
        self._check_names({name: tuple(shape) for name, shape in description["parameters"].items()}, str(folder / ENGINE_JSON))
        world_size = description["world_size"]
        with torch.no_grad():
            weights = SavedTensors(folder, "weights", world_size)
            for name in self.trainable_names:
                self._read_piece(weights, name, name, "weight")
            if description["updates"]:
                moments = SavedTensors(folder, "optimizer", world_size)
                states = self._adam_states()
                for name in self.trainable_names:
                    for moment in MOMENTS:
                        self._read_piece(moments, f"{moment}.{name}", name, moment)
            else:
                states = self._adam_states() if self.updates else []
                for state in states:
                    for moment in MOMENTS:
                        state[moment].zero_()
            for state in states:
                state["step"] = torch.tensor(float(description["updates"]), dtype=torch.float32)
        self.step_calls = description["step_calls"]
        self.updates = description["updates"]
        self.skipped_updates = description["skipped_updates"]
        self._calls_left = self._calls_made = 0
        self._refresh_module()
        self._read_averages(folder, description)

    def _read_averages(self, folder: Path, description: Mapping[str, Any]) -> None:
        for name, average in self.averages.items():
            if name not in description["averages"]:
                logger.warning("%s holds no %s; these start from the loaded weights", folder, CALLED[name])
                average.start(self._local_weights())
                continue
            saved = SavedTensors(folder, name, description["world_size"])
            spans = ((parameter, self.span(parameter)) for parameter in self.trainable_names)
            pieces = ((parameter, saved.read(parameter, *span)) for parameter, span in spans if span is not None)
            average.start(pieces, description["averages"][name])
        for name in set(description["averages"]) - set(self.averages):
            logger.warning("%s holds %s, which are dropped: this run has none", folder, CALLED.get(name, name))

    def _read_piece(self, saved: SavedTensors, key: str, name: str, part: str) -> None:
        held = self._held(name)
        if held is not None:
            self._piece(name, part).copy_(saved.read(key, *held))

    def _check_names(self, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
        missing = [name for name in self.trainable_names if name not in shapes]
        extra = [name for name in shapes if name not in self._shapes]
        if missing or extra:
            raise EngineStateError(
                f"{source} does not fit the model's trainable parameters: {len(missing)} are missing ({missing[:3]}), "
                f"{len(extra)} are not in the model ({extra[:3]}); use the model and model.lora settings it was saved "
                "with"
            )
        for name, shape in shapes.items():
            if tuple(self._shapes[name]) != tuple(shape):
                raise EngineStateError(
                    f"{source}: {name} has shape {tuple(shape)}, the model's is {tuple(self._shapes[name])}; "
                    "use the model and model.lora settings it was saved with"
                )

    @contextmanager
    def averaged_weights(self, name: str) -> Iterator[None]:
        if name not in self.averages:
            there = ", ".join(self.averages) or "no average"
            raise RuntimeError(f"there are no {CALLED.get(name, name)}: of its weights this run has {there}")
        if self._inside is not None:
            raise RuntimeError(f"averaged_weights({name!r}) inside averaged_weights({self._inside!r})")
        average = self.averages[name]
        self._inside = name
        restore = self._fill_module(
            lambda parameter: self._whole(
                parameter, average.piece(parameter) if self.span(parameter) else None, self.world.device
            )
        )
        try:
            yield
        except BaseException:
            # Restoring can be an exchange between ranks: when only this one failed, it would wait for the others here.
            if self.world.size > 1:
                raise
            restore()
            self._inside = None
            raise
        restore()
        self._inside = None


def ema_decay(optim: OptimConfig) -> Decay | None:
    """That of the configured exponential moving average.

    Raises:
        ValueError: the decay is no average.
    """
    if optim.ema_decay is None:
        return None
    try:
        return Decay(optim.ema_decay, optim.ema_ramp)
    except ValueError:
        raise ValueError(
            f"optim.ema_decay is {optim.ema_decay}; it must be at least 0 and below 1 (0.999 is usual), or null for no EMA"
        ) from None


def adamw(parameters: Iterable[Tensor], optim: OptimConfig) -> torch.optim.AdamW:
    """The optimiser of all engines."""
    return torch.optim.AdamW(
        list(parameters), lr=optim.lr, betas=tuple(optim.betas), weight_decay=optim.weight_decay, foreach=False
    )
