"""How many floating-point operations a model's network is, counted on passes without weights
(:mod:`fastvideo_grpo.planning.weightless`): matrix products, convolutions and attention, a multiplication and an addition being
two. Norms, activations and the like are not counted, as in published figures of MFU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fastvideo_grpo.config.keys import Config, checkpointed_blocks
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.planning.weightless import LAYERS, weightless_pass, with_sizes

_FEW = 2
"""Blocks of each kind up to which a network is counted whole; of more, a block is counted as the difference of two networks."""


@dataclass(frozen=True)
class Operations:
    """Floating-point operations on one process of one sample's pass through the network, with one text (guidance makes two).

    Attributes:
        forward: of a pass without gradients.
        backward: of its gradients, where those of all trained weights are asked for.
        recomputed: that ``engine.activation_checkpointing`` adds to ``backward``.
    """

    forward: float
    backward: float
    recomputed: float


def count_operations(trainer: type[Any], config: Config, facts: ModelFacts) -> Operations:
    """Those of a run's network, of texts of ``prompts.text_length`` tokens.

    Where processes share a sample's tokens each has its part of the image's and of attention, and all of the text's.

    Args:
        trainer: the model's :class:`~fastvideo_grpo.trainers.base.GRPOTrainer`.
    """
    plain = replace(config, engine=replace(config.engine, activation_checkpointing="none"))
    counted = _network(trainer, plain, facts)
    shared = config.engine.sequence_parallel
    if shared > 1:
        length = config.prompts.text_length
        longer = replace(plain, prompts=replace(plain.prompts, text_length=2 * length))
        of_text = (_network(trainer, longer, facts) - counted)[::2]  # twice the text
        forward, backward = (counted[::2] - of_text + counted[1::2]) / shared + of_text
    else:
        forward, backward = counted[::2] + counted[1::2]
    every = checkpointed_blocks(config.engine.activation_checkpointing)
    recomputed = _recomputed(trainer, config, facts, every) / shared if every else 0.0
    return Operations(float(forward), float(backward), recomputed)


def count_decoding(config: Config, facts: ModelFacts) -> float:
    """Operations of decoding a sample, by diffusers' VAE; with ``sample.vae_tiling`` tiles overlap, which is not counted.

    Raises:
        UserError: diffusers has no such VAE.
    """
    import diffusers

    family = FAMILIES[config.model.kind]
    vae_config = dict(facts.vae)
    cls = getattr(diffusers, vae_config.pop("_class_name"), None)
    if cls is None:
        raise UserError(f"diffusers has no {facts.vae['_class_name']}: what decoding takes cannot be counted")
    with FakeTensorMode(), torch.device("cpu"), torch.no_grad():
        vae = cls.from_config(vae_config)
        latents = torch.randn(1, *family.latent_shape(facts, config.sample))
        with _OperationCounter() as counter:
            vae.decode(latents)
    return float(counter.counted.sum())


def _network(trainer: type[Any], config: Config, facts: ModelFacts) -> np.ndarray[Any, Any]:
    """Of all blocks: see :func:`_counted`."""
    blocks = _blocks(facts)
    if all(count <= _FEW for count in blocks.values()):
        return _counted(trainer, config, facts)
    base, of_block = _of_blocks(blocks, lambda changed: _counted(trainer, config, _sized(facts, config, changed)))
    return base + sum((count - 1) * of_block[layers] for layers, count in blocks.items())


def _recomputed(trainer: type[Any], config: Config, facts: ModelFacts, every: int) -> float:
    """Of the backward pass, by recomputing every so many blocks."""
    plain = replace(config, engine=replace(config.engine, activation_checkpointing="none"))

    def more(config: Config, changed: dict[str, int]) -> np.ndarray[Any, Any]:
        sized = _sized(facts, config, changed)
        both = _counted(trainer, config, sized) - _counted(trainer, plain, sized)
        return both[2:].sum(keepdims=True)

    blocks = _blocks(facts)
    if all(count <= _FEW for count in blocks.values()):
        return float(more(config, {})[0])
    full = replace(config, engine=replace(config.engine, activation_checkpointing="full"))
    _, of_block = _of_blocks(blocks, lambda changed: more(full, changed))
    return float(sum(-(-count // every) * of_block[layers][0] for layers, count in blocks.items()))


def _of_blocks(
    blocks: dict[str, int], count: Callable[[dict[str, int]], np.ndarray[Any, Any]]
) -> tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    """What is counted of a network with one block of each kind, and of each kind's block."""
    ones = dict.fromkeys(blocks, 1)
    base = count(ones)
    return base, {layers: count({**ones, layers: 2}) - base for layers in blocks}


def _blocks(facts: ModelFacts) -> dict[str, int]:
    """How many blocks of each kind the network has; none is named of a UNet, which is counted whole."""
    return {layers: int(facts.denoiser[layers]) for layers in LAYERS if facts.denoiser.get(layers)}


def _sized(facts: ModelFacts, config: Config, changed: dict[str, int]) -> ModelFacts:
    return with_sizes(facts, FAMILIES[config.model.kind], changed)


def _counted(trainer: type[Any], config: Config, facts: ModelFacts) -> np.ndarray[Any, Any]:
    """``[forward without attention, its attention, backward without attention, its attention]`` of one process alone."""
    with weightless_pass(trainer, config, facts) as (_, once), torch.enable_grad(), _OperationCounter() as counter:
        output = once()
        forward = counter.counted.copy()
        output.float().sum().backward()
    return np.concatenate([forward, counter.counted - forward])


class _OperationCounter(TorchDispatchMode):
    """Within, ``counted``: operations without attention's, and attention's, by the formulas of torch's ``FlopCounterMode``. (It
    follows modules, too, and takes three times as long.)"""

    def __init__(self) -> None:
        super().__init__()
        self.counted = np.zeros(2)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operator = func._overloadpacket
        if operator in _ATTENTION_ON_CPU:
            self.counted[1] += _ATTENTION_ON_CPU[operator](*(tensor.shape for tensor in args if isinstance(tensor, Tensor)))
        elif operator in flop_registry:
            attention = "scaled_dot_product" in str(operator)
            self.counted[int(attention)] += flop_registry[operator](*args, **kwargs, out_val=out)
        return out


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_mask: torch.Size) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_rest: torch.Size) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


# torch 2.11's table has the attention of GPUs alone.
_ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
