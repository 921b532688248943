"""Clean samples with noise, and what a network's output says of them.

Objectives that need no trajectory train the network where it was pretrained: at ``z = alpha x + sigma e``, a clean sample x
and noise e. They are written for flows, in the coordinates ``(1 - t) x + t e`` with the velocity ``e - x`` to be predicted. A
state of any other path is one of a flow after division by ``alpha + sigma``, at ``t = sigma / (alpha + sigma)``: a network that
predicts the noise as ``e'`` says ``x' = (z - sigma e') / alpha``, and its velocity is ``e' - x'``. Derivation: ``z / (alpha +
sigma) = (1 - t) x + t e``, and the velocity ``u`` of a flow has ``x' = z / (alpha + sigma) - t u`` and ``e' = z / (alpha +
sigma) + (1 - t) u``, so that ``u = e' - x'``, whatever the path.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastvideo_grpo.sampling.schedules import Level
from fastvideo_grpo.sampling.transitions import Prediction, per_sample


@dataclass(frozen=True)
class Noised:
    """``clean`` x and ``noise`` e, float32 ``[B, ...]`` on the device, at a ``level`` each."""

    clean: Tensor
    noise: Tensor
    level: Level
    prediction: Prediction

    @property
    def sample(self) -> Tensor:
        """``alpha x + sigma e``: what the network is shown, float32 ``[B, ...]``."""
        alpha, sigma = self._on_path()
        return alpha * self.clean + sigma * self.noise

    @property
    def time(self) -> Tensor:
        """The flow's time t, float32 ``[B, 1, ...]`` to be multiplied by states."""
        alpha, sigma = self._on_path()
        return sigma if self.prediction == "velocity" else sigma / (alpha + sigma)

    @property
    def state(self) -> Tensor:
        """``(1 - t) x + t e``, float32 ``[B, ...]``."""
        if self.prediction == "velocity":
            return self.sample
        alpha, sigma = self._on_path()
        return self.sample / (alpha + sigma)

    @property
    def target(self) -> Tensor:
        """The velocity to be predicted, ``e - x``, float32 ``[B, ...]``."""
        return self.noise - self.clean

    def velocity(self, output: Tensor) -> Tensor:
        """What a network's output there says the velocity is, float32 ``[B, ...]``."""
        output = output.float()
        if self.prediction == "velocity":
            return output
        alpha, sigma = self._on_path()
        return output - (self.sample - sigma * output) / alpha

    def _on_path(self) -> tuple[Tensor, Tensor]:
        return per_sample(self.level.alpha, self.clean), per_sample(self.level.sigma, self.clean)
