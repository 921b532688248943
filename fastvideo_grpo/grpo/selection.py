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
    """Rows of one group in micro-batches of the rollout's shape: ``ceil(slots / micro_batch_size)`` of them, always.

    The batch shape must be the rollout's (log-probs differ by 2e-7 between batch shapes), and the count must not depend on
    how many samples were masked (every rank runs the same number of forwards), so missing rows repeat a member with
    weight 0.

    Each member has the row that it had in the rollout (``member % micro_batch_size``), in the micro-batch that it had if that
    is one of these: kernels may round differently in another row. Only those of which more share a row than there are
    micro-batches stand elsewhere (:attr:`~fastvideo_grpo.grpo.dealing.Dealing.moves_rows` says whether that can be).
    """
    batches: list[list[Row | None]] = _empty(slots, micro_batch_size)
    moved = []
    for member in sorted(members[:slots]):
        own, row = divmod(member, micro_batch_size)
        free = [k for k, batch in enumerate(batches) if batch[row] is None]
        if free:
            batches[own if own in free else free[0]][row] = Row(member, 1.0)
        else:
            moved.append(member)
    for member in moved:
        batch = next(batch for batch in batches if None in batch)
        batch[batch.index(None)] = Row(member, 1.0)
    return _filled(batches, members)


def regroup_pairs(members: list[int], slots: int, micro_batch_size: int) -> list[MicroBatch]:
    """Like :func:`regroup`, with the two of each pair beside each other, in the order of ``members``
    (``[winner, loser, ...]``)."""
    batches: list[list[Row | None]] = _empty(slots, micro_batch_size)
    for at, member in enumerate(members[:slots]):
        batches[at // micro_batch_size][at % micro_batch_size] = Row(member, 1.0)
    return _filled(batches, members)


def _empty(slots: int, micro_batch_size: int) -> list[list[Row | None]]:
    return [[None] * micro_batch_size for _ in range(-(-slots // micro_batch_size))]


def _filled(batches: list[list[Row | None]], members: list[int]) -> list[MicroBatch]:
    """With a member of the same micro-batch in rows that are missing, or of another one where it has none: its trajectory is
    there already."""
    some = members[0] if members else 0
    filled = []
    for batch in batches:
        filler = Row(next((row.member for row in batch if row is not None), some), 0.0)
        filled.append([filler if row is None else row for row in batch])
    return filled
