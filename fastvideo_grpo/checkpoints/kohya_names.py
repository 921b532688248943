"""LoRA adapters under the names of kohya-ss' sd-scripts, which ComfyUI and other programs read.

``lora_unet_LAYER.lora_down.weight`` is A, ``.lora_up.weight`` B, ``.alpha`` the rank: the adapters come with their scale folded
into B. Which layer of that format holds one of diffusers' is the family's ``kohya_layer``. Where it fuses several, adapters of
their own become one of the ranks' sum, whose B is block-diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastvideo_grpo.errors import UserError


def kohya_lora(
    adapters: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    kohya_layer: Callable[[str], tuple[str, list[str]]],
) -> dict[str, Tensor]:
    """Adapters under kohya's names.

    Args:
        adapters: LAYER.lora_A ``[rank, in]`` and LAYER.lora_B ``[out, rank]`` under diffusers' names, scale folded in.
        shapes: of diffusers' weights, LAYER.weight -> ``(out, in)``.
        kohya_layer: the model's, see :class:`~fastvideo_grpo.models.family.Family`.

    Raises:
        UserError: a layer has no name there.
    """
    fused: dict[str, list[str]] = {}
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in adapters):
        try:
            name, parts = kohya_layer(layer)
        except ValueError as error:
            raise UserError(f"--lora-format kohya: {error}; leave the option out, or train other model.lora.targets") from error
        fused[name] = parts
    out: dict[str, Tensor] = {}
    for name, parts in fused.items():
        there = [part for part in parts if f"{part}.lora_A" in adapters]
        down = torch.cat([adapters[f"{part}.lora_A"] for part in there])
        up = down.new_zeros(sum(shapes[f"{part}.weight"][0] for part in parts), len(down))
        row = column = 0
        for part in parts:
            if part in there:
                block = adapters[f"{part}.lora_B"]
                up[row : row + block.shape[0], column : column + block.shape[1]] = block
                column += block.shape[1]
            row += shapes[f"{part}.weight"][0]
        prefix = f"lora_unet_{name}"
        out |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
        out[f"{prefix}.alpha"] = torch.tensor(float(len(down)))
    return out
