"""LoRA adapters under the names of kohya-ss' sd-scripts, which ComfyUI and other programs read.

``lora_unet_LAYER.lora_down.weight`` is A, ``.lora_up.weight`` B, ``.alpha`` the rank: the adapters come with their scale folded
into B. Layers of Stable Diffusion are diffusers' with underscores. Those of FLUX are the original model's, which fuses
projections that diffusers has apart: adapters of their own become one of the ranks' sum, whose B is block-diagonal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastvideo_grpo.errors import UserError

# diffusers layers of a block, in the order in which the original layer stacks them -> the original layer.
_FLUX_BLOCKS = {
    "transformer_blocks": (
        "double_blocks",
        {
            ("attn.to_q", "attn.to_k", "attn.to_v"): "img_attn_qkv",
            ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "txt_attn_qkv",
            ("attn.to_out.0",): "img_attn_proj",
            ("attn.to_add_out",): "txt_attn_proj",
            ("ff.net.0.proj",): "img_mlp_0",
            ("ff.net.2",): "img_mlp_2",
            ("ff_context.net.0.proj",): "txt_mlp_0",
            ("ff_context.net.2",): "txt_mlp_2",
            ("norm1.linear",): "img_mod_lin",
            ("norm1_context.linear",): "txt_mod_lin",
        },
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {
            ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"): "linear1",
            ("proj_out",): "linear2",
            ("norm.linear",): "modulation_lin",
        },
    ),
}


def kohya_lora(adapters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], class_name: str) -> dict[str, Tensor]:
    """Adapters under kohya's names.

    Args:
        adapters: LAYER.lora_A ``[rank, in]`` and LAYER.lora_B ``[out, rank]`` under diffusers' names, scale folded in.
        shapes: of diffusers' weights, LAYER.weight -> ``(out, in)``.
        class_name: the network's diffusers class.

    Raises:
        UserError: there are no such names for this network, or for a layer.
    """
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in adapters))
    if class_name == "UNet2DConditionModel":
        fused = {layer.replace(".", "_"): [layer] for layer in layers}
    elif class_name == "FluxTransformer2DModel":
        fused = {}
        for layer in layers:
            name, parts = _flux_layer(layer)
            fused[name] = parts
    else:
        raise UserError(
            f"--lora-format kohya is for FLUX and Stable Diffusion; {class_name} has no names there: leave the option out, "
            "ComfyUI reads diffusers' format, too"
        )
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


def _flux_layer(layer: str) -> tuple[str, list[str]]:
    """The original layer that holds a diffusers layer, and all diffusers layers that it stacks."""
    found = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer)
    if found and found[1] in _FLUX_BLOCKS:
        blocks, names = _FLUX_BLOCKS[found[1]]
        for parts, name in names.items():
            if found[3] in parts:
                return f"{blocks}_{found[2]}_{name}", [f"{found[1]}.{found[2]}.{part}" for part in parts]
    raise UserError(f"--lora-format kohya: {layer} has no name there; leave the option out, or train other model.lora.targets")
