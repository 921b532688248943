"""The estimate of memory against what real models hold."""

import pytest
import torch

from fastvideo_grpo import families, memory, plan
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.tracking.statistics import Clock
from tests.trainer import runs
from tests.trainer.memory import kept_for_backward

LARGE = {"sample__height": 96, "sample__width": 96}
MODELS = {
    "FLUX": {},
    "HunyuanVideo": {**runs.HUNYUAN_T2V, **LARGE},
    "guidance": {**runs.HUNYUAN_T2V, **LARGE, "sample__cfg_scale": 5.0},
    "guidance in one pass": {**runs.HUNYUAN_T2V, **LARGE, "sample__cfg_scale": 5.0, "model__cfg_batched": True},
    "Wan": {**runs.WAN_T2V, **LARGE, "prompts__text_length": 64},
    "Wan, no guidance": {**runs.WAN_T2V, **LARGE, "sample__cfg_scale": 1.0},
}


@pytest.mark.parametrize("model", MODELS)
def test_activations_are_those_that_blocks_keep(make_trainer, model):
    """Counted in a forward, tensor by tensor."""
    trainer = make_trainer(train=False, **MODELS[model])
    config = trainer.config
    facts = families.model_facts(config)
    batch = config.engine.micro_batch_size
    initial = trainer.pack(torch.randn(batch, *trainer.latent_shape()))
    conditioning = trainer.conditioning(Prompt("0", runs.PROMPTS[0]), batch)
    # The estimate counts all of prompts.text_length; HunyuanVideo is shown the prompt's own tokens.
    config.prompts.text_length = max(t.shape[1] for n, t in conditioning.items() if n.endswith("encoder_hidden_states"))
    counted = kept_for_backward(trainer, conditioning, initial, trainer.schedule.at(torch.zeros(batch, dtype=torch.long)))
    assert memory._kept_bytes(config, facts) == pytest.approx(counted, rel=0.1)


def test_trajectories_take_what_was_estimated(make_trainer, tmp_path):
    for group in (4, 8):
        trainer = make_trainer(**runs.HUNYUAN_T2V, grpo__group_size=group, run__dir=tmp_path / str(group))
        facts = families.model_facts(trainer.config)
        planned = memory.estimate(trainer.config, facts, 1, plan.count_parameters(trainer.config, facts))
        drawn = trainer.rollout(0, trainer.prompts[:4], Clock())
        assert sum(t.nbytes for t in drawn.latents.values()) == planned.host["trajectories"]
        assert all(t.device.type == "cpu" and t.dtype == torch.float32 for t in drawn.latents.values())
        trainer.close()
