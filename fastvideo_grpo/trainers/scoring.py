"""The scores of an iteration: asked for where samples are drawn, gathered on every process."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import ConfigError, UserError
from fastvideo_grpo.rewards.reward_set import RewardSet, ScoredBatch
from fastvideo_grpo.trainers.not_finite import FAULTS

if TYPE_CHECKING:
    from fastvideo_grpo.trainers.base import Rollout

MAX_PENDING = 4
"""Micro-batches that may wait to be scored (``rewards.async``): their media take host memory."""

_MARGIN_S = 60.0
"""Seconds of ``run.timeout_minutes`` that a reward's failures must leave for everything else."""


class TooManyInvalidRewards(UserError):
    """More samples of an iteration have no score that counts than ``rewards.max_invalid_fraction`` allows."""


def make_rewards(config: Config, world: World, watch: Callable[[Collection[str]], None]) -> RewardSet:
    """The configured rewards: made on the ranks that score, on the others their names, weights and transforms.

    Args:
        watch: see :class:`RewardSet`.

    Raises:
        ConfigError: on every rank: a reward that cannot be made or looks at other media, or one whose process starts so
            slowly that the others would give up waiting.
    """

    def make(elsewhere: dict[str, tuple[str, ...]] | None = None) -> RewardSet:
        return RewardSet(
            config.rewards.models,
            device=world.device,
            offload_idle=config.engine.offload_idle,
            timeout_s=config.rewards.timeout_s,
            retries=config.rewards.retries,
            backoff_s=config.rewards.backoff_s,
            elsewhere=elsewhere,
            watch=watch,
        )

    rewards: RewardSet | None = None
    error = None
    if world.leads:
        try:
            rewards = make()
            rewards.check_frames(config.sample.frames)
        except (ValueError, UserError, OSError, ImportError) as failure:  # what rewards raise for the user
            error = str(failure)
    errors = [failure for failure in world.all_gather_object(error) if failure is not None]
    if errors:
        if rewards is not None:
            rewards.close()
        raise ConfigError(errors[0])
    found = world.broadcast_object(rewards.outputs if rewards is not None else None)
    rewards = make(found) if rewards is None else rewards
    attempt = config.rewards.timeout_s + max(world.all_gather_object(rewards.restart_s))
    if world.size > 1 and attempt + _MARGIN_S >= 60 * config.run.timeout_minutes:
        rewards.close()
        raise ConfigError(
            f"a reward's process took long to start, so that a request may take {attempt:.0f} s where it has to be started "
            f"anew, and the other processes give up after run.timeout_minutes={config.run.timeout_minutes}: set "
            f"run.timeout_minutes to at least {math.ceil(2 * (attempt + _MARGIN_S) / 60)}, or rewards.timeout_s lower"
        )
    return rewards


def begin_scoring(rewards: RewardSet, config: Config, world: World, failures: float = math.inf) -> None:
    """Begin an iteration's or an evaluation's requests (:meth:`RewardSet.begin`).

    Args:
        failures: samples that may stay without a score before a reward is left alone.

    With several processes a reward's failures may take ``run.timeout_minutes``, less one attempt and ``_MARGIN_S``: then the
    others give up waiting.
    """
    attempt = config.rewards.timeout_s + rewards.restart_s
    patience = 60.0 * config.run.timeout_minutes - attempt - _MARGIN_S
    rewards.begin(failures, patience if world.size > 1 else math.inf)


class ScoreTable:
    """The scores of an iteration's samples, filled in on the rank that scores them.

    Args:
        names: of the rewards' outputs.
        prompts: P, and ``group_size``, G: the samples.
    """

    def __init__(self, names: Sequence[str], prompts: int, group_size: int) -> None:
        self.names = list(names)
        self._table = torch.zeros(3, len(self.names), prompts, group_size, dtype=torch.float32)  # score, raw score, valid
        self._faults = torch.zeros(len(FAULTS), prompts, group_size, dtype=torch.float32)

    def add(self, group: int, members: Sequence[int], scored: ScoredBatch, faults: Sequence[str | None]) -> None:
        """Fill in a micro-batch of a group; a sample that has one of ``faults`` has no valid score."""
        sound = torch.tensor([fault is None for fault in faults])
        for member, fault in zip(members, faults, strict=True):
            if fault is not None:
                self._faults[FAULTS.index(fault), group, member] = 1.0
        for k, name in enumerate(self.names):
            valid = scored.valid[name] & sound
            self._table[0, k, group, members] = torch.where(valid, scored.scores[name], 0.0)
            self._table[1, k, group, members] = torch.where(valid, scored.raw[name], 0.0)
            self._table[2, k, group, members] = valid.float()

    def gather(self, world: World) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """All ranks' samples, on every rank: name -> score, raw score (float32 ``[P, G]``, 0 where invalid) and whether they
        are valid (bool ``[P, G]``); and of each of ``FAULTS``, which samples have it (bool ``[P, G]``)."""
        # Each sample was scored by one rank, and the others have 0 there: the sum is exact.
        table = world.all_gather_rows(torch.cat([self._table.flatten(0, 1), self._faults])[None]).sum(0)
        names = len(self.names)
        scores, raw, valid = (dict(zip(self.names, part, strict=True)) for part in table[: 3 * names].split(names))
        faults = dict(zip(FAULTS, table[3 * names :].bool(), strict=True))
        return scores, raw, {name: part.bool() for name, part in valid.items()}, faults


def reward_metrics(rollout: Rollout, rewards: RewardSet) -> dict[str, Any]:
    """``reward/retried`` and, of each output, ``reward/NAME/{mean,std,max,invalid}`` and, with a threshold,
    ``above_threshold``."""
    metrics: dict[str, Any] = {"reward/retried": rollout.retried}
    for name in rewards.names:
        valid = rollout.valid[name]
        values = rollout.raw[name][valid].double()
        metrics[f"reward/{name}/mean"] = values.mean().item() if len(values) else math.nan
        metrics[f"reward/{name}/std"] = values.std().item() if len(values) > 1 else math.nan
        metrics[f"reward/{name}/max"] = values.max().item() if len(values) else math.nan
        metrics[f"reward/{name}/invalid"] = int((~valid).sum())
        if rewards.transforms[name].threshold is not None:
            above = rollout.scores[name][valid].double().abs()  # 0 and 1, or 0 and -1 where inverted
            metrics[f"reward/{name}/above_threshold"] = above.mean().item() if len(above) else math.nan
    return metrics
