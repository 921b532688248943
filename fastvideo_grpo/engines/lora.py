"""Low-rank adapters (LoRA, Hu et al. 2021): ``y = W x + (alpha / rank) B A x`` with W frozen.

A small layer of our own: peft refuses FastVideo's ``ReplicatedLinear``, and FastVideo's LoRA layer wants CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fastvideo_grpo.config.keys import LoRAConfig
from fastvideo_grpo.engines.base import whole_shape
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.sampling.noise import generator


class LoRALinear(nn.Module):
    """A linear layer with an adapter; like the layer it wraps, it returns a tensor or FastVideo's ``(tensor, bias)``.

    ``lora_A`` ``[rank, in]`` is drawn as peft does (uniform, +- 1/sqrt(in)), ``lora_B`` ``[out, rank]`` starts at zero: the
    adapted layer equals the original one.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, draws: np.random.Generator) -> None:
        super().__init__()
        weight = base.weight
        assert isinstance(weight, Tensor)
        out_features, in_features = whole_shape(weight)
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.enabled = True
        bound = in_features**-0.5
        initial = (2 * torch.from_numpy(draws.random((rank, in_features), dtype=np.float32)) - 1) * bound
        self.lora_A = nn.Parameter(initial.to(weight))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank).to(weight))

    @property
    def weight(self) -> Tensor:
        """The base layer's: some of FastVideo's modules look at the dtype of a layer before they call it."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        out = self.base(x)
        if not self.enabled:
            return out
        change = nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B) * self.scale
        if isinstance(out, tuple):
            return out[0] + change, *out[1:]
        return out + change


def add_lora(module: nn.Module, config: LoRAConfig, seed: int) -> list[str]:
    """Freeze ``module`` and wrap every linear layer whose name ends in one of ``config.targets``; returns their names.

    Raises:
        ConfigError: no target, or one that matches nothing.
    """
    if not config.targets:
        raise ConfigError("model.lora.targets names no layer; leave the key out for the model's attention projections")
    targets = config.targets
    module.requires_grad_(False)
    found: dict[str, list[str]] = {target: [] for target in targets}
    for name, layer in list(module.named_modules()):
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or len(whole_shape(weight)) != 2:
            continue
        target = next((t for t in targets if name == t or name.endswith("." + t)), None)
        if target is None:
            continue
        found[target].append(name)
        parent = module.get_submodule(name.rpartition(".")[0])
        child = name.rpartition(".")[2]
        parent.register_module(child, LoRALinear(layer, config.rank, config.alpha, generator("lora", seed, name)))
    empty = [target for target, names in found.items() if not names]
    if empty:
        linear = sorted({n.split(".", 2)[-1] for n, m in module.named_modules() if getattr(m, "weight", None) is not None})
        raise ConfigError(
            f"model.lora.targets: no linear layer ends in {', '.join(empty)}; the model has, for example, "
            f"{', '.join(linear[:12])}"
        )
    return sorted(name for names in found.values() for name in names)


@contextmanager
def lora_disabled(module: nn.Module) -> Iterator[None]:
    """Within, every adapter of ``module`` is switched off: the reference policy."""
    layers = [layer for layer in module.modules() if isinstance(layer, LoRALinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True
