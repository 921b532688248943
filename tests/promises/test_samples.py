"""Promise 3 on one process: samples are functions of seed, prompt and member, however they are batched."""

import pytest
import torch

from fastvideo_grpo.sampling.noise import SampleKey
from tests.promises.models import cases
from tests.trainer import runs


@pytest.mark.parametrize(
    "model,initial", cases(lambda model: ("shared", "per_sample"), lambda model, case: case == "shared" or model.kind == "flux")
)
def test_the_same_samples_at_every_micro_batch_size(make_trainer, tmp_path, model, initial):
    """States, log-probs and pixels."""
    trainer = make_trainer(train=False, **model.run(sample__cfg_scale=1.0, sample__steps=3, sample__init_noise=initial))
    prompt = model.prompt(tmp_path)
    keys = [SampleKey(0, 3, 1, prompt.id, member) for member in range(4)]
    drawn = {size: [trainer.draw(prompt, keys[i : i + size]) for i in range(0, 4, size)] for size in (1, 2, 4)}

    def together(size, of):
        return torch.cat([of(part) for part in drawn[size]])

    for of in (lambda d: d.trajectory.latents, lambda d: d.trajectory.log_probs, lambda d: d.latents):
        for size in (2, 4):
            torch.testing.assert_close(together(size, of), together(1, of), rtol=0, atol=1e-5)
    media = {size: together(size, lambda d: d.media).int() for size in drawn}
    assert max((media[size] - media[1]).abs().max() for size in (2, 4)) <= 1
    # Samples of one prompt differ by the noise of the steps, and by the initial noise where it is not shared.
    first = together(1, lambda d: d.trajectory.latents)
    assert all(not torch.equal(first[i, -1], first[j, -1]) for i in range(4) for j in range(i))
    assert torch.equal(first[0, 0], first[1, 0]) == (initial == "shared")


@pytest.mark.parametrize("model,case", cases(lambda model: ("a run",), lambda model, case: model.kind == "flux"))
def test_the_same_run_at_every_micro_batch_size(make_trainer, tmp_path, model, case):
    """Same samples, same weights to rounding.

    Other batch shapes round differently, and AdamW divides a gradient that is nothing but rounding by its own size: of
    480,000 weights a handful may move by a learning rate in another direction, all others agree to 1e-6.
    """
    results = {}
    # No ratio is clipped: one at the edge would be in one run and not in another (Stable Diffusion's last update on an Intel
    # Xeon: 9 % of a gradient).
    common = {"sample__cfg_scale": 1.0, "grpo__updates_per_iteration": 2, "grpo__clip_range": 0.5}
    for size in (1, 2, 4):
        settings = model.run(**common, engine__micro_batch_size=size, run__dir=tmp_path / f"run{size}")
        trainer = make_trainer(**settings)
        trainer.train()
        results[size] = trainer.engine.state_dict(), trainer.run.log.read()
    for size in (2, 4):
        weights, lines = results[size]
        differences = torch.cat([(w - results[1][0][name]).abs().flatten() for name, w in weights.items()])
        assert (differences > 1e-6).double().mean() < 1e-4 and differences.max() < 6 * 2 * 1e-5
        for ours, one in zip(lines, results[1][1], strict=True):
            expected = one["reward/pixels/brightness/mean"]
            assert ours["reward/pixels/brightness/mean"] == pytest.approx(expected, abs=1e-3)
    assert runs.largest_difference(results[2][0], results[4][0]) > 0  # or the batches were the same
