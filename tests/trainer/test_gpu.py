"""What only a GPU shows. Everywhere else these are skipped, and say so."""

import pytest


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True])
def test_ratio_is_one_in_bf16_on_a_gpu(make_trainer, lora):
    trainer = make_trainer(model__precision="bf16", **({"model__lora__rank": 4} if lora else {}))
    assert next(trainer.denoiser.parameters()).is_cuda
    trainer.train()
    assert max(line["train/ratio_first_update_max_dev"] for line in trainer.log.read()) <= 1e-6
    assert all(line["memory/device_peak_gib"] > 0 for line in trainer.log.read())
