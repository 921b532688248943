"""What a UNet holds while it runs, counted on diffusers' own network at its real size, without weights or data.

A UNet's blocks differ in resolution and width, so no number per token would describe them; instead the network runs on tensors
without storage (torch's FakeTensorMode), and every tensor that comes into being and goes is counted.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastvideo_grpo.config.keys import LoRAConfig
from fastvideo_grpo.engines.activation_checkpointing import checkpoint_blocks, find_blocks
from fastvideo_grpo.engines.lora import add_lora
from fastvideo_grpo.models.family import PassBytes


class LiveBytes(TorchDispatchMode):
    """Within, the storages that operations make: ``now``, and the ``peak`` of it; those of ``weights`` do not count."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {weight.untyped_storage()._cdata for weight in weights}  # views of them are made, too

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def unet_bytes(
    config: dict[str, Any],
    shape: tuple[int, ...],
    text_tokens: int,
    dtype: torch.dtype,
    checkpoint_every: int,
    *,
    blocks: tuple[str, ...],
    not_recomputed: tuple[str, ...],
    lora: LoRAConfig | None = None,
) -> PassBytes:
    """Count a pass of diffusers' ``UNet2DConditionModel``.

    Args:
        config: ``unet/config.json``.
        shape: of the latents, ``(B, C, H, W)``.
        dtype: of weights and activations.
        checkpoint_every: every such block is checkpointed; 0: none.
        blocks, not_recomputed: see :func:`~fastvideo_grpo.engines.activation_checkpointing.find_blocks`.
        lora: adapters that are trained, with their targets named; None: all weights are.
    """
    adapters = None if lora is None else json.dumps(vars(lora))
    return _unet_bytes(json.dumps(config), shape, text_tokens, dtype, checkpoint_every, blocks, not_recomputed, adapters)


@cache
def _unet_bytes(
    config: str,
    shape: tuple[int, ...],
    tokens: int,
    dtype: torch.dtype,
    every: int,
    blocks: tuple[str, ...],
    not_recomputed: tuple[str, ...],
    lora: str | None,
) -> PassBytes:
    from diffusers import UNet2DConditionModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    facts = json.loads(config)
    before = torch.get_default_dtype()
    # On the "cpu", whose attention keeps what GPUs' kernels keep, too: no matrix of all tokens with all.
    with FakeTensorMode(), torch.device("cpu"):
        torch.set_default_dtype(dtype)
        try:
            unet: nn.Module = UNet2DConditionModel.from_config(facts)
        finally:
            torch.set_default_dtype(before)
        found = find_blocks(unet, blocks, not_recomputed)
        each = [unet.get_submodule(name) for names in found.values() for name in names]
        largest = max(sum(p.numel() for p in block.parameters()) for block in each)
        if lora is not None:
            add_lora(unet, LoRAConfig(**json.loads(lora)), seed=0)
        if every:
            checkpoint_blocks(unet, found, every)
        sample = torch.randn(shape, dtype=dtype)
        inputs = torch.full((shape[0],), 981.0), torch.randn(shape[0], tokens, facts["cross_attention_dim"], dtype=dtype)
        with torch.no_grad(), LiveBytes(unet.parameters()) as forward:
            unet(sample, *inputs)
        # Of the input alone: the weights' gradients are counted elsewhere. Nothing before the first adapter needs one.
        leaves = [sample.requires_grad_(True)] if lora is None else [p for p in unet.parameters() if p.requires_grad]
        with LiveBytes(unet.parameters()) as backward:
            output = unet(sample, *inputs).sample
            kept = backward.now
            torch.autograd.grad(output.float().square().mean(), leaves)
    return PassBytes(forward.peak, kept, max(0, backward.peak - kept), largest)
