"""What every model's tests ask of a trainer, whatever the model; facts of a model are arguments."""

import torch

from fastvideo_grpo.sampling import noise
from fastvideo_grpo.trainers.conditioning import split_guidance


def keys_of(prompt, count):
    """Of samples with noise of their own."""
    return [noise.SampleKey(0, 0, 0, prompt.id, member) for member in range(count)]


def assert_draws(trainer, prompt, latents, pixels, micro_batches=(1, 2, 4)):
    """Promise 2: at noise level 0 the samples of ``keys_of`` are these of diffusers, however they are batched.

    latents: as the sampler ends with them. pixels: float ``[B, F, H, W, 3]`` in [0, 1].
    """
    keys, caught = keys_of(prompt, len(latents)), []
    stage = trainer.denoising_stage.forward
    trainer.denoising_stage.forward = lambda batch, args: caught.append(stage(batch, args).latents) or batch
    for size in micro_batches:
        caught.clear()
        drawn = [trainer.draw(prompt, keys[i : i + size], deterministic=True) for i in range(0, len(keys), size)]
        torch.testing.assert_close(torch.cat(caught), latents, rtol=1e-5, atol=1e-5)
        # The media are those pixels, rounded to 8 bits once.
        assert (torch.cat([part.media for part in drawn]).float() - pixels * 255).abs().max() <= 0.5 + 1e-2
    assert pixels.std() > 0.01  # a constant picture would agree with anything


def assert_decodes_with_gradients(trainer, latents, pixels):
    """Decoding for rewards with gradients gives these pixels of diffusers, too."""
    latents = latents.clone().requires_grad_(True)
    ours = trainer.decode(latents, differentiable=True)
    torch.testing.assert_close(ours.detach(), pixels, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours.sum(), latents)
    assert gradient.abs().sum() > 0


def assert_ratio_one(trainer):
    """Promise 1, bitwise in float32: every ratio is 1 before the first optimiser step of an iteration. Trains the trainer."""
    updates = trainer.config.grpo.updates_per_iteration
    trainer.train()
    for line in trainer.log.read():
        assert line["train/ratio_first_update_max_dev"] == 0.0
        assert line["train/updates"] == updates and line["train/skipped_updates"] == 0
        if updates > 1:
            assert line["train/ratio_max_dev"] > 0.0


def assert_gradients_through_both_passes(trainer, prompt):
    """Guidance against u + w (c - u) written out, each output from a pass of its own: its gradient is (1 - w) du + w dc."""
    network, scale = trainer.denoiser, trainer.config.sample.cfg_scale
    conditioning = trainer.conditioning(prompt, 2)
    sample = torch.randn(2, *trainer.latent_shape(), generator=torch.Generator().manual_seed(0))
    towards = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
    level = trainer.schedule.at(torch.tensor([0, 2]))
    positive, negative = split_guidance(conditioning)

    def gradients(output):
        return [g.double() for g in torch.autograd.grad((output * towards).sum(), list(network.parameters()))]

    with trainer.forward_context(conditioning):
        output = trainer.predict(sample, level, conditioning)
        ours = gradients(output)
    with trainer.forward_context():
        conditional, unconditional = (trainer.network_output(sample, level, part) for part in (positive, negative))
        torch.testing.assert_close(output, unconditional + scale * (conditional - unconditional), rtol=1e-5, atol=1e-5)
        apart = gradients(conditional), gradients(unconditional)
    by_hand = [scale * c + (1 - scale) * u for c, u in zip(*apart, strict=True)]
    largest = max(g.abs().max() for g in by_hand)
    for found, expected in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * largest)
    only_conditional = [scale * c for c in apart[0]]
    assert max((a - b).abs().max() for a, b in zip(ours, only_conditional, strict=True)) > 0.01 * largest


def assert_trains_the_same_weights(trainers):
    """Two trainers, each trained for one iteration, end with the weights of one, to rounding."""
    trained = []
    for trainer in trainers:
        trainer.train()
        trained.append(dict(trainer.engine.state_dict()))
    first, second = trained
    # AdamW's first step is the learning rate (1e-5) for all but gradients that are rounding.
    different = torch.cat([(first[n] - second[n]).abs().flatten() > 1e-6 for n in first])
    assert different.double().mean() < 1e-3
