"""The estimate of memory against what real models hold."""

import torch

from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.planning import memory, plan
from fastvideo_grpo.tracking.statistics import Clock
from tests.trainer import runs


def test_trajectories_take_what_was_estimated(make_trainer, tmp_path):
    for group in (4, 8):
        trainer = make_trainer(**runs.HUNYUAN_T2V, grpo__group_size=group, run__dir=tmp_path / str(group))
        facts = model_facts(trainer.config)
        planned = memory.estimate(trainer.config, facts, 1, plan.count_parameters(trainer.config, facts))
        drawn = trainer.rollout(0, trainer.run.prompts[:4], Clock())
        assert sum(t.nbytes for t in drawn.trajectories.values() if t.ndim > 1) == planned.host["trajectories"]
        assert all(t.device.type == "cpu" and t.dtype == torch.float32 for t in drawn.trajectories.values())
        trainer.close()
