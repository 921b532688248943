"""Promise 5 for pixels: what a VAE makes NaN or infinity of is masked, counted and named; all else keeps its bits."""

import itertools
from contextlib import contextmanager

import pytest
import torch

from fastvideo_grpo.sampling.noise import SampleKey
from fastvideo_grpo.trainers.not_finite import DECODING, SAMPLING
from tests.promises.models import MODELS, cases

# Where a number goes wrong, and the number. Clamped, infinity is white; Wan's VAE clamps what its decoder gives itself.
PLACES = {"the last layer": torch.inf, "the VAE": -torch.inf, "the first layer": torch.nan}


@contextmanager
def broken_vae(trainer, place, value, hit):
    """One number of one frame is ``value`` whenever ``hit(row)`` says so of a sample that is decoded, counted from 0."""
    vae, seen = trainer.get_module("vae"), [0]

    def spoil(tensor, rows):
        tensor = tensor.clone()
        for row in rows:
            tensor[row, 0, ..., -1, -1] = value  # of a clip: in all frames of the piece
        return tensor

    original = vae.decode

    def decode(latents, *args, **kwargs):
        rows = [row for row in range(len(latents)) if hit(seen[0] + row)]
        seen[0] += len(latents)
        if place == "the VAE":
            found = original(latents, *args, **kwargs)
            if hasattr(found, "sample"):  # diffusers' output, where nobody asked for a tuple
                found.sample = spoil(found.sample, rows)
                return found
            return spoil(found, rows) if isinstance(found, torch.Tensor) else (spoil(found[0], rows),)
        layer, pieces = vae.decoder.conv_out if place == "the last layer" else vae.decoder.conv_in, itertools.count()
        handle = layer.register_forward_hook(
            lambda module, inputs, output: spoil(output, rows) if next(pieces) == 0 else None  # Wan: the first frame
        )
        try:
            return original(latents, *args, **kwargs)
        finally:
            handle.remove()

    vae.decode = decode
    try:
        yield
    finally:
        del vae.decode


@pytest.mark.parametrize("model,place", cases(lambda model: PLACES, lambda model, place: place == "the last layer"))
def test_a_sample_is_invalid_and_the_others_keep_their_bits(make_trainer, tmp_path, model, place):
    """In the rollout's draws and in decoding with gradients."""
    trainer, prompt = make_trainer(train=False, **model.run(sample__steps=2)), model.prompt(tmp_path)
    keys = [SampleKey(0, 0, 0, prompt.id, member) for member in range(3)]
    sound = trainer.draw(prompt, keys)
    assert sound.faults() == [None] * 3
    with broken_vae(trainer, place, PLACES[place], lambda row: row == 1):
        drawn = trainer.draw(prompt, keys)
    assert drawn.faults() == [None, DECODING, None]
    assert torch.equal(drawn.media[::2], sound.media[::2]) and not drawn.media[1].any()
    assert torch.equal(drawn.trajectory.latents, sound.trajectory.latents)

    latents = drawn.latents.requires_grad_(True)
    gradients = []
    for hit in (lambda row: False, lambda row: row == 1):
        with broken_vae(trainer, place, PLACES[place], hit):
            pixels = trainer.decode(latents, differentiable=True)
        gradients += torch.autograd.grad(torch.nan_to_num(pixels).square().sum(), latents)
    assert pixels[1].isnan().all() and pixels[::2].isfinite().all()
    assert not gradients[1][1].any() and torch.equal(gradients[1][::2], gradients[0][::2])


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_latents_that_are_not_finite_are_blamed_on_sampling(make_trainer, tmp_path, model):
    trainer, prompt = make_trainer(train=False, **model.run(sample__steps=2)), model.prompt(tmp_path)
    predict = trainer.predict

    def broken(sample, level, conditioning):
        output = predict(sample, level, conditioning).clone()
        output[0].view(-1)[0] = torch.nan
        return output

    trainer.predict = broken
    drawn = trainer.draw_fixed(prompt, [SampleKey(0, 0, 0, prompt.id, member) for member in range(2)])
    assert drawn.faults() == [SAMPLING, None] and not drawn.media[0].any()


def test_norms_of_wans_vae_that_overflow_in_fp16_are_told(make_trainer, tmp_path):
    """They divide by infinity: the pixels are finite, and grey."""
    model = MODELS["wan"]
    trainer = make_trainer(train=False, **model.run(sample__steps=2, sample__frames=1, model__vae_precision="fp16"))
    prompt = model.prompt(tmp_path)
    keys = [SampleKey(0, 0, 0, prompt.id, member) for member in range(2)]
    assert trainer.draw(prompt, keys).faults() == [None] * 2
    layer, seen = trainer.get_module("vae").decoder.norm_out, itertools.count()
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0 + 6e4,) if next(seen) == 0 else None)
    assert trainer.draw(prompt, keys).faults() == [DECODING, None]
