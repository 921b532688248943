"""Samples that do not count: when there are too many of them, what spoiled them, and where a run can go back to."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvideo_grpo.checkpoints.store import CheckpointError, CheckpointStore
from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.trainers.not_finite import DECODING, SAMPLING, metric
from fastvideo_grpo.trainers.rollout import Rollout
from fastvideo_grpo.trainers.training_run import TrainingRun


class TooManyInvalidRewards(UserError):
    """More samples of an iteration have no score that counts than ``rewards.max_invalid_fraction`` allows."""


def check_invalid(run: TrainingRun, iteration: int, rollout: Rollout) -> None:
    """Refuse an iteration (from 0) in which too many samples have no score that counts.

    Raises:
        TooManyInvalidRewards: with what was trained saved, unless it is the weights that draw what is not finite: they must
            not take the place of a sound checkpoint.
    """
    weights = run.scoring.rewards.weights
    counted = torch.stack([rollout.valid[name] for name, weight in weights.items() if weight != 0]).all(0)
    total, failed = counted.numel(), int((~counted).sum())
    allowed = run.config.rewards.max_invalid_fraction
    if failed <= allowed * total:
        return
    diverged = int(rollout.faults[SAMPLING].sum()) > allowed * total
    if run.saved != iteration and not diverged:
        run.save(iteration)
    blame = _blame(run, iteration, rollout)
    raise TooManyInvalidRewards(
        f"{failed} of {total} samples of iteration {iteration + 1} do not count, more than rewards.max_invalid_fraction="
        f"{allowed} allows: {blame.counts()}. {blame.advice(run.config)}"
    )


def _blame(run: TrainingRun, iteration: int, rollout: Rollout) -> Blame:
    """What spoiled an iteration's samples, the same on every rank."""
    rewards, world = run.scoring.rewards, run.world
    faults = torch.stack(list(rollout.faults.values())).any(0)
    unscored = {name: int((~rollout.valid[name] & ~faults).sum()) for name, weight in rewards.weights.items() if weight != 0}
    reasons = [reason for rank in world.all_gather_object(dict(rewards.failure_counts)) for reason in rank]
    lines = world.broadcast_object(run.log.read() if world.rank == 0 else None)
    begun, sampling = iteration, int(rollout.faults[SAMPLING].sum())
    sound = None
    if sampling:
        begun = since(lines, iteration)
        sound = newest_sound(run.store, lines, begun)
    return Blame(
        iteration=iteration,
        sampling=sampling,
        decoding=int(rollout.faults[DECODING].sum()),
        rewards={name: count for name, count in unscored.items() if count},
        reasons=sorted(set(reasons)),
        since=begun,
        sound=sound,
        saved=run.saved == iteration,
    )


def since(lines: Sequence[dict[str, Any]], iteration: int) -> int:
    """The first iteration (from 0) of those without a gap before ``iteration``, which has them, in which sampling gave values
    that are not finite, by the lines of metrics.jsonl."""
    counts = {line["iteration"]: line.get(metric(SAMPLING)) for line in lines}
    first = iteration
    while counts.get(first - 1):
        first -= 1
    return first


def newest_sound(store: CheckpointStore, lines: Sequence[dict[str, Any]], before: int) -> int | None:
    """The newest whole checkpoint below ``before`` whose weights drew finite samples only, by the lines of metrics.jsonl; all
    ranks call it with the same lines.

    (The checkpoint after N iterations has the weights that iteration N, counted from 0, was drawn with.)
    """
    clean = {line["iteration"] for line in lines if line.get(metric(SAMPLING)) == 0}
    for number in reversed(store.world.broadcast_object(store.iterations())):
        if number < before and number in clean:
            try:
                store.at(number)
            except CheckpointError:
                continue
            return int(number)
    return None


@dataclass(frozen=True)
class Blame:
    """What spoiled an iteration's samples, and where a run can go back to: what its last message says of it.

    Attributes:
        iteration: the iteration, from 0.
        sampling, decoding: samples that were not finite there.
        rewards: samples that a reward alone had no score for, by its name; ``reasons``: why, as rewards said.
        since: see :func:`since`; ``sound``: see :func:`newest_sound`.
        saved: whether what was trained before is saved.
    """

    iteration: int
    sampling: int
    decoding: int
    rewards: dict[str, int]
    reasons: Sequence[str]
    since: int
    sound: int | None
    saved: bool

    def counts(self) -> str:
        """Samples by what spoiled them."""
        by_reward = {f"reward {name}": count for name, count in self.rewards.items()}
        every = {SAMPLING: self.sampling, DECODING: self.decoding, **by_reward}
        return "; ".join(f"{what} ({count})" for what, count in every.items() if count) or "no reason given"

    def advice(self, config: Config) -> str:
        """What to do, sentence by sentence."""
        sentences = []
        if self.sampling:
            sentences += self._of_sampling(config)
        if self.decoding:
            sentences.append(_of_decoding(config))
        if self.rewards:
            sentences.append(f"The rewards said: {'; '.join(self.reasons) or 'no reason'}. Repair the reward")
        if self.saved and (self.decoding or self.rewards):  # of weights that draw NaN it would be no comfort
            again = " and start the same command again" if self.rewards and not self.sampling and not self.decoding else ""
            sentences[-1] += again
            sentences.append("What was trained before is saved")
        return ". ".join(sentences)

    def _of_sampling(self, config: Config) -> list[str]:
        model = config.model
        if self.since == 0:
            where = f"{model.path}/{FAMILIES[model.kind].denoiser}"
            precise = f", or set model.precision=fp32 (it is {model.precision})" if model.precision != "fp32" else ""
            return [
                f"The network has given NaN or infinity from the first iteration on, with the weights of {where}: no "
                f"checkpoint of this run is sound. See that these weights are whole{precise}"
            ]
        told = f"The network gives NaN or infinity since iteration {self.since + 1}"
        lower = f"a lower optim.lr (it is {config.optim.lr:g}) and another run.dir"
        if self.sound is None:
            return [told, f"No checkpoint is left from before: start anew from model.path={model.path} with {lower}"]
        folder = Path(config.run.dir) / "checkpoints" / f"{self.sound:06d}"
        merge = " --merge-lora" if model.lora is not None else ""
        export = (
            f"fastvideo-grpo export {shlex.quote(str(config.run.dir))} --iteration {self.sound} --pipeline{merge} --out DIR"
        )
        return [
            told,
            f"The newest sound checkpoint is {folder}, whose samples were all finite: to go on from it, {export}, and train "
            f"with model.path=DIR, {lower}",
        ]


def _of_decoding(config: Config) -> str:
    precision = config.model.vae_precision
    if precision != "fp32":
        return f"The VAE overflows in model.vae_precision={precision}: set model.vae_precision=fp32, with another run.dir"
    return f"See that the weights in {config.model.path}/vae are whole"
