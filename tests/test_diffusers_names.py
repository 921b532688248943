"""A transformer's weights under FastVideo's names and under diffusers': nothing is lost on the way, in either direction."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvideo_grpo.checkpoints import export
from fastvideo_grpo.config.keys import LoRAConfig
from fastvideo_grpo.engines.sharded_loading import CheckpointReader, FusedWeights, WeightFilesError
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models import diffusers_names
from fastvideo_grpo.models.diffusers_names import DiffusersNames, denoiser_names, tensor_shapes
from fastvideo_grpo.models.registry import FAMILIES

# Two fused layers, one of unequal parts, whose parts stand in another order in the files.
SHAPES = {
    "blocks.0.mlp.weight": (8, 4),
    "blocks.0.k.weight": (4, 4),
    "blocks.0.q.weight": (4, 4),
    "blocks.0.q.bias": (4,),
    "blocks.0.k.bias": (4,),
    "blocks.0.mlp.bias": (8,),
    "out.weight": (3, 4),
}
PARTS = ("q", "k", "mlp")


def _mapping(name):
    layer, _, kind = name.rpartition(".")
    if layer == "out":
        return f"final.{kind}", None, None
    block, _, part = layer.rpartition(".")
    return f"{block}.linear1.{kind}", PARTS.index(part), len(PARTS)


@pytest.fixture
def names():
    return DiffusersNames(SHAPES, _mapping)


def _random(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_parameters_are_stacked_in_the_mappings_order_and_split_by_their_own_sizes(names):
    assert names.sources("blocks.0.linear1.weight") == [f"blocks.0.{part}.weight" for part in PARTS]
    assert names.rows("blocks.0.linear1.weight") == [4, 4, 8]
    assert names.shapes == {"blocks.0.linear1.weight": (16, 4), "blocks.0.linear1.bias": (16,), "final.weight": (3, 4)}
    theirs = _random(SHAPES)
    ours = names.to_fastvideo(theirs)
    assert tensor_shapes(ours) == names.shapes
    assert torch.equal(ours["blocks.0.linear1.bias"], torch.cat([theirs[f"blocks.0.{part}.bias"] for part in PARTS]))
    assert _equal(names.to_diffusers(ours), theirs)
    assert names.to_diffusers(ours)["out.weight"] is theirs["out.weight"]


def test_sharded_loading_takes_the_parts(names, tmp_path):
    theirs = _random(SHAPES)
    save_file(theirs, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    weights = FusedWeights(reader, DiffusersNames(reader.shapes, _mapping).parts)
    assert weights.shapes == names.shapes
    for name, expected in names.to_fastvideo(theirs).items():
        out = torch.empty(weights.shapes[name])
        weights.read_into(name, out)
        assert torch.equal(out, expected)


def test_flux_has_diffusers_names_and_does_not_ask_fastvideo(monkeypatch):
    monkeypatch.setattr(diffusers_names, "fastvideo_mapping", lambda name: pytest.fail(f"asked for {name}"))
    names = denoiser_names(FAMILIES["flux"], "FluxTransformer2DModel", SHAPES)
    theirs = _random(SHAPES)
    assert names.parts == {name: [name] for name in SHAPES}
    assert _equal(names.to_fastvideo(theirs), theirs) and _equal(names.to_diffusers(theirs), theirs)


def test_weights_of_another_model_are_named(names):
    ours, theirs = _random(names.shapes), _random(SHAPES)
    for weights, change, message in [
        (ours, {"final.weight": None}, "1 names or shapes differ, first final.weight: it is missing"),
        (ours, {"final.bias": torch.ones(3)}, "first final.bias: it is not in the model"),
        (ours, {"final.weight": torch.ones(4, 3)}, r"has shape \(4, 3\) instead of \(3, 4\)"),
        (theirs, {"out.weight": None}, "first out.weight: it is missing"),
    ]:
        wrong = {name: weight for name, weight in {**weights, **change}.items() if weight is not None}
        with pytest.raises(UserError, match=message):
            (names.to_diffusers if weights is ours else names.to_fastvideo)(wrong)
    with pytest.raises(UserError, match=r"no parameter blocks.1.linear1.weight; it has, for example, "):
        names.sources("blocks.1.linear1.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.k.bias": None}, "blocks.0.linear1.bias is made of 3 tensors"),
        ({"blocks.0.k.bias": (4, 1)}, "blocks.0.linear1.bias cannot be stacked"),
    ],
)
def test_parts_that_do_not_make_a_whole_are_refused(change, message):
    shapes = {name: shape for name, shape in {**SHAPES, **change}.items() if shape is not None}
    with pytest.raises(WeightFilesError, match=message):
        DiffusersNames(shapes, _mapping)


def test_adapters_of_fused_layers_are_split_and_merge_to_the_same_weights(names, tmp_path):
    lora = LoRAConfig(rank=2, alpha=6.0)
    sizes = {"blocks.0.linear1.lora_A": (2, 4), "blocks.0.linear1.lora_B": (16, 2)}
    sizes |= {"final.lora_A": (2, 4), "final.lora_B": (3, 2)}
    adapters = _random(sizes, seed=1)
    split = names.lora_to_diffusers(adapters)
    assert tensor_shapes(split) == {
        **{f"blocks.0.{part}.lora_A": (2, 4) for part in PARTS},
        **{f"blocks.0.{part}.lora_B": (8 if part == "mlp" else 4, 2) for part in PARTS},
        "out.lora_A": (2, 4),
        "out.lora_B": (3, 2),
    }
    theirs = _random(SHAPES)
    save_file(theirs, tmp_path / "model.safetensors")
    merged = export.MergedLoRA(CheckpointReader(tmp_path), split, lora)
    assert len(merged) == len(SHAPES)
    expected = names.to_fastvideo(theirs)
    for layer in ("blocks.0.linear1", "final"):
        expected[f"{layer}.weight"] = (
            expected[f"{layer}.weight"] + 3.0 * adapters[f"{layer}.lora_B"] @ adapters[f"{layer}.lora_A"]
        )
    torch.testing.assert_close(names.to_fastvideo(merged), expected, rtol=0, atol=1e-6)
    assert torch.equal(merged["blocks.0.q.bias"], theirs["blocks.0.q.bias"])  # without an adapter: as it is

    for name, change, message in [
        ("final.lora_B", {}, "pairs of LAYER.lora_A and LAYER.lora_B: see final.lora_B"),
        ("final.lora_B", {"final.lora_B": torch.ones(4, 2)}, r"lora_B \(4, 2\), but final.weight is \(3, 4\)"),
        ("final.lora_A", {"final.lora_A": torch.ones(3, 4)}, r"lora_A \(3, 4\) and lora_B \(3, 2\)"),
        ("", {"blocks.7.lora_A": torch.ones(2, 4), "blocks.7.lora_B": torch.ones(4, 2)}, "no parameter blocks.7.weight"),
    ]:
        with pytest.raises(UserError, match=message):
            names.lora_to_diffusers({key: value for key, value in adapters.items() if key != name} | change)
    del theirs["out.weight"]
    save_file(theirs, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has no out.weight, which has an adapter"):
        export.MergedLoRA(CheckpointReader(tmp_path), split, lora)


def test_a_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(ZeroDivisionError), export.appearing(out) as folder:
        (folder / "file").write_text("half")
        raise ZeroDivisionError
    assert not out.exists() and not list(out.parent.iterdir())
    with pytest.raises(UserError, match="No space left on device"), export.appearing(out):
        raise OSError(28, "No space left on device")
    with export.appearing(out) as folder:
        (folder / "file").write_text("whole")
        assert not out.exists()
    assert [entry.name for entry in out.parent.iterdir()] == ["out"] and (out / "file").read_text() == "whole"
    with pytest.raises(UserError, match="is not empty"), export.appearing(out):
        pytest.fail("it has something in it")
    (out / "file").unlink()
    with export.appearing(out) as folder:  # an empty folder that is there already may be used
        (folder / "file").write_text("whole")
    assert (out / "file").read_text() == "whole"


@pytest.fixture
def checkpoint(tmp_path):
    """Two components beside the transformer; one's weights are a symbolic link, as in the hub's cache."""
    folder = tmp_path / "checkpoint"
    for component in ("transformer", "vae", "text_encoder", "text_encoder/nested", ".cache"):
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(component)
    (tmp_path / "blob").write_bytes(b"weights")
    (folder / "vae" / "model.safetensors").symlink_to(tmp_path / "blob")
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"more weights")
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text("not needed")
    return folder


@pytest.mark.parametrize("link", [False, True])
def test_components_are_copied_or_their_weight_files_hard_linked(checkpoint, tmp_path, link):
    out = tmp_path / "out"
    out.mkdir()
    export.copy_components(checkpoint, out, "transformer", link=link)
    assert sorted(entry.name for entry in out.iterdir()) == ["model_index.json", "text_encoder", "vae"]
    for name in ("vae/model.safetensors", "text_encoder/model.safetensors"):
        assert os.path.samefile(out / name, checkpoint / name) == link
        assert not (out / name).is_symlink() and (out / name).read_bytes() == (checkpoint / name).read_bytes()
    for name in ("vae/config.json", "text_encoder/nested/config.json", "model_index.json"):
        assert not os.path.samefile(out / name, checkpoint / name)
        assert (out / name).read_text() == (checkpoint / name).read_text()


def test_a_link_that_cannot_be_made_is_an_error_and_no_copy(checkpoint, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "out"
    with (
        pytest.raises(UserError, match=r"hard-linked into .* \(Invalid cross-device link\); put --out on"),
        export.appearing(out) as folder,
    ):
        export.copy_components(checkpoint, folder, "transformer", link=True)
    assert not out.exists()


def test_files_are_cut_at_the_given_size_and_hold_every_tensor_once(tmp_path):
    from diffusers import FluxTransformer2DModel

    config = {"_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8}
    config |= {"num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16, "in_channels": 4}
    config |= {"axes_dims_rope": [2, 2, 4]}
    shapes = tensor_shapes(export.diffusers_denoiser(config).state_dict())
    weights = _random(shapes)
    export.write_denoiser(weights, config, tmp_path / "small", torch.bfloat16, "6KB")
    files = sorted((tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 20_000 for file in files)
    found = [load_file(file) for file in files]
    assert sum(map(len, found)) == len(shapes)
    assert all(tensor.dtype == torch.bfloat16 for tensors in found for tensor in tensors.values())
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "small", torch_dtype=torch.bfloat16).state_dict()
    assert _equal(dict(sorted(loaded.items())), {name: weights[name].bfloat16() for name in sorted(weights)})
    export.write_denoiser(weights, config, tmp_path / "one", torch.float32)
    assert [file.name for file in (tmp_path / "one").iterdir() if file.suffix != ".json"] == [
        "diffusion_pytorch_model.safetensors"
    ]

    name = next(iter(weights))
    for wrong, size, message in [
        (weights, "much", "--max-shard-size much is no size"),
        ({**weights, name: torch.ones(1)}, "10GB", f"first {name}: it has shape"),
        ({key: weight for key, weight in weights.items() if key != name}, "10GB", f"first {name}: it is missing"),
    ]:
        with pytest.raises(UserError, match=message):
            export.write_denoiser(wrong, config, tmp_path / "wrong", torch.float32, size)


def test_hunyuan_videos_names_are_those_of_fastvideos_loader():
    from fastvideo_grpo.models.hunyuan_video.tiny import configs
    from fastvideo_grpo.models.networks import diffusers_denoiser

    config = configs("random")["transformer"] | {"num_attention_heads": 3, "attention_head_dim": 8, "rope_axes_dim": [2, 2, 4]}
    shapes = tensor_shapes(diffusers_denoiser(config).state_dict())
    names = denoiser_names(FAMILIES["hunyuan_video"], "HunyuanVideoTransformer3DModel", shapes)
    taken = [source for sources in names.parts.values() for source in sources]
    assert sorted(taken) == sorted(shapes) and len(taken) > len(names.parts)
    assert names.rows("single_blocks.1.linear1.weight") == [24, 24, 24, 96]
    assert names.shapes["txt_in.refiner_blocks.0.self_attn_qkv.bias"] == (72,)

    from fastvideo.models.dits.hunyuanvideo import HunyuanVideoTransformer3DModel
    from fastvideo.models.loader.utils import get_param_names_mapping, hf_to_custom_state_dict

    theirs = _random(shapes)
    mapping = get_param_names_mapping(HunyuanVideoTransformer3DModel.param_names_mapping)
    loaded, _ = hf_to_custom_state_dict(theirs, mapping)
    ours = names.to_fastvideo(theirs)
    assert ours.keys() == loaded.keys() and all(torch.equal(ours[name], loaded[name]) for name in ours)
    assert _equal(names.to_diffusers(loaded), theirs)
