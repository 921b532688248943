"""Classifier-free guidance is part of the policy: its gradient goes through both passes (SPEC section 2)."""

import pytest
import torch

from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.trainers.conditioning import NEGATIVE, negative_of, split_guidance
from tests.promises.models import GUIDANCE, MODELS, cases

CASES = {
    "in two passes": GUIDANCE["guidance in two passes"],
    "in one pass": GUIDANCE["guidance in one pass"],
    "in one pass, full checkpointing": GUIDANCE["guidance in one pass"],
    "in two passes, of the prompt's alone": {**GUIDANCE["guidance in two passes"], "grpo__cfg_gradients": "conditional"},
    "in one pass, of the prompt's alone": {**GUIDANCE["guidance in one pass"], "grpo__cfg_gradients": "conditional"},
}


@pytest.mark.parametrize("model,case", cases(lambda model: CASES, lambda model, case: True))
def test_the_gradient_is_that_of_the_formula_written_out(make_trainer, tmp_path, model, case):
    """u + w (c - u), each from a pass of its own: (1 - w) du + w dc, or w dc where only the prompt's pass is trained."""
    trainer, prompt = make_trainer(train=False, **model.run(**CASES[case])), model.prompt(tmp_path)
    network, scale = trainer.denoiser, trainer.config.sample.cfg_scale
    conditioning = trainer.conditioning(prompt, 2)
    parts = split_guidance(conditioning)
    sample = trainer.pack(torch.randn(2, *trainer.latent_shape(), generator=torch.Generator().manual_seed(0)))
    towards = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
    level = trainer.schedule.at(torch.tensor([0, 2]))

    def gradients(output):
        return [g.double() for g in torch.autograd.grad((output * towards).sum(), list(network.parameters()))]

    with trainer.forward_context():
        conditional, unconditional = (trainer.network_output(sample, level, part) for part in parts)
        expected = unconditional + scale * (conditional - unconditional)
        apart = gradients(conditional), gradients(unconditional)
    if "checkpointing" in case:
        trainer.checkpoint_activations(1)
    with trainer.forward_context(conditioning):
        output = trainer.predict(sample, level, conditioning)
        ours = gradients(output)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    share = 0.0 if "alone" in case else 1 - scale
    by_hand = [scale * c + share * u for c, u in zip(*apart, strict=True)]
    largest = max(g.abs().max() for g in by_hand)
    for found, exact in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5 * largest)
    other = [scale * c + (1 - scale - share) * u for c, u in zip(*apart, strict=True)]  # of the other choice
    assert max((a - b).abs().max() for a, b in zip(ours, other, strict=True)) > 0.01 * largest


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_one_pass_with_recomputed_blocks_trains_the_weights_that_two_passes_do(make_trainer, tmp_path, model):
    """Recomputed blocks see the mask, too."""
    ways = {
        "two passes": GUIDANCE["guidance in two passes"],
        "one pass": {**GUIDANCE["guidance in one pass"], "engine__activation_checkpointing": "full"},
    }
    common = {"sample__steps": 3, "run__iterations": 1, "grpo__updates_per_iteration": 1}
    weights = []
    for name, way in ways.items():
        trainer = make_trainer(**model.run(**common, **way, run__dir=tmp_path / name))
        trainer.train()
        weights.append({n.replace("_checkpoint_wrapped_module.", ""): w for n, w in trainer.engine.state_dict().items()})
    two, one = weights
    # AdamW's first step is the learning rate (1e-5) for all but gradients that are rounding.
    different = torch.cat([(two[name] - one[name]).abs().flatten() > 1e-6 for name in two])
    assert different.double().mean() < 1e-3


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_prompt_takes_its_own_negative_one_or_the_runs(make_trainer, tmp_path, model):
    """And nothing of one where guidance is off."""
    off = make_trainer(train=False, **model.run(**GUIDANCE["no guidance"]))
    prompt = model.prompt(tmp_path)
    assert not [name for name in off.conditioning(prompt, 1) if name.startswith(NEGATIVE)]
    settings = model.run(**GUIDANCE["guidance in one pass"], sample__negative_prompt="a cat")
    trainer = make_trainer(train=False, **settings)
    plain = Prompt("plain", prompt.text, image=prompt.image)
    assert (negative_of(prompt, trainer.config).text, negative_of(plain, trainer.config).text) == ("blurry, a dog", "a cat")
    ours, its = (split_guidance(trainer.conditioning(p, 1))[1]["encoder_hidden_states"] for p in (prompt, plain))
    assert ours.shape != its.shape or not torch.equal(ours, its)
    (cat,) = trainer.encode([Prompt("cat", "a cat")])
    assert torch.equal(its, cat["encoder_hidden_states"]) and "image_latents" not in cat
    keys = model.keys(plain, 2)
    assert not torch.equal(trainer.draw(plain, keys).media, off.draw(plain, keys).media)
