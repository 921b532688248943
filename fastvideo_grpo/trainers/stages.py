"""The stages that stand where FastVideo's denoising and decoding stages stood."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fastvideo.fastvideo_args import FastVideoArgs
from fastvideo.pipelines.pipeline_batch_info import ForwardBatch
from fastvideo.pipelines.stages.base import PipelineStage
from torch import Tensor

from fastvideo_grpo.prompts.embeddings import Conditioning
from fastvideo_grpo.sampling.rollout import Trajectory, Walk, finite_samples, rollout
from fastvideo_grpo.trainers.policy import Policy


@dataclass
class RolloutRequest:
    """What travels through the pipeline in ``batch.extra["rollout"]``: how to sample, and afterwards what was done.

    ``conditioning``: the network's, ``[B, ...]``. ``decode``: make media. The stages set ``finite`` (``[B]``, whether the final
    latents are) and, when the walk records, ``trajectory``.
    """

    walk: Walk
    conditioning: Conditioning
    decode: bool
    finite: Tensor | None = None
    trajectory: Trajectory | None = None


class RolloutStage(PipelineStage):
    """Walks the SDE from ``batch.latents`` to data and writes down what it did."""

    performance_component_metric = "dit_time_s"

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: ForwardBatch, fastvideo_args: FastVideoArgs) -> ForwardBatch:
        """Replace ``batch.latents`` (initial noise) by final latents; fills in the request's trajectory."""
        request: RolloutRequest = batch.extra["rollout"]
        assert batch.latents is not None
        batch.latents, request.trajectory = rollout(
            lambda sample, level: self.policy.predict(sample, level, request.conditioning),
            batch.latents,
            request.walk,
        )
        request.finite = finite_samples(batch.latents)
        return batch


class LeaderDecodingStage(PipelineStage):
    """FastVideo's decoding stage where media are asked for: one process of a sequence-parallel group is enough.

    Args:
        stage: FastVideo's.
        on_device: the context in which the VAE is on the device.
    """

    performance_component_metric = "vae_decode_time_s"

    def __init__(self, stage: PipelineStage, on_device: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.stage = stage
        self.on_device = on_device

    def forward(self, batch: ForwardBatch, fastvideo_args: FastVideoArgs) -> ForwardBatch:
        """Set ``batch.output`` to float ``[B, 3, F, H, W]`` in [0, 1], or leave it."""
        if batch.extra["rollout"].decode:
            with self.on_device():
                batch = self.stage.forward(batch, fastvideo_args)
        return batch
