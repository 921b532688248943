"""Tiny Wan 2.1 checkpoints: published files and names, loaded by diffusers, the same from the same seed."""

import argparse

import pytest
import torch

from fastvideo_grpo.commands import tiny as command
from fastvideo_grpo.models.wan import tiny as wan
from fastvideo_grpo.models.wan.family import PUBLISHED
from fastvideo_grpo.tiny.tokenizer_files import VIDEO_WORDS
from tests import tiny_checkpoints
from tests.tiny_checkpoints import (
    check_every_weight_is_loaded,
    check_files,
    check_index,
    check_the_prompt_shows_in_a_clip,
    contents_of,
    keys_of,
    one_thread,  # noqa: F401  (a fixture)
    read,
)

# What the repository of Wan2.1-T2V-1.3B-Diffusers holds, with the number of shards that stands in its names left open.
PUBLISHED_FILES = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model-*.safetensors",
    "text_encoder/model.safetensors.index.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/spiece.model",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-*.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return wan.write_wan(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.fixture(scope="module")
def pipeline(folder):
    from diffusers import WanPipeline

    return tiny_checkpoints.load(WanPipeline, folder)


def test_the_files_are_those_of_the_published_checkpoint(folder):
    check_files(folder, PUBLISHED_FILES)
    check_index(folder / "transformer", "diffusion_pytorch_model")
    check_index(folder / "text_encoder", "model")


def test_keys_are_the_published_ones(folder):
    umt5 = keys_of(folder / "text_encoder")
    assert "shared.weight" in umt5 and "encoder.embed_tokens.weight" not in umt5
    # Of T5 only the first block has it.
    assert "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in umt5
    assert {
        "patch_embedding.weight",
        "condition_embedder.text_embedder.linear_1.weight",
        "condition_embedder.time_proj.weight",
        "blocks.1.attn1.norm_q.weight",
        "blocks.1.attn2.to_out.0.weight",
        "blocks.1.ffn.net.0.proj.weight",
        "blocks.1.norm2.weight",
        "blocks.1.scale_shift_table",
        "proj_out.weight",
        "scale_shift_table",
    } <= set(keys_of(folder / "transformer"))
    assert {"decoder.mid_block.attentions.0.to_qkv.weight", "decoder.up_blocks.0.upsamplers.0.time_conv.weight"} <= set(
        keys_of(folder / "vae")
    )


def test_configurations_have_the_published_keys(folder):
    for component, published in PUBLISHED.items():
        found = read(folder / component / "config.json")
        assert set(published) <= set(found)
        if component != "text_encoder":
            assert found["_class_name"] == published["_class_name"]
    vae, transformer = (read(folder / name / "config.json") for name in ("vae", "transformer"))
    assert vae["dim_mult"] == PUBLISHED["vae"]["dim_mult"], "FastVideo reckons with x8, whatever the file says"
    assert len(vae["latents_mean"]) == len(vae["latents_std"]) == vae["z_dim"] == transformer["in_channels"]
    scheduler = read(folder / "scheduler" / "scheduler_config.json")
    assert (scheduler["_class_name"], scheduler["flow_shift"]) == ("UniPCMultistepScheduler", 3.0)
    index = read(folder / "model_index.json")
    assert index["_class_name"] == "WanPipeline" and index["text_encoder"] == ["transformers", "UMT5EncoderModel"]
    assert all((folder / name).is_dir() for name in index if not name.startswith("_"))


def test_the_tokenizer_knows_the_words_of_videos_and_encodes_any_text(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a red circle moving left").input_ids) == [
        *("▁a", "▁red", "▁circle", "▁moving", "▁left"),
        "</s>",
    ]
    assert all(len(tokenizer(word).input_ids) == 2 for word in VIDEO_WORDS)
    assert tokenizer("a", padding="max_length", max_length=4).attention_mask == [1, 1, 0, 0]
    assert len(tokenizer) <= read(folder / "text_encoder" / "config.json")["vocab_size"]


def test_special_tokens_are_in_the_order_of_umt5(folder):
    """T5's <unk> is 2, where UMT5 has a <s>; which of them it is, every file says alike."""
    from sentencepiece import SentencePieceProcessor

    tokens = ["<pad>", "</s>", "<s>", "<unk>"]
    written = read(folder / "tokenizer" / "tokenizer.json")
    assert [piece for piece, _ in written["model"]["vocab"][:4]] == tokens and written["model"]["unk_id"] == 3
    named = read(folder / "tokenizer" / "tokenizer_config.json")
    assert [named["added_tokens_decoder"][str(n)]["content"] for n in range(4)] == tokens and named["bos_token"] == "<s>"
    pieces = SentencePieceProcessor(str(folder / "tokenizer" / "spiece.model"))
    assert [pieces.pad_id(), pieces.eos_id(), pieces.bos_id(), pieces.unk_id()] == [0, 1, 2, 3]


def test_diffusers_makes_a_clip_with_the_scheduler_of_the_checkpoint(folder, pipeline):
    check_every_weight_is_loaded(pipeline, folder)
    check_the_prompt_shows_in_a_clip(pipeline, max_sequence_length=16)


def test_random_weights_give_outputs_of_ordinary_size(pipeline):
    with torch.no_grad():
        text, _ = pipeline.encode_prompt("a red circle", max_sequence_length=16, do_classifier_free_guidance=False)
        latents = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        outputs = [
            pipeline.transformer(latents, torch.tensor([timestep]), text, return_dict=False)[0] for timestep in (500.0, 600.0)
        ]
    assert 0.3 < text[:, :4].std() < 5 and not text[:, 6:].any()
    assert 0.3 < outputs[0].std() < 5
    assert (outputs[0] - outputs[1]).std() > 0.02, "the timestep matters"


def test_the_same_seed_writes_the_same_bytes_and_only_such_a_checkpoint_is_overwritten(folder, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "out"
    assert command.run(parser.parse_args(["wan", "--out", str(out)])) == 0
    assert str(out) in capsys.readouterr().out
    assert contents_of(out) == contents_of(folder)
    assert contents_of(wan.write_wan(out, seed=1, overwrite=True)) != contents_of(folder)
    other = tmp_path / "flux"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(FileExistsError, match=r"something else than a Wan 2\.1 checkpoint"):
        wan.write_wan(other, overwrite=True)
