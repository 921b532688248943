"""The scores of an iteration: asked for where samples are drawn, gathered on every process."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import ConfigError, UserError
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.rewards.base import RewardRequest
from fastvideo_grpo.rewards.reward_set import PendingScores, RewardSet, ScoredBatch
from fastvideo_grpo.tracking.statistics import Clock
from fastvideo_grpo.trainers.not_finite import FAULTS
from fastvideo_grpo.trainers.rollout import Rollout

MAX_PENDING = 4
"""Micro-batches that may wait to be scored (``rewards.async``): their media take host memory."""

_MARGIN_S = 60.0
"""Seconds of ``run.timeout_minutes`` that a reward's failures must leave for everything else."""


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


class Scoring:
    """The rewards of a run, as it asks them of its samples.

    Args:
        fps: frames a second of videos, which rewards are told; None for images.
        watch: see :class:`RewardSet`.

    Attributes:
        rewards: made on the ranks that score.

    Raises:
        ConfigError: see :func:`make_rewards`.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        fps: float | None,
        watch: Callable[[Collection[str]], None] = lambda models: None,
    ) -> None:
        self.config, self.world, self.fps = config, world, fps
        self.rewards = make_rewards(config, world, watch)

    def begin(self, failures: float = math.inf) -> None:
        """Begin an iteration's or an evaluation's requests (:meth:`RewardSet.begin`).

        Args:
            failures: samples that may stay without a score before a reward is left alone.

        With several processes a reward's failures may take ``run.timeout_minutes``, less one attempt and ``_MARGIN_S``: then
        the others give up waiting.
        """
        attempt = self.config.rewards.timeout_s + self.rewards.restart_s
        patience = 60.0 * self.config.run.timeout_minutes - attempt - _MARGIN_S
        self.rewards.begin(failures, patience if self.world.size > 1 else math.inf)

    def score(self, prompt: Prompt, media: Tensor) -> ScoredBatch:
        """What the rewards say of samples of one prompt, ``media`` uint8 ``[B, F, H, W, 3]``."""
        return self.submit(prompt, media).result()

    def submit(self, prompt: Prompt, media: Tensor) -> PendingScores:
        """Like :meth:`score`, whose result comes later."""
        count = len(media)
        return self.rewards.submit(
            RewardRequest([prompt.text] * count, media, fps=self.fps, metadata=[prompt.metadata] * count)
        )

    def close(self) -> None:
        """Let go of the rewards."""
        self.rewards.close()


class ScoreTable:
    """The scores of an iteration's samples: asked for on the rank that scores them, gathered on every rank.

    With ``rewards.async`` the rewards look at a micro-batch while the next ones are sampled.

    Args:
        prompts: P, and ``group_size``, G: the samples.
        clock: times the waiting, as the phase "reward".
    """

    def __init__(self, scoring: Scoring, prompts: int, group_size: int, clock: Clock) -> None:
        self._scoring, self._clock = scoring, clock
        self.names = scoring.rewards.names
        self._table = torch.zeros(3, len(self.names), prompts, group_size, dtype=torch.float32)  # score, raw score, valid
        self._faults = torch.zeros(len(FAULTS), prompts, group_size, dtype=torch.float32)
        self._pending: deque[tuple[int, Sequence[int], Sequence[str | None], PendingScores]] = deque()
        self._retried_before = scoring.rewards.retried.total()
        scoring.begin(scoring.config.rewards.max_invalid_fraction * (prompts * group_size))

    def submit(self, prompt: Prompt, group: int, members: Sequence[int], media: Tensor, faults: Sequence[str | None]) -> None:
        """Ask for the scores of a micro-batch of a group; a sample that has one of ``faults`` has no valid score."""
        self._pending.append((group, members, faults, self._scoring.submit(prompt, media)))
        if not self._scoring.config.rewards.async_ or len(self._pending) > MAX_PENDING:
            self._collect()

    def _collect(self) -> None:
        """Wait for the oldest micro-batch's scores, and fill them in."""
        group, members, faults, pending = self._pending.popleft()
        with self._clock.phase("reward"):
            scored = pending.result()
            sound = torch.tensor([fault is None for fault in faults])
            for member, fault in zip(members, faults, strict=True):
                if fault is not None:
                    self._faults[FAULTS.index(fault), group, member] = 1.0
            for k, name in enumerate(self.names):
                valid = scored.valid[name] & sound
                self._table[0, k, group, members] = torch.where(valid, scored.scores[name], 0.0)
                self._table[1, k, group, members] = torch.where(valid, scored.raw[name], 0.0)
                self._table[2, k, group, members] = valid.float()

    def gather(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], int]:
        """All ranks' samples, on every rank, when all are scored: name -> score, raw score (float32 ``[P, G]``, 0 where
        invalid) and whether they are valid (bool ``[P, G]``); of each of ``FAULTS``, which samples have it (bool
        ``[P, G]``); and how many requests were made again."""
        while self._pending:
            self._collect()
        world, names = self._scoring.world, len(self.names)
        # Each sample was scored by one rank, and the others have 0 there: the sum is exact.
        table = world.all_gather_rows(torch.cat([self._table.flatten(0, 1), self._faults])[None]).sum(0)
        scores, raw, valid = (dict(zip(self.names, part, strict=True)) for part in table[: 3 * names].split(names))
        faults = dict(zip(FAULTS, table[3 * names :].bool(), strict=True))
        retried = float(self._scoring.rewards.retried.total() - self._retried_before)
        everywhere = int(world.all_reduce_sum(torch.tensor([retried], dtype=torch.float64))[0])
        return scores, raw, {name: part.bool() for name, part in valid.items()}, faults, everywhere


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
