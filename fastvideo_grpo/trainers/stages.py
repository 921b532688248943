"""The stages that stand where FastVideo's denoising and decoding stages stood."""

from __future__ import annotations

from dataclasses import dataclass

from fastvideo.fastvideo_args import FastVideoArgs
from fastvideo.pipelines.pipeline_batch_info import ForwardBatch
from fastvideo.pipelines.stages.base import PipelineStage
from torch import Tensor

from fastvideo_grpo.prompts.embeddings import Conditioning
from fastvideo_grpo.sampling.rollout import Trajectory, Walk, finite_rows, rollout
from fastvideo_grpo.trainers.policy import Policy


@dataclass
class RolloutRequest:
    """What travels through the pipeline in ``batch.extra["rollout"]``: how to sample, and afterwards what was done.

    ``conditioning``: the network's, ``[B, ...]``. ``decode``: make media. The stages fill in what :class:`Drawn` holds.
    """

    walk: Walk
    conditioning: Conditioning
    decode: bool
    latents: Tensor | None = None
    finite: Tensor | None = None
    media: Tensor | None = None
    decoded: Tensor | None = None
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
        request.latents, request.finite = batch.latents.cpu(), finite_rows(batch.latents).cpu()
        return batch


class LeaderDecodingStage(PipelineStage):
    """Decodes by :meth:`Policy.media_of` where media are asked for: one process of a sequence-parallel group is enough.

    FastVideo's own stage clamps before anybody could see what was not finite.
    """

    performance_component_metric = "vae_decode_time_s"

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: ForwardBatch, fastvideo_args: FastVideoArgs) -> ForwardBatch:
        """Fill in the request's media, or leave it."""
        request: RolloutRequest = batch.extra["rollout"]
        if request.decode:
            assert batch.latents is not None
            request.media, request.decoded = self.policy.media_of(batch.latents)
        return batch
