"""The order in which prompts are drawn."""

from __future__ import annotations

from fastvideo_grpo.sampling.noise import generator


class PromptOrder:
    """Every prompt once per epoch, in an order that is a function of (seed, epoch): nothing to save, exact on resume."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed

    def _epoch(self, epoch: int) -> list[int]:
        return [int(i) for i in generator("prompt order", self.seed, epoch).permutation(self.count)]

    def draw(self, iteration: int, prompts: int) -> list[int]:
        """Indices of the ``prompts`` prompts of an iteration; epochs follow each other without a gap."""
        drawn: list[int] = []
        position = iteration * prompts
        while len(drawn) < prompts:
            epoch, offset = divmod(position + len(drawn), self.count)
            drawn += self._epoch(epoch)[offset : offset + prompts - len(drawn)]
        return drawn
