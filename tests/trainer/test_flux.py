"""What is particular to FLUX. (The promises it shares with all models: tests/promises.)"""

import math
from dataclasses import replace

import pytest
import torch

from fastvideo_grpo.sampling import schedules
from tests import tiny_checkpoints
from tests.promises.models import MODELS


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_the_shift_that_diffusers_makes_of_the_resolution_is_a_shift_of_ours(make_trainer, tiny_flux, tmp_path, size):
    """Latents of diffusers' pipeline as it is published, with its resolution-dependent schedule. It has another formula for the
    levels, which rounds in another way (the network reads the last digit): ours are compared with them, latents on them."""
    from diffusers import FluxPipeline
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    model = MODELS["flux"]
    trainer = make_trainer(train=False, sample__height=size[0], sample__width=size[1])
    prompt = replace(model.prompt(tmp_path), text="a red circle on a cat, realistic style")
    initial = trainer.pack(model.initial(trainer, prompt, 4))
    shift = math.exp(calculate_shift(initial.shape[1], 256, 4096, 0.5, 1.15))
    pipeline = tiny_checkpoints.load(FluxPipeline, tiny_flux)
    with torch.no_grad():
        latents = pipeline(
            prompt=prompt.text,
            height=size[0],
            width=size[1],
            num_inference_steps=trainer.config.sample.steps,
            guidance_scale=trainer.config.sample.guidance_scale,
            latents=initial,
            num_images_per_prompt=4,
            max_sequence_length=16,
            output_type="latent",
        ).images
    sigma = pipeline.scheduler.sigmas
    torch.testing.assert_close(schedules.flow(trainer.config.sample.steps, shift).sigma, sigma, rtol=2e-7, atol=0)
    trainer.schedule = schedules.Schedule(1 - sigma, sigma, 1000 * sigma)
    caught = []
    stage = trainer.denoising_stage.forward
    trainer.denoising_stage.forward = lambda batch, args: caught.append(stage(batch, args).latents) or batch
    trainer.draw_fixed(prompt, model.keys(prompt, 4))
    torch.testing.assert_close(caught[0], latents, rtol=1e-5, atol=1e-5)
