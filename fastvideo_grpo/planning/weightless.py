"""Passes of a model's network without weights, data or a GPU, as its own trainer makes them.

The network is the class that is loaded, its parameters and inputs tensors without storage (torch's FakeTensorMode): a pass
takes a fraction of a second, whatever its size, and what it would hold or compute can be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvideo_grpo.config.keys import Config, checkpointed_blocks
from fastvideo_grpo.engines.activation_checkpointing import checkpoint_blocks, find_blocks
from fastvideo_grpo.engines.lora import add_lora
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.family import Family
from fastvideo_grpo.models.networks import fastvideo_transformer, one_process, own_tables
from fastvideo_grpo.models.registry import FAMILIES, lora_settings
from fastvideo_grpo.precision import DTYPES
from fastvideo_grpo.sampling.schedules import Level

LAYERS = ("num_layers", "num_single_layers", "num_refiner_layers")
"""Keys of a transformer's configuration that say how many blocks of a kind it has: double, single, of the text."""


def with_sizes(facts: ModelFacts, family: Family, changed: dict[str, int]) -> ModelFacts:
    """A model whose network has these sizes instead."""
    denoiser = {**facts.denoiser, **changed}
    return replace(facts, components={**facts.components, family.denoiser: denoiser})


@contextmanager
def weightless_pass(
    trainer: type[Any], config: Config, facts: ModelFacts
) -> Iterator[tuple[list[Tensor], Callable[[], Tensor]]]:
    """The network of ``facts`` without weights, adapters and recomputed blocks as ``config`` has them.

    Args:
        trainer: the model's :class:`~fastvideo_grpo.trainers.base.GRPOTrainer`, which calls the network.
        config: what a sample is: its size, ``prompts.text_length``, the dtype.

    Yields:
        What is there before a pass, weights and inputs; and a function that makes a pass over one sample with one text, with
        gradients when they are enabled, in a single process.
    """
    family, dtype = FAMILIES[config.model.kind], DTYPES[config.model.precision]
    network = _network(family, facts.denoiser, dtype)
    if config.model.lora is None:
        network.requires_grad_(True)
    else:
        add_lora(network, lora_settings(config), seed=0)
    with ExitStack() as stack:
        if family.fastvideo_config is not None:
            stack.enter_context(one_process())
            stack.enter_context(own_tables())
        # On the "cpu", whose attention keeps what GPUs' kernels keep, too: no matrix of all tokens with all.
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.device("cpu"))
        _on_cpu(network, dtype)
        every = checkpointed_blocks(config.engine.activation_checkpointing)
        if every:
            checkpoint_blocks(network, find_blocks(network, family.blocks, family.not_recomputed), every)
        policy = _around(trainer, network, config, facts)
        shapes = family.conditioning_shapes(facts, config.sample, config.prompts.text_length)
        conditioning = {name: torch.randn(1, *shape) for name, shape in shapes.items()}
        sample = policy.pack(torch.randn(1, *family.latent_shape(facts, config.sample)))
        level = Level(*(torch.full((1,), value) for value in (0.5, 0.5, 500.0, 0)))
        stack.enter_context(policy.forward_context(conditioning))
        there = [*network.parameters(), *network.buffers(), sample, *conditioning.values()]
        yield there, lambda: policy.network_output(sample, level, conditioning)


def _network(family: Family, denoiser: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    if family.fastvideo_config is not None:
        network = fastvideo_transformer(family.fastvideo_config, denoiser, dtype)
    else:
        network = family.network(denoiser, as_trained=True)
    return network.eval()


def _on_cpu(network: nn.Module, dtype: torch.dtype) -> None:
    """Put a network that is on the meta device onto the CPU of the FakeTensorMode that is entered, parameters in ``dtype``, as
    they are loaded."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                there = torch.empty(parameter.shape, dtype=dtype)
                module._parameters[name] = nn.Parameter(there, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _around(trainer: type[Any], network: nn.Module, config: Config, facts: ModelFacts) -> Any:
    """The trainer of a model of which nothing is loaded but the network: enough for a pass."""
    denoiser = FAMILIES[config.model.kind].denoiser

    class NetworkAlone(trainer):
        def __init__(self) -> None:
            self.config, self.facts, self.dtype = config, facts, DTYPES[config.model.precision]

        def __del__(self) -> None:
            """There is nothing to let go of."""

        def get_module(self, name: str, default: Any = None) -> Any:
            return network if name == denoiser else default

    return NetworkAlone()
