"""Tiny HunyuanVideo checkpoints: what is theirs alone. What holds of all models' is in test_tiny_checkpoints.py."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastvideo_grpo.models.hunyuan_video import tiny as hunyuan_video
from fastvideo_grpo.models.skyreels_i2v.tiny import write_skyreels_i2v
from fastvideo_grpo.rewards.base import RewardRequest
from fastvideo_grpo.rewards.registry import create
from fastvideo_grpo.tiny import moving_shapes
from fastvideo_grpo.tiny.tokenizer_files import VIDEO_WORDS
from tests import tiny_checkpoints
from tests.tiny_checkpoints import (
    keys_of,
    one_thread,  # noqa: F401  (a fixture)
    read,
)

REPOSITORY = Path(__file__).parents[1]
COMMITTED = REPOSITORY / "data" / "tiny-hunyuan-shapes"


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    return hunyuan_video.write_hunyuan_video(tmp_path_factory.mktemp("tiny") / "hunyuan")


@pytest.fixture(scope="module", params=["random", "committed"])
def folder(request, random_folder):
    return random_folder if request.param == "random" else COMMITTED


def load(folder):
    from diffusers import HunyuanVideoPipeline

    return tiny_checkpoints.load(HunyuanVideoPipeline, folder)


# --- the form


def test_text_encoder_keys_are_those_of_transformers_4(folder):
    llama = keys_of(folder / "text_encoder")
    assert {"embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.2.mlp.down_proj.weight", "norm.weight"} <= set(
        llama
    )
    assert not any(key.startswith("model.") or "rotary_emb" in key for key in llama)


def test_transformer_and_vae_keys_are_those_of_diffusers(folder):
    assert {
        "x_embedder.proj.weight",
        "context_embedder.time_text_embed.text_embedder.linear_1.weight",
        "context_embedder.token_refiner.refiner_blocks.0.attn.to_q.weight",
        "time_text_embed.guidance_embedder.linear_1.weight",
        "transformer_blocks.1.attn.add_q_proj.weight",
        "single_transformer_blocks.1.proj_mlp.weight",
        "norm_out.linear.weight",
        "proj_out.weight",
    } <= set(keys_of(folder / "transformer"))
    assert {"decoder.up_blocks.0.resnets.0.conv1.conv.weight", "quant_conv.weight", "post_quant_conv.weight"} <= set(
        keys_of(folder / "vae")
    )


def test_configurations_say_what_the_published_ones_say(folder):
    scheduler = read(folder / "scheduler" / "scheduler_config.json")
    assert (scheduler["_class_name"], scheduler["shift"]) == ("FlowMatchEulerDiscreteScheduler", 7.0)
    assert not scheduler["use_dynamic_shifting"]
    llama = read(folder / "text_encoder" / "config.json")
    assert (llama["rope_theta"], llama["max_position_embeddings"]) == (500000.0, 8192), "where FastVideo looks for them"
    assert llama["num_hidden_layers"] >= 3, "the text is taken from before the last two"
    transformer = read(folder / "transformer" / "config.json")
    assert transformer["guidance_embeds"]
    assert sum(transformer["rope_axes_dim"]) == transformer["attention_head_dim"]
    vae = read(folder / "vae" / "config.json")
    assert (vae["scaling_factor"], vae["temporal_compression_ratio"]) == (0.476986, 4)
    # FastVideo reckons it from the number of levels.
    assert vae["spatial_compression_ratio"] == 2 ** (len(vae["block_out_channels"]) - 1)
    assert transformer["in_channels"] == transformer["out_channels"] == vae["latent_channels"]


def test_the_template_before_the_prompt_has_the_tokens_that_pipelines_cut_off(folder):
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import AutoTokenizer

    llama = AutoTokenizer.from_pretrained(folder / "tokenizer")
    template, cut = DEFAULT_PROMPT_TEMPLATE["template"], DEFAULT_PROMPT_TEMPLATE["crop_start"]
    assert len(llama(template.split("{}")[0]).input_ids) == cut == 95
    for prompt, tokens in {
        "a red circle moving left": ["a", "Ġred", "Ġcircle", "Ġmoving", "Ġleft", "<|eot_id|>"],
        "Zebra": [*"Zebra", "<|eot_id|>"],
        "": ["<|eot_id|>"],
    }.items():
        assert llama.convert_ids_to_tokens(llama(template.format(prompt)).input_ids)[cut:] == tokens


def test_tokenizers_encode_any_text(folder):
    from transformers import AutoTokenizer

    llama, clip = (AutoTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2"))
    assert clip.model_max_length == 77
    unknown = "A Zebra, 7 olé!\n\n"
    ids = llama(unknown).input_ids
    assert llama.convert_ids_to_tokens(ids)[0] == "<|begin_of_text|>"
    assert llama.decode(ids, skip_special_tokens=True) == unknown
    assert llama("a", padding="max_length", max_length=4).attention_mask == [1, 1, 0, 0]
    config = read(folder / "text_encoder" / "config.json")
    assert (llama.bos_token_id, llama.eos_token_id, llama.pad_token_id) == tuple(
        config[f"{name}_token_id"] for name in ("bos", "eos", "pad")
    )
    assert len(llama) <= config["vocab_size"]
    for word in VIDEO_WORDS:
        assert len(llama(f"a {word}").input_ids) == 3 and len(clip(word).input_ids) == 3, word


# --- it loads and runs


def test_random_weights_give_outputs_of_ordinary_size(random_folder):
    pipeline = load(random_folder)
    with torch.no_grad():
        text, pooled, mask = pipeline.encode_prompt("a red circle moving left", max_sequence_length=16)
        latents = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        outputs = [
            pipeline.transformer(
                hidden_states=latents,
                timestep=torch.tensor([timestep]),
                encoder_hidden_states=text,
                encoder_attention_mask=mask,
                pooled_projections=pooled,
                guidance=torch.tensor([guidance]),
                return_dict=False,
            )[0]
            for timestep, guidance in ((500.0, 6000.0), (600.0, 6000.0), (500.0, 1000.0))
        ]
    assert 0.3 < text.std() < 5 and 0.3 < pooled.std() < 5
    assert 0.3 < outputs[0].std() < 5
    assert all((outputs[0] - other).std() > 0.02 for other in outputs[1:]), "timestep and guidance matter"


# --- the demo's checkpoint and its world


def test_latents_of_the_demo_have_mean_zero_and_size_one():
    vae = load(COMMITTED).vae
    clips, _ = moving_shapes.dataset(256, seed=5)  # the mean of fewer is too much of a draw
    latents = []
    with torch.no_grad():
        for some in torch.from_numpy(clips).permute(0, 4, 1, 2, 3).split(32):
            latents.append(vae.encode(some.float() / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor)
    assert torch.cat(latents).mean(dim=(0, 2, 3, 4)).abs().max() < 0.1
    assert abs(torch.cat(latents).std() - 1) < 0.1


def test_pretraining_encodes_prompts_as_the_pipeline_does():
    from fastvideo_grpo.models.hunyuan_video.pretrain import embeddings

    pipeline = load(COMMITTED)
    text, pooled = embeddings({"text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2})
    for prompt, ours, ours_pooled in list(zip(moving_shapes.PROMPTS, text, pooled, strict=True))[::7]:
        with torch.no_grad():
            theirs, theirs_pooled, mask = pipeline.encode_prompt(prompt)
        assert mask.sum() == len(ours)
        assert torch.allclose(ours, theirs[0, : len(ours)], atol=1e-5)
        assert torch.allclose(ours_pooled, theirs_pooled[0], atol=1e-5)


def test_the_committed_checkpoint_draws_shapes_that_often_move_the_wrong_way():
    pipeline = load(COMMITTED)
    prompts = [prompt for prompt in moving_shapes.PROMPTS for _ in range(2)]
    clips = pipeline(
        prompts,
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=8,
        max_sequence_length=16,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames
    media = torch.from_numpy((clips * 255).round().astype(np.uint8))
    score = create("moving_colour").score(RewardRequest(prompts, media)).scores["moving_colour"].mean().item()
    assert 0.3 < score < 0.7


def test_prompt_files_cover_the_world_and_keep_some_prompts_out():
    train, heldout = (
        (REPOSITORY / "data" / "prompts" / f"moving_{part}.txt").read_text().splitlines() for part in ("train", "heldout")
    )
    assert sorted(train + heldout) == sorted(moving_shapes.PROMPTS)
    assert len(heldout) == 8
    for words in (train, heldout):
        for position, names in {
            1: moving_shapes.COLOURS,
            2: moving_shapes.SHAPES,
            4: moving_shapes.DIRECTIONS,
        }.items():
            assert {prompt.split()[position] for prompt in words} == set(names)


def test_captions_are_right_unless_made_wrong():
    def scores(**settings):
        clips, captions = moving_shapes.dataset(100, seed=3, **settings)
        request = RewardRequest([moving_shapes.PROMPTS[index] for index in captions], torch.from_numpy(clips))
        return create("moving_colour").score(request).scores["moving_colour"]

    assert scores().min() > 0.9
    assert scores(caption_noise=1.0).max() < 0.1
    assert 0.4 < scores(caption_noise=0.4).mean() < 0.8
    with pytest.raises(ValueError, match=r"caption_noise is 1\.5"):
        moving_shapes.dataset(1, caption_noise=1.5)


def test_the_dataset_is_seeded_and_uses_every_prompt():
    (clips, captions), (same, _), (other, _) = (moving_shapes.dataset(300, seed=seed) for seed in (0, 0, 1))
    assert (clips == same).all() and (clips != other).any()
    assert clips.shape == (300, 9, 32, 32, 3) and clips.dtype == np.uint8
    assert set(captions.tolist()) == set(range(len(moving_shapes.PROMPTS)))


# --- SkyReels-I2V: the same folder with another transformer


def test_skyreels_has_a_transformer_that_reads_an_image(random_folder, tmp_path):
    folder = write_skyreels_i2v(tmp_path / "skyreels")
    assert keys_of(folder / "transformer") == keys_of(random_folder / "transformer")
    transformer, vae = read(folder / "transformer" / "config.json"), read(folder / "vae" / "config.json")
    assert transformer["in_channels"] == 2 * transformer["out_channels"] == 2 * vae["latent_channels"]
    with pytest.raises(FileExistsError, match="something else than a SkyReels-V1-I2V checkpoint"):
        write_skyreels_i2v(random_folder, overwrite=True)


def test_the_committed_scenes_are_what_the_command_draws(tmp_path):
    from PIL import Image

    from fastvideo_grpo.prompts.files import read_prompts
    from fastvideo_grpo.tiny.scenes import write_scenes

    committed = read_prompts(REPOSITORY / "data" / "prompts" / "image_to_video" / "prompts.jsonl", images=True)
    drawn = read_prompts(write_scenes(tmp_path), images=True)
    assert [(p.id, p.text) for p in committed] == [(p.id, p.text) for p in drawn]
    for ours, theirs in zip(committed, drawn, strict=True):
        assert np.array_equal(Image.open(ours.image), Image.open(theirs.image))
