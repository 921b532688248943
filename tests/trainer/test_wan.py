"""Wan 2.1 on one process: diffusers' own pipeline at noise level 0, guidance trained through both passes, ratio one."""

import numpy as np
import pytest
import torch

from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.sampling import noise
from tests import tiny_checkpoints
from tests.trainer import runs

# With what diffusers cleans: an entity, and white space.
PROMPT = Prompt("parity", "a red circle &amp; a cat  walk over the grass", negative_prompt="blurry, a dog")


@pytest.fixture(scope="module")
def diffusers_pipeline(tiny_wan):
    """With an Euler scheduler in place of UniPC, on the levels that this project samples on."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipeline = tiny_checkpoints.load(WanPipeline, tiny_wan)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    given = pipeline.scheduler.set_timesteps
    pipeline.scheduler.set_timesteps = lambda steps, device: given(
        sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1], device=device
    )
    return pipeline


def _keys(count):
    return [noise.SampleKey(0, 0, 0, PROMPT.id, member) for member in range(count)]


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
    keys = _keys(4)
    initial = noise.initial_noise(keys, trainer.latent_shape(), shared=False)
    latents, pixels = (drawn_by_diffusers(diffusers_pipeline, trainer, initial, kind) for kind in ("latent", "pt"))
    levels = trainer.schedule.at(torch.arange(trainer.config.sample.steps))
    assert torch.equal(levels.timestep, diffusers_pipeline.scheduler.timesteps)
    caught = []
    stage = trainer.denoising_stage.forward
    trainer.denoising_stage.forward = lambda batch, args: caught.append(stage(batch, args).latents) or batch
    for micro_batch in (1, 2, 4):
        caught.clear()
        media = torch.cat(
            [trainer.draw(PROMPT, keys[i : i + micro_batch], deterministic=True).media for i in range(0, 4, micro_batch)]
        )
        torch.testing.assert_close(torch.cat(caught), latents, rtol=1e-5, atol=1e-5)
        assert (media.float() - pixels * 255).abs().max() <= 0.5 + 1e-2
    ours = trainer.decode(latents.requires_grad_(True), differentiable=True)
    torch.testing.assert_close(ours.detach(), pixels, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours.sum(), latents)
    assert gradient.abs().sum() > 0 and pixels.std() > 0.01
