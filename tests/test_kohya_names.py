"""Adapters under kohya's names are, read back by diffusers, the adapters that were written."""

import pytest
import torch

from fastvideo_grpo.checkpoints.export import fold_scale, write_kohya_lora
from fastvideo_grpo.checkpoints.kohya_names import kohya_lora
from fastvideo_grpo.config.keys import LoRAConfig
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models.diffusers_names import DiffusersNames
from fastvideo_grpo.models.registry import FAMILIES

WIDTH = 3072  # FLUX.1's: diffusers' reader has its sizes
FLUX = {
    **{f"transformer_blocks.1.attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
    **{f"transformer_blocks.1.attn.add_{name}_proj": (WIDTH, WIDTH) for name in "qkv"},
    "transformer_blocks.1.ff.net.0.proj": (4 * WIDTH, WIDTH),
    "transformer_blocks.1.norm1_context.linear": (6 * WIDTH, WIDTH),
    **{f"single_transformer_blocks.37.attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.37.proj_out": (WIDTH, 5 * WIDTH),
}
UNET = {
    **{f"down_blocks.0.attentions.1.transformer_blocks.0.attn{n}.{p}": (8, 6) for n in "12" for p in ("to_q", "to_k", "to_v")},
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (8, 6),
    "up_blocks.2.attentions.0.transformer_blocks.0.ff.net.2": (8, 6),
}


def random_adapters(shapes, lora):
    draw = torch.Generator().manual_seed(0)
    adapters = {}
    for layer, (rows, columns) in shapes.items():
        adapters[f"{layer}.lora_A"] = torch.randn(lora.rank, columns, generator=draw)
        adapters[f"{layer}.lora_B"] = torch.randn(rows, lora.rank, generator=draw)
    return adapters


@pytest.mark.parametrize("rank", [3, 4])  # of 4 diffusers takes linear1, whose four parts share 12 ranks, for another layout
@pytest.mark.parametrize(
    "pipeline, kind, component, shapes",
    [
        ("FluxPipeline", "flux", "transformer", FLUX),
        ("StableDiffusionPipeline", "stable_diffusion", "unet", UNET),
    ],
)
def test_diffusers_reads_the_adapters_back(pipeline, kind, component, shapes, rank):
    import diffusers

    lora = LoRAConfig(rank=rank, alpha=10.0)
    adapters = random_adapters(shapes, lora)
    weights = {f"{layer}.weight": shape for layer, shape in shapes.items()}
    weights["single_transformer_blocks.37.proj_mlp.weight"] = (4 * WIDTH, WIDTH)
    written = kohya_lora(fold_scale(adapters, lora), weights, FAMILIES[kind].kohya_layer)
    # All ranks are alphas, so that nothing is scaled.
    assert all(t == len(written[name.replace("alpha", "lora_down.weight")]) for name, t in written.items() if "alpha" in name)
    read = getattr(diffusers, pipeline).lora_state_dict(dict(written))
    read, alphas = read if isinstance(read, tuple) else (read, {})
    assert set((alphas or {}).values()) <= {float(rank)}
    for layer, (_, columns) in shapes.items():
        x = torch.randn(columns, generator=torch.Generator().manual_seed(1))
        found = {name.rpartition(".lora")[2]: t for name, t in read.items() if _layer(name) == f"{component}.{layer}"}
        down, up = sorted(found.items(), key=lambda item: "up" in item[0] or "B" in item[0])
        expected = lora.alpha / lora.rank * (adapters[f"{layer}.lora_B"] @ (adapters[f"{layer}.lora_A"] @ x))
        torch.testing.assert_close(up[1] @ (down[1] @ x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def _layer(name):
    """diffusers' layer of a key of its own, or of its older names for attention in a UNet."""
    layer = name.partition(".lora")[0].replace(".processor", "")
    for old in ("to_q", "to_k", "to_v", "to_out"):
        if f"{old}_lora" in layer:
            return layer.partition("_lora")[0] + (".0" if old == "to_out" else "")
    return layer


@pytest.mark.parametrize("layer", ["norm_out.linear", "transformer_blocks.0.attn.norm_q"])
def test_a_layer_without_a_name_is_refused(layer):
    adapters = random_adapters({layer: (4, 4)}, LoRAConfig(rank=2, alpha=2.0))
    with pytest.raises(UserError, match=f"{layer} has no name there"):
        kohya_lora(adapters, {f"{layer}.weight": (4, 4)}, FAMILIES["flux"].kohya_layer)


def test_a_model_that_the_format_does_not_know_is_refused(tmp_path):
    lora = LoRAConfig(rank=2, alpha=2.0)
    adapters = random_adapters({"blocks.0.attn1.to_q": (4, 4)}, lora)
    names = DiffusersNames({"blocks.0.attn1.to_q.weight": (4, 4)}, lambda name: (name, None, None))
    with pytest.raises(UserError, match=r"is for FLUX\.1-dev and Stable Diffusion v1\.4; Wan 2\.1 T2V 1\.3B has no names"):
        write_kohya_lora(adapters, lora, names, FAMILIES["wan"], tmp_path, torch.float32)
