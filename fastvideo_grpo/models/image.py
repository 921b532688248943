"""What families of image models share."""

from __future__ import annotations

from collections.abc import Iterator

from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.family import Family


class ImageFamily(Family):
    """One frame, which is decoded whole."""

    def problems(self, config: Config, facts: ModelFacts) -> Iterator[str]:
        yield from super().problems(config, facts)
        if config.sample.frames != 1:
            yield f"sample.frames is {config.sample.frames}, but {self.kind} makes images; use 1"
        if config.sample.vae_tiling:
            yield f"sample.vae_tiling is true, but {self.kind} decodes images whole; use false"
