"""Tiny FLUX checkpoints: what is theirs alone. What holds of all models' is in test_tiny_checkpoints.py."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastvideo_grpo.models.flux import tiny as flux
from fastvideo_grpo.rewards.base import RewardRequest
from fastvideo_grpo.rewards.registry import create
from fastvideo_grpo.rewards.rules.colour_match import PALETTE
from fastvideo_grpo.tiny import shapes
from fastvideo_grpo.tiny.tokenizer_files import WORDS, clip_vocabulary, t5_pieces
from tests import tiny_checkpoints
from tests.tiny_checkpoints import (
    keys_of,
    one_thread,  # noqa: F401  (a fixture)
    read,
)

REPOSITORY = Path(__file__).parents[1]
COMMITTED = REPOSITORY / "data" / "tiny-flux-shapes"


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


def test_text_encoder_keys_are_those_of_transformers_4(folder):
    assert "text_model.embeddings.token_embedding.weight" in keys_of(folder / "text_encoder")
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in keys_of(folder / "text_encoder_2")


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


# --- the demo's checkpoint and its world


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
