"""Tiny HunyuanVideo checkpoints: published files and names, loaded by diffusers, the same from the same seed."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvideo_grpo.commands import tiny as command
from fastvideo_grpo.models.hunyuan_video import tiny as hunyuan_video
from fastvideo_grpo.rewards.base import RewardRequest
from fastvideo_grpo.rewards.registry import create
from fastvideo_grpo.tiny import moving_shapes
from fastvideo_grpo.tiny.tokenizer_files import VIDEO_WORDS
from tests import tiny_checkpoints
from tests.tiny_checkpoints import (
    check_every_weight_is_loaded,
    check_files,
    check_index,
    check_same_form,
    check_the_prompt_shows_in_a_clip,
    contents_of,
    keys_of,
    one_thread,  # noqa: F401  (a fixture)
    read,
)

REPOSITORY = Path(__file__).parents[1]
COMMITTED = REPOSITORY / "data" / "tiny-hunyuan-shapes"

# What the repository of HunyuanVideo holds, with the number of shards that stands in its names left open.
PUBLISHED_FILES = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model-*.safetensors",
    "text_encoder/model.safetensors.index.json",
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer_2/merges.txt",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/tokenizer_config.json",
    "tokenizer_2/vocab.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-*.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


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


def test_the_files_are_those_of_the_published_checkpoint(folder):
    check_files(folder, PUBLISHED_FILES)


@pytest.mark.parametrize("component, stem", [("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_the_index_names_every_tensor_and_its_shard(folder, component, stem):
    check_index(folder / component, stem)


def test_text_encoder_keys_are_those_of_transformers_4(folder):
    llama = keys_of(folder / "text_encoder")
    assert {"embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.2.mlp.down_proj.weight", "norm.weight"} <= set(
        llama
    )
    assert not any(key.startswith("model.") or "rotary_emb" in key for key in llama)
    clip = keys_of(folder / "text_encoder_2")
    assert all(key.startswith("text_model.") for key in clip)
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in clip
    assert not any("position_ids" in key for key in clip)


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


def test_model_index_names_the_published_classes(folder):
    index = read(folder / "model_index.json")
    assert index["_class_name"] == "HunyuanVideoPipeline"
    assert index["text_encoder"] == ["transformers", "LlamaModel"]
    assert all((folder / name).is_dir() for name in index if not name.startswith("_"))


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


def test_diffusers_makes_a_clip(folder):
    pipeline = load(folder)
    check_the_prompt_shows_in_a_clip(pipeline)


def test_every_weight_reaches_diffusers(folder):
    check_every_weight_is_loaded(load(folder), folder)


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


# --- writing


def test_the_same_seed_writes_the_same_bytes(random_folder, tmp_path):
    again = hunyuan_video.write_hunyuan_video(tmp_path / "again")
    assert contents_of(again) == contents_of(random_folder)
    other = hunyuan_video.write_hunyuan_video(tmp_path / "other", seed=1)
    assert contents_of(other) != contents_of(random_folder)


def test_unknown_presets_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'huge'.*random, demo"):
        hunyuan_video.write_hunyuan_video(tmp_path / "hunyuan", preset="huge")


def test_only_such_a_checkpoint_is_overwritten_and_only_when_told(tmp_path):
    folder = tmp_path / "hunyuan"
    hunyuan_video.write_hunyuan_video(folder)
    with pytest.raises(FileExistsError, match="--overwrite"):
        hunyuan_video.write_hunyuan_video(folder)
    hunyuan_video.write_hunyuan_video(folder, overwrite=True)
    other = tmp_path / "flux"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(FileExistsError, match="something else than a HunyuanVideo checkpoint"):
        hunyuan_video.write_hunyuan_video(other, overwrite=True)
    assert (other / "model_index.json").exists()


def test_the_command_writes_a_checkpoint(tmp_path, capsys, random_folder):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "out"
    assert command.run(parser.parse_args(["hunyuan_video", "--out", str(out)])) == 0
    assert str(out) in capsys.readouterr().out
    assert contents_of(out) == contents_of(random_folder)


# --- the demo's checkpoint and its world


def test_pretraining_runs_and_writes_the_demo_preset(tmp_path):
    from fastvideo_grpo.models.hunyuan_video.pretrain import pretrain_hunyuan_video

    settings = {"clips": 16, "autoencoder_steps": 2, "transformer_steps": 2}
    lines = []
    before = torch.get_rng_state()
    folder = pretrain_hunyuan_video(tmp_path / "demo", **settings, progress=lines.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert any("transformer" in line and "2/2" in line for line in lines)
    assert set(contents_of(folder)) == set(contents_of(COMMITTED))
    again = pretrain_hunyuan_video(tmp_path / "again", **settings, progress=lines.append)
    assert contents_of(again) == contents_of(folder)
    with pytest.raises(FileExistsError):
        pretrain_hunyuan_video(folder)


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


def test_the_committed_checkpoint_is_small_and_what_the_code_writes(tmp_path):
    assert sum(path.stat().st_size for path in COMMITTED.rglob("*") if path.is_file()) < 2_000_000
    written = hunyuan_video.write_hunyuan_video(tmp_path / "demo", preset="demo")
    check_same_form(written, COMMITTED)


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


def test_skyreels_has_hunyuan_videos_files_and_a_transformer_that_reads_an_image(random_folder, tmp_path):
    from diffusers import HunyuanSkyreelsImageToVideoPipeline

    from fastvideo_grpo.models.skyreels_i2v.tiny import write_skyreels_i2v

    folder = write_skyreels_i2v(tmp_path / "skyreels")
    check_files(folder, PUBLISHED_FILES)
    check_index(folder / "transformer", "diffusion_pytorch_model")
    assert keys_of(folder / "transformer") == keys_of(random_folder / "transformer")
    transformer, vae = read(folder / "transformer" / "config.json"), read(folder / "vae" / "config.json")
    assert transformer["in_channels"] == 2 * transformer["out_channels"] == 2 * vae["latent_channels"]
    assert read(folder / "model_index.json")["_class_name"] == "HunyuanSkyreelsImageToVideoPipeline"
    pipeline = tiny_checkpoints.load(HunyuanSkyreelsImageToVideoPipeline, folder)
    check_every_weight_is_loaded(pipeline, folder)
    assert contents_of(write_skyreels_i2v(tmp_path / "again")) == contents_of(folder)
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
