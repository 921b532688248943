"""Online DPO on the steps of a sampler: pairs are the best and worst samples of a group."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fastvideo_grpo.grpo.objectives import terms
from fastvideo_grpo.grpo.objectives.base import Replay, SampleBatch
from fastvideo_grpo.grpo.objectives.checked import positive_number


class DPO:
    """``-log sigmoid(beta ((l_w - l_w_ref) - (l_l - l_l_ref)))`` for winner w and loser l at one timestep; ``l`` is the
    log-prob of the stored transition.

    The loss is DPO's (Rafailov et al. 2023, arXiv:2305.18290); on the single steps of a diffusion sampler it is D3PO's (Yang et
    al. 2023, arXiv:2311.13231), which takes pairs that the policy has drawn, and Diffusion-DPO's (Wallace et al. 2023,
    arXiv:2311.12908) is the same on noised data. Both rows of a pair have its loss, so that the mean over rows is that over
    pairs.

    Args:
        beta: strength of the KL regularisation. Log-probs here are means over dimensions, and an update changes them by some
            1e-4 (what the clip range of the ratio stands for): a beta of 1 would leave the sigmoid at a half for good, where
            nothing holds the policy at its reference. With 5000, Diffusion-DPO's for such means, its argument is 1 when winner
            and loser have moved by 1e-4 in their directions.

    Raises:
        ValueError: beta is not a finite number above 0.
    """

    needs_reference = True
    needs_reward_gradients = False
    pairs = True
    defaults: ClassVar[dict[str, Any]] = {"grpo": {"best_of": {"top": 1, "bottom": 1}, "timesteps": {"per": "group"}}}

    def __init__(self, *, beta: float = 5000.0) -> None:
        self.beta = positive_number("beta", beta)

    def loss(self, replay: Replay, samples: SampleBatch, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Objective`; statistics: ``preferred`` (1 where the policy has moved towards the winner) and ``ratio``."""
        step = replay.step(i)
        moved = terms.log_prob(step) - terms.log_prob(replay.reference(i)).detach()
        margin = moved[0::2] - moved[1::2]
        loss = -functional.logsigmoid(self.beta * margin)
        statistics = {"preferred": per_row((margin.detach() > 0).float()), **terms.ratio(step, samples, i)}
        return per_row(loss), statistics


def per_row(pairs: Tensor) -> Tensor:
    """``[B / 2]`` of pairs -> ``[B]`` of their rows."""
    return torch.repeat_interleave(pairs, 2)
