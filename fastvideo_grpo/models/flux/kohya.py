"""FLUX's layers in kohya's adapters, which are the original model's: it fuses projections that diffusers has apart."""

from __future__ import annotations

import re

# diffusers layers of a block, in the order in which the original layer stacks them -> the original layer.
_BLOCKS = {
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


def kohya_layer(layer: str) -> tuple[str, list[str]]:
    """The original layer that holds a diffusers layer, and all diffusers layers that it stacks.

    Raises:
        ValueError: none holds it.
    """
    found = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer)
    if found and found[1] in _BLOCKS:
        blocks, names = _BLOCKS[found[1]]
        for parts, name in names.items():
            if found[3] in parts:
                return f"{blocks}_{found[2]}_{name}", [f"{found[1]}.{found[2]}.{part}" for part in parts]
    raise ValueError(f"{layer} has no name there")
