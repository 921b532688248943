"""The stage that stands where FastVideo's denoising stage stood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fastvideo.fastvideo_args import FastVideoArgs
from fastvideo.pipelines.pipeline_batch_info import ForwardBatch
from fastvideo.pipelines.stages.base import PipelineStage
from torch import Tensor

from fastvideo_grpo.prompts.embeddings import Conditioning
from fastvideo_grpo.sampling.rollout import Trajectory, rollout
from fastvideo_grpo.sampling.schedules import Level, Schedule
from fastvideo_grpo.sampling.transitions import Transition


@dataclass
class RolloutRequest:
    """What travels through the pipeline in ``batch.extra["rollout"]``: how to sample, and afterwards what was done.

    ``noise(i)`` gives the noise of transition i. The stage sets ``finite`` (``[B]``, whether the final latents are) and, when
    ``record`` is true, ``trajectory``.
    """

    schedule: Schedule
    transition: Transition
    noise: Callable[[int], Tensor]
    record: bool
    finite: Tensor | None = None
    trajectory: Trajectory | None = None


class Policy(Protocol):
    """What the stage needs of the trainer it belongs to."""

    def conditioning_of(self, batch: ForwardBatch) -> Conditioning: ...

    def predict(self, sample: Tensor, level: Level, conditioning: Conditioning) -> Tensor: ...


class RolloutStage(PipelineStage):
    """Walks the SDE from ``batch.latents`` to data and writes down what it did."""

    performance_component_metric = "dit_time_s"

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: ForwardBatch, fastvideo_args: FastVideoArgs) -> ForwardBatch:
        """Replace ``batch.latents`` (initial noise) by final latents; fills in the request's trajectory."""
        request: RolloutRequest = batch.extra["rollout"]
        conditioning = self.policy.conditioning_of(batch)
        assert batch.latents is not None
        batch.latents, request.trajectory = rollout(
            lambda sample, level: self.policy.predict(sample, level, conditioning),
            batch.latents,
            request.schedule,
            request.transition,
            request.noise,
            record=request.record,
        )
        request.finite = batch.latents.isfinite().flatten(1).all(1).cpu()
        return batch
