"""Group-relative advantages, step 4 of Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Advantages:
    """``values`` float32 ``[P, G]`` (0 where invalid), ``valid`` bool ``[P, G]``, ``zero_spread`` bool ``[P]``.

    ``zero_spread``: groups that teach nothing, because no reward tells their valid samples apart.
    """

    values: Tensor
    valid: Tensor
    zero_spread: Tensor


def group_advantages(rewards: Mapping[str, Tensor], valid: Mapping[str, Tensor], weights: Mapping[str, float]) -> Advantages:
    """``A_i = sum_k w_k (r_i^k - mean_k) / std_k`` with mean and unbiased std over the valid samples of the group.

    A sample counts only if every reward of nonzero weight scored it. A reward with max == min over a group (a group of
    one included) adds 0 there: dividing rounding errors by their own spread would invent a preference.

    Args:
        rewards: name -> ``[P, G]``, P groups of G samples.
        valid: name -> bool ``[P, G]``; non-finite rewards count as invalid whatever it says.
        weights: name -> weight; advantages are added, not rewards.

    Raises:
        ValueError: no reward has a nonzero weight.
    """
    used = [name for name in rewards if weights[name] != 0]
    if not used:
        raise ValueError(f"at least one reward needs a nonzero weight; got {dict(weights)}")
    shape = rewards[used[0]].shape
    ok = torch.ones(shape, dtype=torch.bool)
    for name in used:
        ok &= valid[name].bool() & rewards[name].isfinite()
    total = torch.zeros(shape, dtype=torch.float64)
    told_apart = torch.zeros(shape[0], dtype=torch.bool)
    for name in used:
        reward = rewards[name].double()
        for group in range(shape[0]):
            values = reward[group][ok[group]]
            if len(values) < 2 or values.max() == values.min():
                continue
            told_apart[group] = True
            total[group][ok[group]] += weights[name] * (values - values.mean()) / values.std()
    return Advantages(total.float(), ok, ~told_apart)
