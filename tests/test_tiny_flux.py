"""Tiny FLUX checkpoints: published files and names, loaded by diffusers, the same from the same seed."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvideo_grpo.commands import tiny as command
from fastvideo_grpo.models.flux import tiny as flux
from fastvideo_grpo.rewards.base import RewardRequest
from fastvideo_grpo.rewards.registry import create
from fastvideo_grpo.rewards.rules.colour_match import PALETTE
from fastvideo_grpo.tiny import shapes
from fastvideo_grpo.tiny.tokenizer_files import WORDS, clip_vocabulary, t5_pieces
from tests import tiny_checkpoints
from tests.tiny_checkpoints import (
    check_every_weight_is_loaded,
    check_files,
    check_index,
    check_same_form,
    contents_of,
    keys_of,
    one_thread,  # noqa: F401  (a fixture)
    read,
)

REPOSITORY = Path(__file__).parents[1]
COMMITTED = REPOSITORY / "data" / "tiny-flux-shapes"

# What the repository of FLUX.1-dev holds, with the number of shards that stands in its names left open.
PUBLISHED_FILES = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model-*.safetensors",
    "text_encoder_2/model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/spiece.model",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-*.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    return flux.write_flux(tmp_path_factory.mktemp("tiny") / "flux")


@pytest.fixture(scope="module", params=["random", "committed"])
def folder(request, random_folder):
    return random_folder if request.param == "random" else COMMITTED


def load(folder):
    from diffusers import FluxPipeline

    return tiny_checkpoints.load(FluxPipeline, folder)


# --- the form


def test_the_files_are_those_of_the_published_checkpoint(folder):
    check_files(folder, PUBLISHED_FILES)


@pytest.mark.parametrize("component, stem", [("transformer", "diffusion_pytorch_model"), ("text_encoder_2", "model")])
def test_the_index_names_every_tensor_and_its_shard(folder, component, stem):
    check_index(folder / component, stem)


def test_text_encoder_keys_are_those_of_transformers_4(folder):
    clip = keys_of(folder / "text_encoder")
    assert all(key.startswith("text_model.") for key in clip)
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in clip
    assert "text_model.embeddings.token_embedding.weight" in clip
    assert not any("position_ids" in key for key in clip)
    t5 = keys_of(folder / "text_encoder_2")
    assert "shared.weight" in t5 and "encoder.embed_tokens.weight" not in t5
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in t5


def test_transformer_and_vae_keys_are_those_of_diffusers(folder):
    keys = keys_of(folder / "transformer")
    assert {"x_embedder.weight", "context_embedder.weight", "time_text_embed.guidance_embedder.linear_1.weight",
            "transformer_blocks.1.attn.add_q_proj.weight", "single_transformer_blocks.1.proj_mlp.weight",
            "norm_out.linear.weight", "proj_out.weight"} <= set(keys)
    assert "decoder.up_blocks.0.resnets.0.conv1.weight" in keys_of(folder / "vae")


def test_the_scheduler_is_that_of_flux_dev(folder):
    config = read(folder / "scheduler" / "scheduler_config.json")
    assert {key: value for key, value in config.items() if not key.startswith("_")} == {
        "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15,
        "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True}


def test_model_index_names_the_published_classes(folder):
    index = read(folder / "model_index.json")
    assert index["_class_name"] == "FluxPipeline"
    assert index["tokenizer_2"] == ["transformers", "T5TokenizerFast"]
    assert all((folder / name).is_dir() for name in index if not name.startswith("_"))


def test_tokenizers_encode_as_flux_pipelines_ask(folder):
    from transformers import AutoTokenizer

    clip, t5 = AutoTokenizer.from_pretrained(folder / "tokenizer"), AutoTokenizer.from_pretrained(folder / "tokenizer_2")
    assert (clip.model_max_length, t5.model_max_length) == (77, 512)
    words = ["a", "red", "circle"]
    assert clip.convert_ids_to_tokens(clip("A red  circle").input_ids) == [
        "<|startoftext|>", *(word + "</w>" for word in words), "<|endoftext|>"]
    assert t5.convert_ids_to_tokens(t5("a red circle").input_ids) == [*("▁" + word for word in words), "</s>"]
    padded = clip("a", padding="max_length", max_length=77).input_ids
    assert len(padded) == 77 and padded[-1] == clip.eos_token_id == len(clip) - 1, "the end token is the largest id"
    assert t5("a", padding="max_length", max_length=16).input_ids[2:] == [0] * 14
    assert t5.convert_tokens_to_ids("<extra_id_0>") == len(t5) - 1
    unknown = "Zebra, 7 olé!"
    assert clip.decode(clip(unknown).input_ids, skip_special_tokens=True).replace(" ", "") == "zebra,7olé!"


def test_spiece_model_and_tokenizer_json_agree(folder):
    import sentencepiece
    from tokenizers import Tokenizer

    slow = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer_2" / "spiece.model"))
    fast = Tokenizer.from_file(str(folder / "tokenizer_2" / "tokenizer.json"))
    for text in ("a red circle", "A photo of a Zebra, at night!", "x"):
        assert slow.encode(text) == fast.encode(text, add_special_tokens=False).ids


def test_every_word_is_one_token():
    vocabulary, merges = clip_vocabulary()
    assert len(set(merges)) == len(merges)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    pieces = dict(t5_pieces())
    assert all(word + "</w>" in vocabulary and "▁" + word in pieces for word in WORDS)


# --- it loads and runs


def test_diffusers_makes_a_picture(folder):
    pipeline = load(folder)
    size = 8 * pipeline.vae_scale_factor
    pictures = [
        pipeline(prompt, height=size, width=size, num_inference_steps=3, max_sequence_length=16, output_type="np",
                 generator=torch.Generator().manual_seed(0)).images for prompt in ("a red circle", "a blue square")
    ]
    assert pictures[0].shape == (1, size, size, 3)
    assert np.isfinite(pictures[0]).all() and pictures[0].std() > 0.05
    assert np.abs(pictures[0] - pictures[1]).mean() > 1e-3, "the prompt matters"


def test_every_weight_reaches_diffusers(folder):
    check_every_weight_is_loaded(load(folder), folder)


def test_random_weights_give_outputs_of_ordinary_size(random_folder):
    pipeline = load(random_folder)
    with torch.no_grad():
        text, pooled, text_ids = pipeline.encode_prompt("a red circle", None, max_sequence_length=16)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(1, 16, pipeline.transformer.config.in_channels, generator=generator)
        outputs = [pipeline.transformer(
            hidden_states=tokens, encoder_hidden_states=text, pooled_projections=pooled, timestep=torch.tensor([t]),
            guidance=torch.tensor([guidance]), img_ids=torch.zeros(16, 3), txt_ids=text_ids, return_dict=False)[0]
            for t, guidance in ((0.5, 3.5), (0.6, 3.5), (0.5, 1.0))]
    assert 0.3 < outputs[0].std() < 5
    assert all((outputs[0] - other).std() > 0.02 for other in outputs[1:]), "timestep and guidance matter"


# --- writing


def test_the_same_seed_writes_the_same_bytes(random_folder, tmp_path):
    again = flux.write_flux(tmp_path / "again")
    assert contents_of(again) == contents_of(random_folder)
    other = flux.write_flux(tmp_path / "other", seed=1)
    assert contents_of(other) != contents_of(random_folder)


def test_unknown_presets_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'huge'.*random, demo"):
        flux.write_flux(tmp_path / "flux", preset="huge")


def test_only_a_checkpoint_is_overwritten_and_only_when_told(tmp_path):
    folder = tmp_path / "flux"
    flux.write_flux(folder)
    with pytest.raises(FileExistsError, match="--overwrite"):
        flux.write_flux(folder)
    flux.write_flux(folder, overwrite=True)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="something else than a FLUX checkpoint"):
        flux.write_flux(notes, overwrite=True)
    assert (notes / "thesis.txt").exists()


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def test_the_command_writes_a_checkpoint_and_refuses_politely(tmp_path, capsys, random_folder):
    out = tmp_path / "out"
    assert run_command("flux", "--out", str(out)) == 0
    assert str(out) in capsys.readouterr().out
    assert contents_of(out) == contents_of(random_folder)
    assert run_command("flux", "--out", str(out)) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run_command("flux", "--out", str(out), "--seed", "3", "--overwrite") == 0


# --- the demo's checkpoint and its world


def test_pretraining_runs_and_writes_the_demo_preset(tmp_path):
    from fastvideo_grpo.models.flux.pretrain import pretrain_flux

    lines = []
    before = torch.get_rng_state()
    folder = pretrain_flux(tmp_path / "demo", pictures=16, autoencoder_steps=2, transformer_steps=2,
                           progress=lines.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert any("transformer" in line and "2/2" in line for line in lines)
    assert set(contents_of(folder)) == set(contents_of(COMMITTED))
    again = pretrain_flux(tmp_path / "again", pictures=16, autoencoder_steps=2, transformer_steps=2,
                          progress=lines.append)
    assert contents_of(again) == contents_of(folder)
    with pytest.raises(FileExistsError):
        pretrain_flux(folder)


def test_the_committed_checkpoint_is_small_and_what_the_code_writes(tmp_path):
    assert sum(path.stat().st_size for path in COMMITTED.rglob("*") if path.is_file()) < 2_000_000
    written = flux.write_flux(tmp_path / "demo", preset="demo")
    check_same_form(written, COMMITTED, measured=("scaling_factor", "shift_factor"))


def test_the_committed_checkpoint_draws_shapes_whose_colour_is_often_wrong():
    pipeline = load(COMMITTED)
    prompts = [prompt for prompt in shapes.PROMPTS for _ in range(4)]
    pictures = pipeline(prompts, height=32, width=32, num_inference_steps=6, max_sequence_length=16, output_type="np",
                        generator=torch.Generator().manual_seed(0)).images
    media = torch.from_numpy((pictures * 255).round().astype(np.uint8))[:, None]
    score = create("colour_match").score(RewardRequest(prompts, media)).scores["colour_match"].mean().item()
    assert 0.3 < score < 0.6


def test_prompt_files_cover_the_world_and_keep_some_prompts_out():
    train, heldout = ((REPOSITORY / "data" / "prompts" / f"shapes_{part}.txt").read_text().splitlines()
                      for part in ("train", "heldout"))
    assert sorted(train + heldout) == sorted(shapes.PROMPTS)
    assert len(heldout) == 6
    for words in (train, heldout):
        assert {prompt.split()[1] for prompt in words} == set(shapes.COLOURS)
        assert {prompt.split()[2] for prompt in words} == set(shapes.SHAPES)
    examples = (REPOSITORY / "data" / "prompts" / "flux_examples.txt").read_text().splitlines()
    assert len(examples) == len(set(examples)) >= 50 and all(examples)


def test_captions_are_right_unless_made_wrong():
    pictures, captions = shapes.dataset(200, seed=3)
    request = RewardRequest([shapes.PROMPTS[index] for index in captions], torch.from_numpy(pictures)[:, None])
    assert create("colour_match").score(request).scores["colour_match"].min() > 0.9
    again, wrong = shapes.dataset(200, caption_noise=1.0, seed=3)
    request = RewardRequest([shapes.PROMPTS[index] for index in wrong], torch.from_numpy(again)[:, None])
    assert create("colour_match").score(request).scores["colour_match"].max() < 0.1
    with pytest.raises(ValueError, match=r"caption_noise is 1\.5"):
        shapes.dataset(1, caption_noise=1.5)


def test_the_dataset_is_seeded_and_uses_every_colour_and_shape():
    (pictures, captions), (same, _), (other, _) = (shapes.dataset(100, seed=seed) for seed in (0, 0, 1))
    assert (pictures == same).all() and (pictures != other).any()
    assert pictures.shape == (100, 32, 32, 3) and pictures.dtype == np.uint8
    assert {int(index) // 3 for index in captions} == set(range(len(PALETTE)))
    assert {int(index) % 3 for index in captions} == {0, 1, 2}
