"""Adapters: where they sit, that they alone are trained, and that without them the model is the one it started as."""

import pytest
import torch

from fastvideo_grpo.engines.lora import LoRALinear, lora_disabled
from fastvideo_grpo.models.registry import FAMILIES
from tests.promises.models import MODELS


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_adapters_sit_on_the_attention_projections_and_start_as_the_model(make_trainer, tmp_path, model):
    settings = {"model__lora__rank": 4, "model__lora__alpha": 8.0, "optim__lr": 1e-2}
    trainer = make_trainer(**model.run(**settings, sample__steps=3, run__iterations=1))
    layers = {name: module for name, module in trainer.denoiser.named_modules() if isinstance(module, LoRALinear)}
    assert len(layers) == model.lora_layers
    assert all(name.endswith(FAMILIES[model.kind].lora_targets) for name in layers)
    frozen = {name: p.detach().clone() for name, p in trainer.denoiser.named_parameters() if "lora_" not in name}
    prompt = model.prompt(tmp_path)
    keys = model.keys(prompt, 2)
    before = trainer.draw_fixed(prompt, keys).media
    trainer.train()
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.denoiser.named_parameters() if name in frozen)
    assert all(layer.lora_B.abs().max() > 0 for layer in layers.values())
    with lora_disabled(trainer.denoiser):
        assert torch.equal(trainer.draw_fixed(prompt, keys).media, before)
    assert not torch.equal(trainer.draw_fixed(prompt, keys).media, before)
