"""Which samples of a group are trained on, and in which micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def best_of(advantages: Tensor, valid: Tensor, top: int, bottom: int) -> list[int]:
    """Members of one group to train on: the ``top`` best and ``bottom`` worst of the valid ones, in member order.

    Ties go to the earlier member. A group with fewer valid samples gives all of them, each once.

    Args:
        advantages, valid: ``[G]``.
    """
    order = [i for i in torch.argsort(advantages, descending=True, stable=True).tolist() if valid[i]]
    if len(order) > top + bottom:
        order = order[:top] + order[len(order) - bottom :]
    return sorted(order)


def pairs(advantages: Tensor, valid: Tensor, count: int) -> list[int]:
    """Members of one group as pairs of a better and a worse sample, ``[winner, loser, winner, loser, ...]``: the best of the
    valid ones beside the worst, the second best beside the second worst, up to ``count`` pairs.

    Each member is in one pair at most, so that fewer valid samples give fewer pairs. Samples of equal advantage are no pair:
    nothing says which of them is better.

    Args:
        advantages, valid: ``[G]``.
    """
    order = [i for i in torch.argsort(advantages, descending=True, stable=True).tolist() if valid[i]]
    chosen = []
    for winner, loser in zip(order[: min(count, len(order) // 2)], reversed(order), strict=False):
        if advantages[winner] > advantages[loser]:
            chosen += [winner, loser]
    return chosen


@dataclass(frozen=True)
class Row:
    """One row of an update micro-batch: a member of the group, and whether it counts (0 for rows that only fill)."""

    member: int
    weight: float


MicroBatch = list[Row]
"""Rows of one group that an update passes through the network together."""


def regroup(members: list[int], slots: int, micro_batch_size: int) -> list[MicroBatch]:
    """Rows of one group, in the order of ``members``, in micro-batches of the rollout's shape:
    ``ceil(slots / micro_batch_size)`` of them, always.

    The batch shape must be the rollout's (log-probs differ by 2e-7 between batch shapes), and the count must not depend on
    how many samples were masked (every rank runs the same number of forwards), so missing rows repeat a member with
    weight 0.
    """
    count = -(-slots // micro_batch_size)
    rows = [Row(member, 1.0) for member in members[:slots]]
    filler = members[0] if members else 0
    rows += [Row(filler, 0.0)] * (count * micro_batch_size - len(rows))
    return [rows[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(count)]
