"""Advantages: rewards in comparison with those of other samples (``grpo.normalisation``), step 4 of Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Advantages:
    """``values`` float32 ``[P, G]`` (0 where invalid), ``valid`` bool ``[P, G]``, ``zero_spread`` bool ``[P]``.

    ``zero_spread``: groups that teach nothing, because no reward tells apart what their valid samples are compared with (in
    GRPO each other).
    """

    values: Tensor
    valid: Tensor
    zero_spread: Tensor


class Normalisation(Protocol):
    """Rewards to advantages. What it remembers is state of the run, the same on all ranks."""

    def advantages(
        self,
        rewards: Mapping[str, Tensor],
        valid: Mapping[str, Tensor],
        weights: Mapping[str, float],
        prompts: Sequence[str],
    ) -> Advantages:
        """The advantages of an iteration.

        Args:
            rewards: name -> ``[P, G]``, P groups of G samples.
            valid: name -> bool ``[P, G]``; non-finite rewards count as invalid whatever it says. A sample counts only if
                every reward of nonzero weight scored it.
            weights: name -> weight; advantages are added, not rewards.
            prompts: the id of each group's prompt.

        Raises:
            ValueError: no reward has a nonzero weight.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What it remembers, for JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`, exactly."""
        ...


def group_advantages(rewards: Mapping[str, Tensor], valid: Mapping[str, Tensor], weights: Mapping[str, float]) -> Advantages:
    """``A_i = sum_k w_k (r_i^k - mean_k) / std_k`` with mean and unbiased std over the valid samples of the group.

    A reward with max == min over a group (a group of one included) adds 0 there: dividing rounding errors by their own
    spread would invent a preference. Arguments and errors: :class:`Normalisation`.
    """
    ok = _counted(rewards, valid, weights)
    return _standard_scores(rewards, ok, weights, lambda name, group: rewards[name][group][ok[group]])


def global_advantages(rewards: Mapping[str, Tensor], valid: Mapping[str, Tensor], weights: Mapping[str, float]) -> Advantages:
    """Like :func:`group_advantages`, with mean and unbiased std over all valid samples of the iteration."""
    ok = _counted(rewards, valid, weights)
    return _standard_scores(rewards, ok, weights, lambda name, group: rewards[name][ok])


def mixed_advantages(rewards: Mapping[str, Tensor], valid: Mapping[str, Tensor], weights: Mapping[str, float]) -> Advantages:
    """Like :func:`group_advantages`, with the mean of the group and the unbiased std of all valid samples of the iteration, as
    Flow-GRPO's and later recipes have it (``global_std``): a group that rewards hardly tell apart teaches little."""
    ok = _counted(rewards, valid, weights)
    return _standard_scores(
        rewards, ok, weights, lambda name, group: rewards[name][group][ok[group]], spread=lambda name: rewards[name][ok]
    )


class PromptHistory:
    """DDPO's normalisation per prompt (Black et al. 2023, arXiv:2305.13301): mean and std of the prompt's last rewards.

    A prompt's buffer of each reward holds its last ``size`` valid scores, those of this iteration included. As long as it
    holds fewer than ``minimum``, the prompt is normalised with the statistics of the whole iteration. (The std is unbiased
    and no constant is added to it, as everywhere here; a buffer without spread gives advantage 0.)

    Args:
        size: scores of a prompt that are remembered.
        minimum: how many a prompt must have for statistics of its own.
    """

    def __init__(self, size: int, minimum: int) -> None:
        self.size = size
        self.minimum = minimum
        self.scores: dict[str, dict[str, list[float]]] = {}  # reward -> prompt -> scores, the oldest first

    def advantages(
        self,
        rewards: Mapping[str, Tensor],
        valid: Mapping[str, Tensor],
        weights: Mapping[str, float],
        prompts: Sequence[str],
    ) -> Advantages:
        """See :class:`Normalisation`."""
        ok = _counted(rewards, valid, weights)
        for name in _used(rewards, weights):
            of_prompt = self.scores.setdefault(name, {})
            for group, prompt in enumerate(prompts):
                new = rewards[name][group][ok[group]].tolist()
                if new:
                    of_prompt[prompt] = [*of_prompt.get(prompt, []), *new][-self.size :]

        def compared(name: str, group: int) -> Tensor:
            known = self.scores[name].get(prompts[group], [])
            return rewards[name][ok] if len(known) < self.minimum else torch.tensor(known, dtype=torch.float64)

        return _standard_scores(rewards, ok, weights, compared)

    def state(self) -> dict[str, Any]:
        """See :class:`Normalisation`."""
        return {name: {prompt: list(scores) for prompt, scores in known.items()} for name, known in self.scores.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See :class:`Normalisation`."""
        self.scores = {name: {prompt: list(scores) for prompt, scores in known.items()} for name, known in state.items()}


class _Stateless:
    """A normalisation that remembers nothing."""

    def __init__(self, function: Callable[..., Advantages]) -> None:
        self.function = function

    def advantages(
        self,
        rewards: Mapping[str, Tensor],
        valid: Mapping[str, Tensor],
        weights: Mapping[str, float],
        prompts: Sequence[str],
    ) -> Advantages:
        """See :class:`Normalisation`."""
        return self.function(rewards, valid, weights)

    def state(self) -> dict[str, Any]:
        """See :class:`Normalisation`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See :class:`Normalisation`."""
        if state:
            raise ValueError(f"this normalisation remembers nothing, but was given the scores of {', '.join(state)}")


NORMALISATIONS = ("group", "global", "prompt_history", "global_std")


def get(name: str, *, history_size: int, history_minimum: int) -> Normalisation:
    """The normalisation called ``name``; the rest is for ``prompt_history``.

    Raises:
        ValueError: an unknown name.
    """
    if name == "group":
        return _Stateless(group_advantages)
    if name == "global":
        return _Stateless(global_advantages)
    if name == "global_std":
        return _Stateless(mixed_advantages)
    if name == "prompt_history":
        return PromptHistory(history_size, history_minimum)
    raise ValueError(f"unknown normalisation {name!r}; known: {', '.join(NORMALISATIONS)}")


def _used(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> list[str]:
    return [name for name in rewards if weights[name] != 0]


def _counted(rewards: Mapping[str, Tensor], valid: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Which samples count, bool ``[P, G]``."""
    used = _used(rewards, weights)
    if not used:
        raise ValueError(f"at least one reward needs a nonzero weight; got {dict(weights)}")
    ok = torch.ones(rewards[used[0]].shape, dtype=torch.bool)
    for name in used:
        ok &= valid[name].bool() & rewards[name].isfinite()
    return ok


def _standard_scores(
    rewards: Mapping[str, Tensor],
    ok: Tensor,
    weights: Mapping[str, float],
    compared: Callable[[str, int], Tensor],
    spread: Callable[[str], Tensor] | None = None,
) -> Advantages:
    """Advantages, where ``compared(reward, group)`` are the scores whose mean and std a group is measured by;
    ``spread(reward)``: those whose std it is measured by instead."""
    total = torch.zeros(ok.shape, dtype=torch.float64)
    told_apart = torch.zeros(len(ok), dtype=torch.bool)
    for name in _used(rewards, weights):
        reward = rewards[name].double()
        for group in range(len(ok)):
            values, others = reward[group][ok[group]], compared(name, group).double()
            if len(values) == 0 or len(others) < 2 or others.max() == others.min():
                continue
            told_apart[group] = True
            std = others.std() if spread is None else spread(name).double().std()
            total[group][ok[group]] += weights[name] * (values - others.mean()) / std
    return Advantages(total.float(), ok, ~told_apart)
