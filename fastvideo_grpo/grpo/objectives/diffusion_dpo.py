"""Online Diffusion-DPO: pairs of a group's best and worst samples, compared with noise (arXiv:2311.12908)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from fastvideo_grpo.grpo.objectives import terms
from fastvideo_grpo.grpo.objectives.base import CleanReplay, SampleBatch
from fastvideo_grpo.grpo.objectives.checked import positive_number
from fastvideo_grpo.grpo.objectives.dpo import per_row


class DiffusionDPO:
    """``-log sigmoid(beta / 2 ((m_w_ref - m_w) - (m_l_ref - m_l)))`` for winner w and loser l with the same noise at the same
    level, ``m = mean((u - (e - x))^2)`` (Wallace et al. 2023). Both rows of a pair have its loss.

    Args:
        beta: strength of the regularisation; 5000 and 2000 are the paper's.

    Raises:
        ValueError: beta is not a finite number above 0.
    """

    clean = True
    needs_reference = True
    needs_reward_gradients = False
    pairs = True
    defaults: ClassVar[dict[str, Any]] = {
        "sample": {"init_noise": "per_sample", "stochastic": {"steps": "none"}},
        "grpo": {"best_of": {"top": 1, "bottom": 1}, "timesteps": {"per": "group"}},
    }

    def __init__(self, *, beta: float = 5000.0) -> None:
        self.beta = positive_number("beta", beta)

    def loss(self, replay: CleanReplay, samples: SampleBatch, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Objective`; statistics: ``preferred`` (1 where the policy has moved towards the winner)."""
        target = replay.noised(i).target
        moved = terms.error(replay.reference(i), target) - terms.error(replay.velocity(i), target)
        margin = moved[0::2] - moved[1::2]
        loss = -functional.logsigmoid(0.5 * self.beta * margin)
        return per_row(loss), {"preferred": per_row((margin.detach() > 0).float())}
