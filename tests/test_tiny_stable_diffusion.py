"""Tiny Stable Diffusion checkpoints: published files and names, loaded by diffusers, the same from the same seed."""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvideo_grpo.commands import tiny as command
from fastvideo_grpo.models.stable_diffusion import tiny as stable_diffusion
from fastvideo_grpo.rewards.base import RewardRequest
from fastvideo_grpo.rewards.registry import create
from fastvideo_grpo.tiny import shapes
from tests import tiny_checkpoints
from tests.tiny_checkpoints import (
    check_every_weight_is_loaded,
    check_files,
    check_same_form,
    components_of,
    contents_of,
    keys_of,
    one_thread,  # noqa: F401  (a fixture)
    read,
)

REPOSITORY = Path(__file__).parents[1]
COMMITTED = REPOSITORY / "data" / "tiny-sd-shapes"

# What the repository of stable-diffusion-v1-4 holds, as safetensors.
SAFETY_FILES = {
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
}
PUBLISHED_FILES = SAFETY_FILES | {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    return stable_diffusion.write_stable_diffusion(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="module")
def v_folder(tmp_path_factory):
    return stable_diffusion.write_stable_diffusion(tmp_path_factory.mktemp("tiny") / "sd", prediction_type="v_prediction")


@pytest.fixture(scope="module", params=["random", "committed"])
def folder(request, random_folder):
    return random_folder if request.param == "random" else COMMITTED


def load(folder):
    """The pipeline with the scheduler that GRPO samples with."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = tiny_checkpoints.load(StableDiffusionPipeline, folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def sample(pipeline, prompts, **settings):
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompts, height=size, width=size, generator=generator, **{"output_type": "np", **settings}).images


# --- the form


def test_the_files_are_those_of_the_published_checkpoint(random_folder):
    check_files(random_folder, PUBLISHED_FILES)
    check_files(COMMITTED, PUBLISHED_FILES - SAFETY_FILES)


def test_text_encoder_and_safety_checker_keys_are_those_of_transformers_4(folder, random_folder):
    clip = keys_of(folder / "text_encoder")
    assert all(key.startswith("text_model.") for key in clip)
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in clip
    assert not any("position_ids" in key for key in clip)
    assert {
        "vision_model.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "visual_projection.weight",
        "concept_embeds",
        "special_care_embeds_weights",
    } <= set(keys_of(random_folder / "safety_checker"))


def test_unet_keys_are_those_of_diffusers(folder):
    assert {
        "conv_in.weight",
        "time_embedding.linear_1.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "down_blocks.0.downsamplers.0.conv.weight",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
        "up_blocks.1.attentions.1.proj_out.weight",
        "conv_norm_out.weight",
    } <= set(keys_of(folder / "unet"))


def test_the_autoencoders_attention_has_its_published_names(folder):
    keys = keys_of(folder / "vae")
    for name in ("query", "key", "value", "proj_attn", "group_norm"):
        assert f"decoder.mid_block.attentions.0.{name}.weight" in keys
        assert f"encoder.mid_block.attentions.0.{name}.bias" in keys
    assert not any("to_q" in key or "to_out" in key for key in keys)
    assert {"quant_conv.weight", "post_quant_conv.weight"} <= set(keys)


def test_unet_configurations_have_the_published_keys(folder):
    config = read(folder / "unet" / "config.json")
    assert set(config) == {
        "_class_name", "_diffusers_version", "act_fn", "attention_head_dim", "block_out_channels", "center_input_sample",
        "cross_attention_dim", "down_block_types", "downsample_padding", "flip_sin_to_cos", "freq_shift", "in_channels",
        "layers_per_block", "mid_block_scale_factor", "norm_eps", "norm_num_groups", "out_channels", "sample_size",
        "up_block_types",
    }  # fmt: skip
    assert config["down_block_types"] == ["CrossAttnDownBlock2D", "DownBlock2D"]
    assert config["up_block_types"] == ["UpBlock2D", "CrossAttnUpBlock2D"]
    assert config["cross_attention_dim"] == read(folder / "text_encoder" / "config.json")["hidden_size"]
    heads = {
        module.heads
        for name, module in load(folder).unet.named_modules()
        if name.endswith(("attn1", "attn2"))
    }  # fmt: skip
    assert heads == {config["attention_head_dim"]} and min(heads) >= 2


def test_the_schedulers_are_those_of_version_1_and_2(folder, v_folder):
    published = {
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None,
    }  # fmt: skip
    for place, name, more in (
        (folder, "PNDMScheduler", {}),
        (v_folder, "DDIMScheduler", {"prediction_type": "v_prediction"}),
    ):
        config = read(place / "scheduler" / "scheduler_config.json")
        assert {key: value for key, value in config.items() if key != "_diffusers_version"} == {
            "_class_name": name, **published, **more}  # fmt: skip
        assert read(place / "model_index.json")["scheduler"] == ["diffusers", name]
    assert load(folder).scheduler.config.prediction_type == "epsilon"
    assert load(v_folder).scheduler.config.prediction_type == "v_prediction"


def test_model_index_names_the_published_classes(random_folder):
    index = read(random_folder / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert all((random_folder / name).is_dir() for name in index if not name.startswith("_"))
    index = read(COMMITTED / "model_index.json")
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert index["requires_safety_checker"] is False


# --- it loads and runs


def test_diffusers_makes_a_picture(folder):
    pipeline = load(folder)
    prompts = ["a red circle", "a blue square"]
    pictures = [sample(pipeline, prompts, num_inference_steps=3, guidance_scale=scale) for scale in (1.0, 5.0)]
    assert pictures[0].shape == (2, *[pipeline.unet.config.sample_size * pipeline.vae_scale_factor] * 2, 3)
    assert all(np.isfinite(some).all() and some.std() > 0.05 for some in pictures)
    assert np.abs(pictures[0] - pictures[1]).mean() > 1e-3, "guidance matters"
    other = sample(pipeline, prompts[::-1], num_inference_steps=3, guidance_scale=5.0)
    assert np.abs(pictures[1] - other).mean() > 1e-3, "the prompt matters"


def test_every_weight_reaches_diffusers(folder):
    check_every_weight_is_loaded(load(folder), folder)
    assert components_of(folder) == sorted(
        {"text_encoder", "unet", "vae"} | ({"safety_checker"} if folder != COMMITTED else set())
    )


def test_random_weights_give_outputs_of_ordinary_size(random_folder):
    pipeline = load(random_folder)
    with torch.no_grad():
        prompt, empty = pipeline.encode_prompt("a red circle", "cpu", 1, True)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        outputs = [pipeline.unet(latents, t, text).sample for t, text in ((500, prompt), (900, prompt), (500, empty))]
    assert 0.3 < prompt.std() < 5
    assert 0.3 < outputs[0].std() < 5
    assert all((outputs[0] - other).std() > 0.02 for other in outputs[1:]), "timestep and text matter"


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", stable_diffusion.PREDICTION_TYPES)
def test_latents_of_random_weights_stay_of_ordinary_size(random_folder, v_folder, prediction_type, eta):
    pipeline = load(random_folder if prediction_type == "epsilon" else v_folder)
    sizes = []

    def note(pipeline, step, timestep, tensors):
        sizes.append(tensors["latents"].std().item())
        return tensors

    pictures = sample(pipeline, ["a red circle", "a dog"], num_inference_steps=10, guidance_scale=5.0, eta=eta,
                      callback_on_step_end=note)  # fmt: skip
    assert len(sizes) == 10 and min(sizes) > 0.1 and max(sizes) < 4
    assert ((pictures == 0) | (pictures == 1)).mean() < 0.3


# --- writing


def test_the_same_seed_writes_the_same_bytes(random_folder, tmp_path):
    again = stable_diffusion.write_stable_diffusion(tmp_path / "again")
    assert contents_of(again) == contents_of(random_folder)
    other = stable_diffusion.write_stable_diffusion(tmp_path / "other", seed=1)
    assert contents_of(other) != contents_of(random_folder)


def test_the_prediction_type_changes_the_scheduler_alone(random_folder, v_folder):
    ours, theirs = contents_of(random_folder), contents_of(v_folder)
    assert {str(path) for path in ours if ours[path] != theirs[path]} == {
        "model_index.json", "scheduler/scheduler_config.json"}  # fmt: skip


def test_unknown_presets_and_prediction_types_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'huge'.*random, demo"):
        stable_diffusion.write_stable_diffusion(tmp_path / "sd", preset="huge")
    with pytest.raises(ValueError, match=r"'sample'.*epsilon, v_prediction"):
        stable_diffusion.write_stable_diffusion(tmp_path / "sd", prediction_type="sample")
    assert not (tmp_path / "sd").exists()


def test_only_such_a_checkpoint_is_overwritten_and_only_when_told(tmp_path):
    folder = tmp_path / "sd"
    stable_diffusion.write_stable_diffusion(folder)
    with pytest.raises(FileExistsError, match="--overwrite"):
        stable_diffusion.write_stable_diffusion(folder)
    stable_diffusion.write_stable_diffusion(folder, overwrite=True)
    other = tmp_path / "flux"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(FileExistsError, match="something else than a Stable Diffusion checkpoint"):
        stable_diffusion.write_stable_diffusion(other, overwrite=True)
    assert (other / "model_index.json").exists()


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def test_the_command_writes_both_prediction_types(tmp_path, capsys, random_folder, v_folder):
    out = tmp_path / "out"
    assert run_command("stable_diffusion", "--out", str(out)) == 0
    assert str(out) in capsys.readouterr().out
    assert contents_of(out) == contents_of(random_folder)
    assert run_command("stable_diffusion", "--out", str(out), "--layout", "v_prediction", "--overwrite") == 0
    assert contents_of(out) == contents_of(v_folder)
    assert run_command("stable_diffusion", "--out", str(out), "--layout", "lora", "--overwrite") == 1
    assert "--layout lora is not for stable_diffusion" in capsys.readouterr().err


def test_no_part_of_it_imports_fastvideo():
    program = (
        "import sys; from fastvideo_grpo.tiny import pretrain_stable_diffusion, stable_diffusion; "
        "stable_diffusion.build('random'); sys.exit('fastvideo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0


# --- the demo's checkpoint


def test_pretraining_runs_and_writes_the_demo_preset(tmp_path):
    from fastvideo_grpo.models.stable_diffusion.pretrain import pretrain_stable_diffusion

    settings = {"pictures": 16, "autoencoder_steps": 2, "unet_steps": 2}
    lines = []
    before = torch.get_rng_state()
    folder = pretrain_stable_diffusion(tmp_path / "demo", **settings, progress=lines.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert any("UNet" in line and "2/2" in line for line in lines)
    assert set(contents_of(folder)) == set(contents_of(COMMITTED))
    again = pretrain_stable_diffusion(tmp_path / "again", **settings, progress=lines.append)
    assert contents_of(again) == contents_of(folder)
    v = pretrain_stable_diffusion(tmp_path / "v", **settings, prediction_type="v_prediction", progress=lines.append)
    changed = {str(path) for path, content in contents_of(v).items() if content != contents_of(folder)[path]}
    assert changed >= {"scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors"}
    with pytest.raises(FileExistsError):
        pretrain_stable_diffusion(folder)


def test_latents_of_the_demo_have_mean_zero_and_size_one():
    vae = load(COMMITTED).vae
    pictures, _ = shapes.dataset(512, seed=5)
    with torch.no_grad():
        latents = vae.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mode()
    latents *= vae.config.scaling_factor
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert abs(latents.std() - 1) < 0.1


def test_the_committed_checkpoint_is_small_and_what_the_code_writes(tmp_path):
    assert sum(path.stat().st_size for path in COMMITTED.rglob("*") if path.is_file()) < 2_500_000
    written = stable_diffusion.write_stable_diffusion(tmp_path / "demo", preset="demo")
    check_same_form(written, COMMITTED, measured=("scaling_factor",))


def test_the_committed_checkpoint_draws_shapes_whose_colour_is_often_wrong():
    prompts = [prompt for prompt in shapes.PROMPTS for _ in range(4)]
    pictures = sample(load(COMMITTED), prompts, num_inference_steps=10, guidance_scale=3.0)
    media = torch.from_numpy((pictures * 255).round().astype(np.uint8))[:, None]
    score = create("colour_match").score(RewardRequest(prompts, media)).scores["colour_match"].mean().item()
    assert 0.3 < score < 0.7
