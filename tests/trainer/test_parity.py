"""Promise 2: with noise level 0 the rollout is diffusers' own pipeline."""

import math

import pytest
import torch

from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.sampling import noise, schedules
from tests import tiny_checkpoints

PROMPT = Prompt("parity", "a red circle on a cat, realistic style")
SAMPLES = 4


@pytest.fixture(scope="module")
def diffusers_pipeline(tiny_flux):
    from diffusers import FluxPipeline

    return tiny_checkpoints.load(FluxPipeline, tiny_flux)


def _diffusers_schedule(trainer, tokens):
    """FLUX's resolution-dependent shift as a schedule of ours."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    return schedules.flow(trainer.config.sample.steps, math.exp(calculate_shift(tokens, 256, 4096, 0.5, 1.15)))


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_embeddings_latents_and_pixels_are_those_of_diffusers(make_trainer, diffusers_pipeline, size):
    trainer = make_trainer(train=False, sample__height=size[0], sample__width=size[1])
    with torch.no_grad():
        sequence, pooled, _ = diffusers_pipeline.encode_prompt(PROMPT.text, PROMPT.text, max_sequence_length=16)
    ours = trainer.conditioning(PROMPT, 1)
    torch.testing.assert_close(ours["pooled_projections"], pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["encoder_hidden_states"], sequence, rtol=1e-5, atol=1e-5)

    keys = [noise.SampleKey(0, 0, 0, PROMPT.id, member) for member in range(SAMPLES)]
    initial = trainer.pack(noise.initial_noise(keys, trainer.latent_shape(), shared=False))
    trainer.schedule = _diffusers_schedule(trainer, initial.shape[1])

    def theirs(output_type):
        with torch.no_grad():
            return diffusers_pipeline(
                prompt=PROMPT.text,
                height=size[0],
                width=size[1],
                num_inference_steps=trainer.config.sample.steps,
                guidance_scale=trainer.config.sample.guidance_scale,
                latents=initial,
                num_images_per_prompt=SAMPLES,
                max_sequence_length=16,
                output_type=output_type,
            ).images

    latents, pixels = theirs("latent"), theirs("pt").permute(0, 2, 3, 1)[:, None]
    caught = []
    stage = trainer.denoising_stage.forward
    trainer.denoising_stage.forward = lambda batch, args: caught.append(stage(batch, args).latents) or batch
    for micro_batch in (1, 2, 4):
        caught.clear()
        media = torch.cat(
            [trainer.draw(PROMPT, keys[i : i + micro_batch], deterministic=True).media for i in range(0, 4, micro_batch)]
        )
        torch.testing.assert_close(torch.cat(caught), latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(trainer.decode(torch.cat(caught), differentiable=True), pixels, rtol=1e-5, atol=1e-5)
        # The media are those pixels, rounded to 8 bits once.
        assert (media.float() - pixels * 255).abs().max() <= 0.5 + 1e-3
    assert pixels.std() > 0.01  # a constant picture would agree with anything


def test_noise_level_zero_is_the_ode_limit_of_the_sde(make_trainer):
    """Towards noise level 0 the rollout itself, not only the evaluation sampler, goes to the ODE's result."""
    trainer = make_trainer(train=False)
    keys = [noise.SampleKey(0, 0, 0, PROMPT.id, 0)]
    trainer.config.sample.init_noise = "per_sample"
    ode = trainer.draw(PROMPT, keys, deterministic=True).media
    trainer.transition.noise_level = 0.0
    assert torch.equal(trainer.draw(PROMPT, keys).media, ode)


def test_differentiable_decode_has_gradients_and_agrees_with_the_decoding_stage(make_trainer):
    trainer = make_trainer(train=False)
    latents = trainer.pack(torch.randn(2, *trainer.latent_shape(), generator=torch.Generator().manual_seed(0)))
    latents.requires_grad_(True)
    pixels = trainer.decode(latents, differentiable=True)
    (gradient,) = torch.autograd.grad(pixels.sum(), latents)
    assert gradient.abs().sum() > 0
    assert torch.equal(trainer.decode(latents), (pixels.detach() * 255).round().to(torch.uint8))
