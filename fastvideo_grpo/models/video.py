"""What families of video models share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

from fastvideo_grpo.config.keys import Config, SampleConfig
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.family import Family


class VideoFamily(Family):
    """Latents ``(channels, frames, height, width)`` of a causal video VAE, which compresses all frames but the first."""

    @abstractmethod
    def patch(self, facts: ModelFacts) -> tuple[int, int, int]:
        """Latents of a token: frames, height, width."""

    def size_multiple(self, facts: ModelFacts) -> int:
        return facts.spatial_compression * max(self.patch(facts)[1:])

    def latent_shape(self, facts: ModelFacts, sample: SampleConfig) -> tuple[int, ...]:
        ratio = facts.spatial_compression
        frames = (sample.frames - 1) // facts.temporal_compression + 1
        return int(facts.denoiser["in_channels"]), frames, sample.height // ratio, sample.width // ratio

    def image_tokens(self, facts: ModelFacts, sample: SampleConfig) -> int:
        latents = self.latent_shape(facts, sample)[1:]
        return math.prod(size // patch for size, patch in zip(latents, self.patch(facts), strict=True))

    def problems(self, config: Config, facts: ModelFacts) -> Iterator[str]:
        yield from super().problems(config, facts)
        frames, ratio = config.sample.frames, facts.temporal_compression
        if frames % ratio != 1:
            below = max(1, frames - (frames - 1) % ratio)
            yield f"sample.frames is {frames}; it must be {ratio}k + 1 for this model: {below} or {below + ratio}"
