"""Activation checkpointing of diffusers' UNets (``engine.activation_checkpointing``)."""

from __future__ import annotations

from torch import nn


def checkpointed_parts(unet: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, name) of the blocks that activation checkpointing recomputes: residual blocks and transformers, in order."""
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    return [
        (parent, name)
        for parent in unet.modules()
        for name, child in parent.named_children()
        if isinstance(child, (ResnetBlock2D, Transformer2DModel))
    ]


def checkpoint_unet(unet: nn.Module, every: int) -> nn.Module:
    """Let every ``every``-th block (see :func:`checkpointed_parts`) be recomputed in the backward pass; returns ``unet``."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for parent, name in checkpointed_parts(unet)[::every]:
        parent.register_module(name, checkpoint_wrapper(parent.get_submodule(name), preserve_rng_state=False))
    return unet
