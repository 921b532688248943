"""Wan 2.1 on one process: diffusers' own pipeline at noise level 0, guidance trained through both passes, ratio one."""

import json
import shutil

import numpy as np
import pytest
import torch

from fastvideo_grpo import config as configuration
from fastvideo_grpo import families, plan
from fastvideo_grpo.config import ConfigError
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.sampling import noise
from tests import tiny_checkpoints
from tests.trainer import runs
from tests.trainer.promises import (
    assert_decodes_with_gradients,
    assert_draws,
    assert_gradients_through_both_passes,
    assert_ratio_one,
    keys_of,
)

# With what diffusers cleans: an entity, and white space.
PROMPT = Prompt("parity", "a red circle &amp; a cat  walk over the grass", negative_prompt="blurry, a dog")


@pytest.fixture(scope="module")
def diffusers_pipeline(tiny_wan):
    """With an Euler scheduler in place of UniPC, on the levels that this project samples on."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipeline = tiny_checkpoints.load(WanPipeline, tiny_wan)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    given = pipeline.scheduler.set_timesteps
    pipeline.scheduler.set_timesteps = lambda steps, device: given(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1], device=device)
    return pipeline


def drawn_by_diffusers(pipeline, trainer, initial, output_type):
    """Latents or pixels ``[B, F, H, W, 3]`` of the prompt, from this noise, with the run's settings."""
    sample = trainer.config.sample
    with torch.no_grad():
        frames = pipeline(
            prompt=PROMPT.text,
            negative_prompt=PROMPT.negative_prompt,
            guidance_scale=sample.cfg_scale,
            height=sample.height,
            width=sample.width,
            num_frames=sample.frames,
            num_inference_steps=sample.steps,
            max_sequence_length=trainer.config.prompts.text_length,
            num_videos_per_prompt=len(initial),
            latents=initial,
            output_type=output_type,
        ).frames
    return frames if output_type == "latent" else frames.permute(0, 1, 3, 4, 2)


CASES = {
    "plain": {"sample__cfg_scale": 1.0},
    "two passes": {},
    "one pass": {"model__cfg_batched": True},
    "image": {"sample__frames": 1, "sample__height": 32, "sample__width": 64},
    "a prompt longer than the text": {"prompts__text_length": 6, "sample__frames": 5},
}


@pytest.mark.parametrize("case", CASES)
def test_embeddings_latents_and_pixels_are_those_of_diffusers(make_trainer, diffusers_pipeline, case):
    """Promise 2."""
    trainer = make_trainer(train=False, **{**runs.WAN_T2V, **CASES[case]})
    with torch.no_grad():
        (sequence, _) = diffusers_pipeline.encode_prompt(
            PROMPT.text, do_classifier_free_guidance=False, max_sequence_length=trainer.config.prompts.text_length
        )
    ours = trainer.conditioning(PROMPT, 1)["encoder_hidden_states"]
    torch.testing.assert_close(ours, sequence, rtol=1e-5, atol=1e-5)
    initial = noise.initial_noise(keys_of(PROMPT, 4), trainer.latent_shape(), shared=False)
    latents, pixels = (drawn_by_diffusers(diffusers_pipeline, trainer, initial, kind) for kind in ("latent", "pt"))
    levels = trainer.schedule.at(torch.arange(trainer.config.sample.steps))
    assert torch.equal(levels.timestep, diffusers_pipeline.scheduler.timesteps)
    assert_draws(trainer, PROMPT, latents, pixels)
    assert_decodes_with_gradients(trainer, latents, pixels)


@pytest.mark.parametrize("batched,checkpointed", [(False, False), (True, False), (True, True)])
def test_guidance_has_gradients_through_both_passes(make_trainer, batched, checkpointed):
    trainer = make_trainer(train=False, **runs.WAN_T2V, model__cfg_batched=batched)
    if checkpointed:
        trainer.checkpoint_activations(1)
    assert_gradients_through_both_passes(trainer, PROMPT)


FLAVOURS = {
    "two passes": {},
    "one pass, LoRA, every second block": {
        "model__cfg_batched": True,
        "model__lora__rank": 4,
        "model__lora__alpha": 8.0,
        "optim__lr": 1e-2,
        "engine__activation_checkpointing": "every:2",
    },
    "one pass, full checkpointing": {"model__cfg_batched": True, "engine__activation_checkpointing": "full"},
    "image, no guidance, 4 samples": {"sample__frames": 1, "sample__cfg_scale": 1.0, "engine__micro_batch_size": 4},
    "two updates, KL, idle offload, 1 sample": {
        "grpo__updates_per_iteration": 2,
        "grpo__kl_weight": 0.1,
        "engine__offload_idle": True,
        "engine__micro_batch_size": 1,
    },
}
QUICK = ["two passes", "one pass, LoRA, every second block"]


@pytest.mark.parametrize("flavour", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in FLAVOURS if f not in QUICK)])
def test_every_ratio_is_exactly_one_before_the_first_optimiser_step(make_trainer, flavour):
    settings = {**runs.WAN_T2V, "sample__steps": 3, "optim__lr": 1e-3, "run__iterations": 2, **FLAVOURS[flavour]}
    assert_ratio_one(make_trainer(**settings))


def test_ratio_is_one_in_bf16_and_training_moves_every_weight(make_trainer):
    precision = {"model__precision": "bf16", "model__vae_precision": "bf16"}
    trainer = make_trainer(**runs.WAN_T2I, **precision, sample__steps=3, optim__lr=1e-3, run__iterations=1)
    parts = [trainer.denoiser, trainer.get_module("vae"), trainer.get_module("text_encoder")]
    assert all(p.dtype == torch.bfloat16 for part in parts for p in part.parameters())
    before = {name: weight.clone() for name, weight in trainer.engine.state_dict().items()}
    trainer.train()
    assert trainer.log.read()[-1]["train/ratio_first_update_max_dev"] <= 1e-6
    after = dict(trainer.engine.state_dict())
    assert all(weight.dtype == torch.float32 for weight in after.values())
    assert not [name for name, weight in before.items() if torch.equal(weight, after[name])]


def test_a_second_start_with_cached_embeddings_is_the_same_run(make_trainer, tmp_path):
    """And the text encoder stays on disk; the cached texts have their zeros behind them."""
    settings = {**runs.WAN_T2V, "sample__steps": 3, "run__iterations": 1, "prompts__embedding_dtype": "fp32"}
    plain = make_trainer(**settings, run__dir=tmp_path / "plain")
    plain.train()
    settings["prompts__embeddings"] = tmp_path / "embeddings"
    cached = make_trainer(**settings)
    cached.train()
    assert runs.same_bits(dict(plain.engine.state_dict()), dict(cached.engine.state_dict()))
    again = make_trainer(**{**settings, "run__iterations": 2})
    assert again.get_module("text_encoder") is None
    text = again._cache.get(again.prompts[0])["encoder_hidden_states"]
    assert text.shape[:2] == (1, 16) and text[0, 3].any() and not text[0, 4:].any()  # a red circle </s>


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full weights", "LoRA"])
def test_export_is_what_diffusers_loads_and_draws_the_same_clip(
    make_trainer, diffusers_pipeline, tiny_wan, tmp_path, capsys, lora
):
    """Promise 7."""
    from diffusers import WanPipeline

    from fastvideo_grpo import cli

    adapters = {"model__lora__rank": 4, "model__lora__alpha": 8.0} if lora else {}
    trainer = make_trainer(**runs.WAN_T2V, **adapters, optim__lr=1e-2, run__iterations=1)
    before = trainer.draw(PROMPT, keys_of(PROMPT, 2), deterministic=True).media
    trainer.train()
    out = tmp_path / "exported"
    assert cli.main(["export", str(trainer.folder), "--out", str(out), *([] if lora else ["--pipeline"])]) == 0
    pipeline = tiny_checkpoints.load(WanPipeline, tiny_wan if lora else out)
    if lora:
        pipeline.load_lora_weights(out)
    else:
        assert "WanPipeline.from_pretrained" in capsys.readouterr().out
    pipeline.scheduler = diffusers_pipeline.scheduler
    initial = noise.initial_noise(keys_of(PROMPT, 2), trainer.latent_shape(), shared=False)
    latents, pixels = (drawn_by_diffusers(pipeline, trainer, initial, kind) for kind in ("latent", "pt"))
    assert_draws(trainer, PROMPT, latents, pixels, micro_batches=(2,))
    assert (pixels * 255 - before).abs().max() > 2


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"sample__vae_tiling": True}, r"vae_tiling is true.*leave it out"),
        ({"sample__guidance_scale": 5.0}, r"guidance_scale is 5.0.*set sample.cfg_scale"),
        ({"prompts__text_length": 600}, "at most 512"),
        ({"sample__width": 40}, "multiple of 16 for this model: 32 or 48"),
    ],
)
def test_what_wan_rules_out(tiny_wan, tmp_path, settings, message):
    config = _config(tiny_wan, tmp_path, **settings)
    with pytest.raises(ConfigError, match=message):
        plan.check_run(config, families.model_facts(config), 1)


def test_a_wan_2_2_is_refused(tiny_wan, tmp_path):
    """It has the same pipeline class, and a second network, or another VAE."""
    two = shutil.copytree(tiny_wan, tmp_path / "two")
    shutil.copytree(two / "transformer", two / "transformer_2")
    other = shutil.copytree(tiny_wan, tmp_path / "other")
    file = other / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "is_residual": True}))
    for folder in (two, other):
        config = _config(folder, tmp_path)
        with pytest.raises(ConfigError, match=r"is a Wan 2\.2"):
            plan.check_run(config, families.model_facts(config), 1)


def _config(checkpoint, folder, **settings):
    (folder / "empty.yaml").write_text("{}")
    return configuration.load(folder / "empty.yaml", runs.settings(folder, checkpoint, **{**runs.WAN_T2V, **settings}))
