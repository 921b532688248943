"""Promise 2: at noise level 0 a rollout is diffusers' own pipeline, from the same prompt and noise."""

import pytest
import torch

from fastvideo_grpo.sampling.noise_levels import NoiseLevel
from fastvideo_grpo.trainers.conditioning import split_guidance
from tests.promises.models import GUIDANCE, MODELS, cases

SAMPLES = 4


def geometries(model):
    return [f"{geometry}, {guidance}" for geometry in model.geometries for guidance in GUIDANCE]


def quick(model, case):
    """Every kind of guidance at the first geometry, the others with guidance off."""
    return case.startswith(next(iter(model.geometries))) or case.endswith("no guidance")


def settings_of(model, case):
    geometry, _, guidance = case.rpartition(", ")
    return model.run(**model.geometries[geometry], **GUIDANCE[guidance])


@pytest.fixture(scope="module")
def pipelines(tiny_checkpoint):
    """kind -> diffusers' pipeline of the tiny checkpoint."""
    loaded = {}

    def get(model):
        if model.kind not in loaded:
            loaded[model.kind] = model.load(tiny_checkpoint(model.kind))
        return loaded[model.kind]

    return get


@pytest.mark.parametrize("model,case", cases(geometries, quick))
def test_latents_and_pixels_are_those_of_diffusers(make_trainer, pipelines, tmp_path, model, case):
    """In micro-batches of 1, 2 and 4; with guidance both texts are read."""
    trainer, prompt = make_trainer(train=False, **settings_of(model, case)), model.prompt(tmp_path)
    initial = model.initial(trainer, prompt, SAMPLES)
    with torch.no_grad():
        latents, pixels = (model.draw(pipelines(model), trainer, prompt, initial, output) for output in ("latent", "pt"))
    sample = trainer.config.sample
    assert pixels.shape == (SAMPLES, sample.frames, sample.height, sample.width, 3)
    assert pixels.std() > 0.01  # a constant picture would agree with anything

    keys = model.keys(prompt, SAMPLES)
    for size in (1, 2, 4):
        drawn = [trainer.draw_fixed(prompt, keys[i : i + size]) for i in range(0, SAMPLES, size)]
        torch.testing.assert_close(torch.cat([part.latents for part in drawn]), latents, rtol=1e-5, atol=1e-5)
        # The media are those pixels, rounded to 8 bits once.
        assert (torch.cat([part.media for part in drawn]).float() - pixels * 255).abs().max() <= 0.5 + 1e-2


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_levels_are_those_of_diffusers(make_trainer, pipelines, tmp_path, model):
    """To the bit: the network is shown the same numbers."""
    settings = settings_of(model, f"{next(iter(model.geometries))}, no guidance")
    trainer = make_trainer(train=False, **settings)
    pipeline, prompt = pipelines(model), model.prompt(tmp_path)
    model.draw(pipeline, trainer, prompt, model.initial(trainer, prompt, 1), "latent")
    levels = trainer.schedule.at(torch.arange(trainer.config.sample.steps))
    assert torch.equal(levels.timestep, pipeline.scheduler.timesteps.float())


@pytest.mark.parametrize("model,case", cases(lambda model: model.geometries, lambda model, case: True))
def test_embeddings_are_those_of_diffusers(make_trainer, pipelines, tmp_path, model, case):
    """Of the prompt and of the negative prompt."""
    settings = settings_of(model, f"{case}, guidance in one pass")
    trainer, prompt = make_trainer(train=False, **settings), model.prompt(tmp_path)
    length = trainer.config.prompts.text_length
    parts = split_guidance(trainer.conditioning(prompt, 1))
    for part, text in zip(parts, (prompt.text, prompt.negative_prompt), strict=True):
        with torch.no_grad():
            expected = model.embed(pipelines(model), text, length)
        for name, tensor in expected.items():
            torch.testing.assert_close(part[name], tensor, rtol=1e-5, atol=1e-5)
    tokens = [part["encoder_hidden_states"].shape[1] for part in parts]
    assert max(tokens) <= length
    assert (tokens[0] != tokens[1]) == (model.unpadded and length > 6)


@pytest.mark.parametrize("model,case", cases(lambda model: model.geometries, lambda model, case: True))
def test_decoding_with_gradients_gives_the_pixels_of_diffusers(make_trainer, pipelines, tmp_path, model, case):
    """And the media, rounded: what a reward with gradients judges is what the others see."""
    settings = settings_of(model, f"{case}, no guidance")
    trainer, prompt = make_trainer(train=False, **settings), model.prompt(tmp_path)
    initial = model.initial(trainer, prompt, 2)
    with torch.no_grad():
        latents, pixels = (model.draw(pipelines(model), trainer, prompt, initial, output) for output in ("latent", "pt"))
    latents.requires_grad_(True)
    ours = trainer.decode(latents, differentiable=True)
    torch.testing.assert_close(ours.detach(), pixels, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours.sum(), latents)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()
    assert torch.equal(trainer.decode(latents.detach()), (ours.detach() * 255).round().to(torch.uint8))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_sde_goes_to_the_ode_as_its_noise_goes_to_zero(make_trainer, tmp_path, model):
    """The rollout itself, not only the evaluation sampler."""
    trainer, prompt = make_trainer(train=False, **model.run()), model.prompt(tmp_path)
    keys = model.keys(prompt, 2)
    trainer.config.sample.init_noise = "per_sample"
    ode = trainer.draw_fixed(prompt, keys).media
    trainer.transition.noise = NoiseLevel(0.0)
    assert torch.equal(trainer.draw(prompt, keys).media, ode)
