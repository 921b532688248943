"""The configured engine around a network."""

from __future__ import annotations

from torch import nn

from fastvideo_grpo.config.keys import Config, old_weights_decay
from fastvideo_grpo.engines.base import Engine
from fastvideo_grpo.engines.parallel import World


def uses_zero3(config: Config) -> bool:
    """Whether the network's weights live in ZeRO-3 partitions."""
    return config.engine.kind == "deepspeed" and config.engine.zero_stage == 3


def make_engine(module: nn.Module, config: Config, world: World) -> Engine:
    """The engine of ``engine.kind``; only its own libraries are imported.

    Args:
        module: the network as it is trained, its parameters loaded (with ZeRO-3 in partitions).
    """
    precision, old = config.model.precision, old_weights_decay(config)
    if config.engine.kind == "deepspeed":
        from fastvideo_grpo.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, config.optim, config.engine, precision=precision, world=world, old=old)
    from fastvideo_grpo.engines.local import LocalEngine

    return LocalEngine(module, config.optim, precision=precision, device=world.device, old=old)
