"""What only a GPU shows. Everywhere else these are skipped, and say so."""

import pytest


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True])
def test_ratio_is_one_in_bf16_on_a_gpu(make_trainer, lora):
    trainer = make_trainer(model__precision="bf16", **({"model__lora__rank": 4} if lora else {}))
    assert next(trainer.denoiser.parameters()).is_cuda
    trainer.train()
    assert max(line["train/ratio_first_update_max_dev"] for line in trainer.run.log.read()) <= 1e-6
    assert all(line["memory/device_peak_gib"] > 0 for line in trainer.run.log.read())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ratio_is_one_on_a_gpu_for_samples_that_leave_their_rows(make_trainer, precision):
    """Of two micro-batches of 3 the first samples are masked, and 3 of the 4 others trained on in one."""
    trainer = make_trainer(
        model__precision=precision,
        engine__micro_batch_size=3,
        grpo__group_size=6,
        grpo__best_of__top=1,
        grpo__best_of__bottom=2,
        rewards__models__pixels__kind="test_first_masked",
        rewards__max_invalid_fraction=0.5,
    )
    trainer.train()
    assert max(line["train/ratio_first_update_max_dev"] for line in trainer.run.log.read()) <= 1e-6
