"""Which process does what: the samples of an iteration cut into micro-batches, and those dealt to data-parallel ranks.

What makes up an update is fixed by the prompts alone, before anything is dealt, so that no number depends on the number of
ranks; and every rank gets the same number of micro-batches, so that all of them meet in every collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Dealing:
    """An iteration of ``prompts`` groups of ``group_size`` samples, of which ``slots`` are trained on.

    ``updates`` optimiser steps take ``prompts / updates`` whole groups each; a micro-batch holds ``micro_batch_size``
    samples of one group.
    """

    prompts: int
    group_size: int
    slots: int
    micro_batch_size: int
    updates: int
    ranks: int

    def problem(self) -> str | None:
        """Why this cannot be dealt evenly, or None."""
        if self.group_size % self.micro_batch_size:
            return (
                f"a group of {self.group_size} samples (grpo.group_size) does not divide into micro-batches of "
                f"{self.micro_batch_size} (engine.micro_batch_size)"
            )
        if self.prompts % self.updates:
            return (
                f"{self.prompts} prompts (grpo.prompts_per_iteration) do not divide into {self.updates} updates of "
                "whole prompts (grpo.updates_per_iteration)"
            )
        for what, per_group in (("rollout", self._rollout_per_group), ("update", self._update_per_group)):
            count = self.prompts // self.updates * per_group
            if count % self.ranks:
                return (
                    f"the {what} of one update is {self.prompts // self.updates} prompts x {per_group} micro-batches = "
                    f"{count}, which cannot be dealt evenly to {self.ranks} processes"
                )
        return None

    def check(self) -> None:
        """Raise ValueError with the reason and the nearest values that can be dealt."""
        problem = self.problem()
        if problem is None:
            return
        keys = {
            "grpo.prompts_per_iteration": (self.prompts, lambda v: self._with(prompts=v)),
            "grpo.group_size": (
                self.group_size,
                lambda v: self._with(group_size=v, slots=v if self.slots == self.group_size else self.slots),
            ),
            "engine.micro_batch_size": (self.micro_batch_size, lambda v: self._with(micro_batch_size=v)),
            "grpo.updates_per_iteration": (self.updates, lambda v: self._with(updates=v)),
        }
        ways = []
        for key, (value, change) in keys.items():
            near = _nearest(value, lambda v, change=change: change(v).problem() is None)  # type: ignore[misc]
            if near:
                ways.append(f"{key}={' or '.join(map(str, near))}")
        raise ValueError(f"{problem}. Changing one key would work: {', '.join(ways) or 'none; change two'}")

    def _with(self, **changes: int) -> Dealing:
        return Dealing(**{**self.__dict__, **changes})

    @property
    def _rollout_per_group(self) -> int:
        return self.group_size // self.micro_batch_size

    @property
    def _update_per_group(self) -> int:
        return -(-self.slots // self.micro_batch_size)

    @property
    def moves_rows(self) -> bool:
        """Whether more samples that share a row of their micro-batches may be chosen than an update has micro-batches, so that
        some are trained on in another row than they were drawn in."""
        return min(self.slots, self._rollout_per_group) > self._update_per_group

    def groups_of(self, update: int) -> range:
        """The groups that make up one update."""
        size = self.prompts // self.updates
        return range(update * size, (update + 1) * size)

    def rollout_batches(self, rank: int) -> list[tuple[int, list[int]]]:
        """Rollout micro-batches of a rank, as (group, members); an update's groups are sampled where they are trained."""
        mine = []
        for update in range(self.updates):
            batches = [
                (group, list(range(k * self.micro_batch_size, (k + 1) * self.micro_batch_size)))
                for group in self.groups_of(update)
                for k in range(self._rollout_per_group)
            ]
            mine += _share(batches, rank, self.ranks)
        return mine

    def update_batches(self, update: int, rank: int) -> list[tuple[int, int]]:
        """Update micro-batches of a rank, as (group, index among the group's regrouped micro-batches)."""
        batches = [(group, k) for group in self.groups_of(update) for k in range(self._update_per_group)]
        return _share(batches, rank, self.ranks)

    def owners(self) -> dict[tuple[int, int], int]:
        """(group, member) -> the rank whose rollout drew it."""
        return {
            (group, member): rank
            for rank in range(self.ranks)
            for group, members in self.rollout_batches(rank)
            for member in members
        }


def _share(items: Sequence[Item], rank: int, ranks: int) -> list[Item]:
    size = len(items) // ranks
    return list(items[rank * size : (rank + 1) * size])


def _nearest(value: int, works: Callable[[int], bool]) -> list[int]:
    below = next((v for v in range(value - 1, 0, -1) if works(v)), None)
    above = next((v for v in range(value + 1, 16 * value + 64) if works(v)), None)
    return [v for v in (below, above) if v is not None]
