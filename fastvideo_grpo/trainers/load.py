"""From a configuration to the trainer of its model."""

from __future__ import annotations

import logging
import math
import time
from importlib import import_module
from inspect import isabstract

from torch import nn

from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.engines.base import whole_shape
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.models.run_prompts import configured_prompts
from fastvideo_grpo.planning.checkpoint_checks import unread_files
from fastvideo_grpo.printed_sizes import gib
from fastvideo_grpo.tracking.console import Console
from fastvideo_grpo.trainers.base import GRPOTrainer
from fastvideo_grpo.trainers.conditioning import to_encode

logger = logging.getLogger(__name__)


def trainer_class(kind: str) -> type[GRPOTrainer]:
    """The trainer of a ``model.kind``; only its own module is imported.

    Raises:
        UserError: its family names none that can be imported, or one that does not say all that a model must.
    """
    path = FAMILIES[kind].trainer
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"model.kind={kind}: its trainer {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, type) or not issubclass(found, GRPOTrainer):
        raise UserError(f"model.kind={kind}: its trainer {path} is no class that inherits from GRPOTrainer, but {found!r}")
    if isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise UserError(f"model.kind={kind}: its trainer {path} does not say {missing} (docs/extending.md)")
    return found


def load_trainer(config: Config, world: World) -> GRPOTrainer:
    """Load the checkpoint, and say what it took. Text encoders stay on disk when every prompt's embedding is cached already."""
    started = time.perf_counter()
    cls = trainer_class(config.model.kind)
    left_out = unread_files(config) if world.rank == 0 else None
    if left_out:
        logger.warning("%s", left_out)
    with_text_encoders = True
    if config.prompts.embeddings != "none":
        cache = cls.embedding_cache(config, world)
        with_text_encoders = bool(cache.missing(to_encode(configured_prompts(config), config)))
        if with_text_encoders:
            cache.check_writable()
    trainer = cls(config, world, with_text_encoders=with_text_encoders)
    size = gib(sum(_loaded_bytes(trainer.get_module(name)) for name in FAMILIES[config.model.kind].folders))
    Console(quiet=world.rank != 0).say(f"loaded {config.model.path}: {size} in {time.perf_counter() - started:.1f} s")
    return trainer


def _loaded_bytes(component: object) -> int:
    """Of a component's weights, those in other processes' partitions included; of what is no network nothing."""
    if not isinstance(component, nn.Module):
        return 0
    return sum(math.prod(whole_shape(weight)) * weight.itemsize for weight in component.parameters())
