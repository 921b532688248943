"""DeepSpeed's ZeRO under torchrun: gloo on CPUs, nccl on GPUs. `import deepspeed` happens when an engine is made."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvideo_grpo.engines.base import AdamWEngine, adamw, cast_parameters
from fastvideo_grpo.engines.deepspeed_json import Stated, merge_json, optimizer_stated
from fastvideo_grpo.engines.local import clip_gradients, made_state
from fastvideo_grpo.engines.parallel import World, make_group_of_one
from fastvideo_grpo.engines.process import no_news_of_toolkits
from fastvideo_grpo.grpo.decay import Decay

if TYPE_CHECKING:
    from fastvideo_grpo.config.keys import EngineConfig, OptimConfig

logger = logging.getLogger(__name__)


class DeepSpeedEngine(AdamWEngine):
    """ZeRO 0 to 3 around torch's AdamW; equals `LocalEngine` up to the order of summation.

    DeepSpeed averages gradients over ranks; the loss is multiplied by the world size beforehand, which undoes that
    (exactly where the size is a power of two). Gradients are reduced and accumulated in float32 in every precision.

    bf16 with `zero_stage` 0 runs as stage 1, and `zero_stage` then says 1: DeepSpeed has one optimiser for both
    (BF16_Optimizer), which keeps the float32 masters and shards them over ranks.

    Args:
        module: a plain module, the same weights on every rank. Its parameters (not its buffers) are cast to `precision`
            and moved to `world.device`. Trainable: those with requires_grad; frozen ones work at every stage. With
            `zero_stage` 3 also one from `sharded_loading.load_partitioned`, with or without adapters added since.
        optim: lr, betas, weight_decay, max_grad_norm (None or 0: no clipping), warmup_steps (linear), ema_decay,
            ema_ramp.
        engine_config: zero_stage (0 to 3), offload ("none", "optimizer": AdamW's state and step on the CPU, "parameters":
            the weights too, stage 3 only), micro_batch_size; deepspeed_json (None, or a DeepSpeed configuration
            file that may repeat what ours say, say "auto", and tune the rest.
        precision: "fp32" or "bf16".
        world: from `World.current()`. Without a process group one of a single process is made.
        old: decay of the weights that follow the trained ones from one iteration to the next; None: there are none.
        average_device: where the averages of the weights lie.

    Raises:
        ValueError: a value is out of range or does not go with another.
    """

    kind = "deepspeed"

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        engine_config: EngineConfig,
        *,
        precision: str = "fp32",
        world: World | None = None,
        old: Decay | None = None,
        average_device: str | torch.device = "cpu",
    ) -> None:
        world = with_process_group(world or World.current())
        self.zero_stage = _zero_stage(engine_config, precision)
        super().__init__(module, optim, precision=precision, world=world)
        deepspeed = import_deepspeed(world)
        self._adam = adamw(self._parameters.values(), optim)
        config = deepspeed_config(optim, engine_config, precision, world)
        self.module = _initialize(model=module, optimizer=self._adam, config=config)
        self._gathered = deepspeed.zero.GatheredParameters
        self._start_averages(old, average_device)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimiser around AdamW (stages 1 to 3)."""
        return self.module.optimizer

    @property
    def _flat_buffers(self) -> list[Tensor]:
        """This rank's float32 weights under ZeRO, which are what AdamW updates."""
        if self.zero_stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        if hasattr(self._zero, "single_partition_of_fp32_groups"):
            return self._zero.single_partition_of_fp32_groups
        return self._zero.fp32_groups_flat_partition

    def _fragment(self, name: str) -> tuple[Tensor, int, int, int] | None:
        """Where this rank's float32 state of a parameter lies under ZeRO: (flat buffer, offset in it, start in the
        flattened parameter, count)."""
        parameter = self._parameters[name]
        if self.zero_stage == 3:
            group, offset, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = padded * self.world.rank
            count = min(padded, self._shapes[name].numel() - start)  # the last ranks' partitions are padded
            return (self._flat_buffers[group], offset, start, count) if count > 0 else None
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed hangs it on
        if mapping is None:
            return None
        buffer = self._flat_buffers[mapping.param_group_index]
        address = mapping.lp_fragment_address
        return buffer, mapping.hp_fragment_address.start, address.start, address.numel

    def span(self, name: str) -> tuple[int, int] | None:
        if self.zero_stage == 0:  # replicated: dealt over ranks for the files and the averages
            owner = self.trainable_names.index(name) % self.world.size
            return (0, self._shapes[name].numel()) if owner == self.world.rank else None
        fragment = self._fragment(name)
        return None if fragment is None else fragment[2:]

    def _held(self, name: str) -> tuple[int, int] | None:
        return (0, self._shapes[name].numel()) if self.zero_stage == 0 else self.span(name)

    def _piece(self, name: str, part: str) -> Tensor:
        if self.zero_stage == 0:
            parameter = self._parameters[name]
            return (parameter if part == "weight" else self._adam.state[parameter][part]).detach().view(-1)
        fragment = self._fragment(name)
        assert fragment is not None
        buffer, offset, _, count = fragment
        return (buffer if part == "weight" else self._adam.state[buffer][part]).detach()[offset : offset + count]

    def _adam_states(self) -> list[dict[str, Any]]:
        buffers = list(self._parameters.values()) if self.zero_stage == 0 else self._flat_buffers
        return [made_state(self._adam, buffer) for buffer in buffers]

    @torch.no_grad()
    def _refresh_module(self) -> None:
        zero = self._zero
        if self.zero_stage in (1, 2):
            zero.update_lp_params()
        elif self.zero_stage == 3:
            # As at the end of DeepSpeed's step: shards from the float32 weights, then the small ones it keeps whole.
            zero._partition_all_parameters()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @torch.no_grad()
    def _fill_module(self, whole: Callable[[str], Tensor]) -> Callable[[], None]:
        if self.zero_stage == 0:  # no masters to come back from
            kept = {name: parameter.detach().cpu().clone() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            weight = whole(name)
            if self.zero_stage == 3:
                with self._gathered([parameter], modifier_rank=0):
                    if self.world.rank == 0:
                        parameter.data.copy_(weight)
            else:
                parameter.data.copy_(weight)
        if self.zero_stage:
            return self._refresh_module

        def restore() -> None:
            for name, parameter in self._parameters.items():
                parameter.data.copy_(kept[name])

        return restore

    def _backward(self, loss: Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss * self.world.size, scale_wrt_gas=False)

    def _update(self) -> float:
        for group in self._adam.param_groups:
            group["lr"] = self.lr
        if self.zero_stage == 0:
            # DeepSpeed guards and measures nothing here; the gradients are already whole and equal on every rank.
            norm = clip_gradients(list(self._parameters.values()), self.optim.max_grad_norm)
            if math.isfinite(norm):
                self._adam.step()
            self._adam.zero_grad(set_to_none=True)
            return norm
        self.module.step()
        if not self._zero.overflow:
            return float(self.module.get_global_grad_norm())
        if self.zero_stage in (1, 2) and hasattr(self._zero, "averaged_gradients"):
            # In bf16 with the optimiser offloaded DeepSpeed 0.19.8 keeps the gradients of a skipped step and adds the next
            # ones to them: after one NaN it would never update again.
            for group in self._zero.averaged_gradients:
                self._zero.averaged_gradients[group] = None
        return math.inf


def partitioned_reference(
    module: nn.Module, optim: OptimConfig, engine_config: EngineConfig, *, precision: str = "fp32", world: World | None = None
) -> nn.Module:
    """A frozen module whose weights stay in ZeRO-3 partitions: calling it gathers them layer by layer and lets them go.

    For the starting weights of full fine-tuning (KL), beside the `DeepSpeedEngine` that trains. All ranks call it, and
    what it returns, equally often. It takes the memory of the partitions and of the layers in flight.

    Args:
        module: from `sharded_loading.load_partitioned`, or a plain one (the same on every rank). All parameters are
            frozen; plain ones are cast to `precision`.
        optim, engine_config, precision, world: those of the engine; `engine_config.zero_stage` is 3.

    Returns:
        What to call under `torch.no_grad()` in the place of `module`.

    Raises:
        ValueError: `zero_stage` is not 3, or another setting that DeepSpeedEngine refuses.
    """
    world = with_process_group(world or World.current())
    if engine_config.zero_stage != 3:
        raise ValueError(
            f"a partitioned reference needs engine.zero_stage=3, not {engine_config.zero_stage}; copy the module instead"
        )
    cast_parameters(module.requires_grad_(False), precision)
    import_deepspeed(world)
    return _initialize(model=module, config=deepspeed_config(optim, engine_config, precision, world))


def deepspeed_config(optim: OptimConfig, engine_config: EngineConfig, precision: str, world: World) -> dict[str, Any]:
    """DeepSpeed's JSON configuration for ours, with the keys of `engine_config.deepspeed_json` (a path) laid over it: what
    repeats ours or says "auto" is taken, tuning keys go through.

    Raises:
        ConfigError: the file cannot be read or contradicts ours.
    """
    stage = _zero_stage(engine_config, precision)
    zero: dict[str, Any] = {"stage": stage}
    # Pinned memory belongs to CUDA; on a CPU there is nothing to pin for.
    cpu = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    if engine_config.offload != "none":
        zero["offload_optimizer"] = dict(cpu)
    if engine_config.offload == "parameters":
        zero["offload_param"] = dict(cpu)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": engine_config.micro_batch_size,
        "gradient_accumulation_steps": 1,  # the real number is announced per update
        "gradient_clipping": float(optim.max_grad_norm or 0.0) if stage else 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own is a C++ extension to be compiled
        "wall_clock_breakdown": False,
    }
    path = engine_config.deepspeed_json
    return merge_json(config, path, _stated(optim, engine_config, precision, world)) if path else config


def _stated(optim: OptimConfig, engine_config: EngineConfig, precision: str, world: World) -> list[Stated]:
    """The DeepSpeed keys that follow from ours."""
    size, clip, stage = engine_config.micro_batch_size, float(optim.max_grad_norm or 0.0), engine_config.zero_stage
    offload = f"engine.offload is {engine_config.offload}"
    optimizer_device = "none" if engine_config.offload == "none" else "cpu"
    parameter_device = "cpu" if engine_config.offload == "parameters" else "none"
    bf16 = precision == "bf16"
    masters = "weights, moments and gradients are float32 at every model.precision"
    leave = "leave it out"
    return [
        Stated(
            "train_batch_size", (size * world.size,), f"engine.micro_batch_size is {size}, which makes {size * world.size} here"
        ),
        Stated("train_micro_batch_size_per_gpu", (size,), f"engine.micro_batch_size is {size}"),
        Stated(
            "gradient_accumulation_steps",
            (1,),
            "how much makes up an update follows from grpo.* and engine.micro_batch_size",
            'set it to "auto" or leave it out',
        ),
        Stated("gradient_clipping", (clip,), f"optim.max_grad_norm is {optim.max_grad_norm}"),
        Stated("bf16.enabled", (bf16,), f"model.precision is {precision}"),
        Stated("bfloat16.enabled", (bf16,), f"model.precision is {precision}"),
        Stated("bf16.check_grad_overflow", (True,), "updates that are not finite are skipped and counted", leave),
        Stated("bf16.bf16_master_weights_and_grads", (False,), masters, leave),
        Stated("bf16.bf16_optimizer_states", (False,), masters, leave),
        Stated("fp16.enabled", (False,), f"model.precision is {precision} (fp32 and bf16 are there)", "set it to false"),
        Stated("data_types.grad_accum_dtype", ("fp32",), masters, leave),
        Stated("zero_optimization.stage", (stage,), f"engine.zero_stage is {stage}"),
        Stated("zero_optimization.offload_optimizer.device", (optimizer_device,), offload),
        Stated("zero_optimization.offload_param.device", (parameter_device,), offload),
        Stated("zero_optimization.cpu_offload", (optimizer_device == "cpu",), offload),
        Stated("zero_optimization.cpu_offload_param", (parameter_device == "cpu",), offload),
        Stated("zero_allow_untested_optimizer", (True,), "the optimiser here is torch's AdamW", leave),
        Stated("zero_force_ds_cpu_optimizer", (False,), "the optimiser here is torch's AdamW", leave),
        *optimizer_stated(optim),
    ]


def _zero_stage(engine_config: EngineConfig, precision: str) -> int:
    stage, offload = engine_config.zero_stage, engine_config.offload
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"engine.zero_stage is {stage!r}; allowed: 0, 1, 2, 3")
    if offload not in ("none", "optimizer", "parameters"):
        raise ValueError(f"engine.offload is {offload!r}; allowed: none, optimizer, parameters")
    if offload == "parameters" and stage != 3:
        raise ValueError(f"engine.offload=parameters needs engine.zero_stage=3, not {stage}; or use offload=optimizer")
    if offload == "optimizer" and stage == 0:
        raise ValueError("engine.offload=optimizer needs engine.zero_stage 1, 2 or 3, not 0; or use offload=none")
    return 1 if stage == 0 and precision == "bf16" else stage


def with_process_group(world: World) -> World:
    """`world`, or, where there is no process group, that of one made of this process alone: DeepSpeed needs one."""
    if dist.is_initialized():
        return world
    make_group_of_one(world.device)
    return World.current(device=world.device.type)


def import_deepspeed(world: World) -> Any:
    """The package, quiet, on the run's device and process group."""
    # Without this DeepSpeed guesses from what the machine has, not from what the run uses.
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it insists, torchrun or not
    with no_news_of_toolkits():
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On a CPU it would compile a shared-memory all-reduce into the cache of the user: minutes, and only inference uses
    # it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)  # takes torch's process group
    return deepspeed


def _initialize(**arguments: Any) -> Any:
    """DeepSpeed's engine."""
    import deepspeed

    chatter = io.StringIO()
    with contextlib.redirect_stdout(chatter):  # it prints memory tables, whatever its log level
        engine, *_ = deepspeed.initialize(**arguments, dist_init_required=False)
    logger.debug("deepspeed.initialize: %s", chatter.getvalue())
    return engine
