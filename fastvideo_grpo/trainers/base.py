"""Algorithm 1, once, for every model.

``GRPOTrainer.train`` reads beside Algorithm 1 of DanceGRPO (Xue et al. 2025, arXiv:2505.07818); what it asks of a model is
:class:`~fastvideo_grpo.trainers.policy.Policy`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import torch

from fastvideo_grpo.grpo.advantages import Advantages
from fastvideo_grpo.grpo.objectives import SampleBatch
from fastvideo_grpo.grpo.selection import MicroBatch, best_of, pairs, regroup, regroup_pairs
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.sampling.noise import SampleKey
from fastvideo_grpo.tracking.statistics import Clock, UpdateStatistics
from fastvideo_grpo.trainers.invalid_samples import check_invalid
from fastvideo_grpo.trainers.iteration_steps import idle_predictions, trained_timestep_weights
from fastvideo_grpo.trainers.not_finite import fault_metrics
from fastvideo_grpo.trainers.policy import Policy
from fastvideo_grpo.trainers.replay import AnyReplay, fetch_trajectories, replay_batch
from fastvideo_grpo.trainers.rollout import Rollout, Trajectories
from fastvideo_grpo.trainers.scoring import ScoreTable, reward_metrics
from fastvideo_grpo.trainers.stopping import StopSignal
from fastvideo_grpo.trainers.stored_outputs import Outputs, store_outputs, stored_deviation
from fastvideo_grpo.trainers.training_run import TrainingRun

logger = logging.getLogger(__name__)


class GRPOTrainer(Policy):
    """GRPO on a generator. A subclass is the generator's :class:`Policy`. Whoever loads one calls :meth:`close` in the end."""

    run: TrainingRun

    def setup_training(self) -> None:
        """Everything training needs besides: rewards, prompts, dealing, engine, checkpoints, logs; resumes if it can."""
        self.run = self._held.enter_context(TrainingRun(self))

    def close(self) -> None:
        """Let go of the rewards and of the run's folder; may be called twice, and without :meth:`setup_training`."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Say in the run's folder how the run ended, and :meth:`close`."""
        self._held.__exit__(kind, error, trace)

    @cached_property
    def _held(self) -> ExitStack:
        """What :meth:`close` lets go of."""
        return ExitStack()

    def train(self, stop: StopSignal | None = None) -> bool:
        """Iterations of Algorithm 1, from where the run stands to ``run.iterations``.

        Returns:
            True when all of them are done; False when ``stop`` asked to leave before, and what was trained is saved.

        Raises:
            TooManyInvalidRewards: after saving what was trained so far, unless its weights draw what is not finite.
        """
        run, rewards = self.run, self.run.scoring.rewards
        if not run.begin():
            return True
        for iteration in range(run.first_iteration, self.config.run.iterations):
            if stop is not None and stop.agreed(self.world):
                run.stop(iteration)
                return False
            run.status.iteration(iteration + 1)
            clock = Clock(run.status.doing, self.passes)
            prompts = run.draw_prompts(iteration)
            with self.weights_of("old"):
                rollout = self.rollout(iteration, prompts, clock)
            metrics = {"iteration": iteration, **fault_metrics(rollout.faults), **reward_metrics(rollout, rewards)}
            check_invalid(run, iteration, rollout)
            advantages = run.normalisation.advantages(
                rollout.scores, rollout.valid, rewards.weights, [prompt.id for prompt in prompts]
            )
            metrics["advantage/zero_spread_groups"] = int(advantages.zero_spread.sum())
            chosen = self.select(advantages)
            metrics.update(self.update(iteration, rollout, advantages, chosen, clock))
            run.finish_iteration(iteration + 1, metrics, clock)
        run.finish()
        return True

    def rollout(self, iteration: int, prompts: list[Prompt], clock: Clock) -> Rollout:
        """Steps 1 to 3: sample this rank's micro-batches, score them, and gather everybody's scores.

        Scoring itself exchanges nothing between ranks, so it cannot deadlock; a rank that waits for a reward (always without
        ``rewards.async``) lets those wait that share its samples' tokens or weights, which ``rewards.timeout_s`` bounds.
        """
        run = self.run
        trajectories: Trajectories = {}
        self.forget_conditioning()
        jobs = run.dealing.rollout_batches(self.world.data_rank)
        show = run.console.progress(f"iteration {iteration + 1}: sampling")
        table = ScoreTable(run.scoring, len(prompts), self.config.grpo.group_size, clock)
        for done, (group, members) in enumerate(jobs, start=1):
            prompt = prompts[group]
            keys = [SampleKey(self.config.run.seed, iteration, group, prompt.id, member) for member in members]
            with clock.phase("rollout"):
                drawn = self.draw(prompt, keys)
            show(done, len(jobs))
            if not self.world.leads:
                continue  # the leader of the group decoded, scores and keeps the same samples
            assert drawn.media is not None
            faults = drawn.faults()
            self.note_faults(faults)
            for row, member in enumerate(members):
                for what, kept in drawn.parts().items():
                    # A masked sample may still fill a micro-batch: as zeros, since weight 0 times NaN is NaN in the gradient.
                    trajectories[what, group, member] = kept[row] if faults[row] is None else torch.zeros_like(kept[row])
            table.submit(prompt, group, members, drawn.media, faults)
        with clock.phase("rollout"):
            self.predict_idly(prompts[jobs[-1][0]], idle_predictions(self, run.dealing, iteration, prompts))
        scores, raw, valid, lost, retried = table.gather()
        return Rollout(prompts, trajectories, scores, raw, valid, lost, retried)

    def select(self, advantages: Advantages) -> list[list[MicroBatch]]:
        """Which members of each group are trained on, in update micro-batches ``[group][k]``."""
        slots, size, best = self.run.dealing.slots, self.config.engine.micro_batch_size, self.config.grpo.best_of
        chosen = []
        for values, valid in zip(advantages.values, advantages.valid, strict=True):
            if best is None:
                chosen.append(regroup([i for i, ok in enumerate(valid.tolist()) if ok], slots, size))
            elif self.run.objective.pairs:
                chosen.append(regroup_pairs(pairs(values, valid, best.top), slots, size))
            else:
                chosen.append(regroup(best_of(values, valid, best.top, best.bottom), slots, size))
        return chosen

    def update(
        self, iteration: int, rollout: Rollout, advantages: Advantages, chosen: list[list[MicroBatch]], clock: Clock
    ) -> dict[str, Any]:
        """Steps 5 and 6: the optimiser steps of an iteration, over replays of the rollout's micro-batches."""
        run, grpo = self.run, self.config.grpo
        engine, objective, dealing, rewards = run.engine, run.objective, run.dealing, run.scoring.rewards
        total = UpdateStatistics()
        norms: list[float] = []
        skipped_before = engine.skipped_updates
        lr = engine.lr
        timestep_weights = trained_timestep_weights(self, objective, iteration, rollout.prompts, chosen)
        # Without those of whose prompts no sample counts, on all ranks alike.
        counted = {u: n for u in range(grpo.updates_per_iteration) if (n := self._trained_transitions(u, chosen))}
        stored: Outputs = {}

        def replays(update: int) -> Iterator[tuple[AnyReplay, SampleBatch]]:
            with clock.phase("exchange"):
                trajectories = fetch_trajectories(update, rollout, chosen, dealing, self.world, self.steps.parts)
            for number, (group, k) in enumerate(dealing.update_batches(update, self.world.data_rank)):
                outputs = stored.get((update, number), {})
                yield replay_batch(
                    self, objective, rewards, iteration, rollout, trajectories, advantages, group, chosen[group][k], outputs
                )

        with clock.phase("update"):
            stored, deviation = store_outputs(self, list(counted), replays)
        for update, transitions in counted.items():
            batches = len(dealing.update_batches(update, self.world.data_rank))
            engine.accumulate(batches * self.steps.trained)
            show = run.console.progress(f"iteration {iteration + 1}: update {update + 1}/{grpo.updates_per_iteration}")
            for done, (replay, samples) in enumerate(replays(update), start=1):
                for i in range(self.steps.trained):
                    with clock.phase("update"), self.pass_context(replay.conditioning):
                        loss, statistics = objective.loss(replay, samples, i)
                        weights = samples.weights * timestep_weights[samples.timesteps[:, i]].to(samples.weights)
                        # Gradients are summed over all processes, and those that share a sample have the same loss.
                        loss = (loss * weights).sum() / transitions / self.world.sequence_parallel
                        engine.backward(loss)
                    total.add(loss, statistics, samples.weights, first=not norms)
                show(done, batches)
            with clock.phase("update"):
                norms.append(engine.step())
        engine.move_old_weights()
        finite = [norm for norm in norms if math.isfinite(norm)]
        if len(finite) < len(norms):
            logger.warning(
                "iteration %d: the gradient of %d of %d updates was not finite: they changed nothing",
                iteration + 1,
                len(norms) - len(finite),
                len(norms),
            )
        if not norms:
            logger.warning("iteration %d made no update: no sample counts (all masked, or no pair differs)", iteration + 1)
        return {
            **total.summary(self.world),
            **stored_deviation(self, deviation),
            "train/grad_norm": sum(finite) / len(finite) if finite else math.nan,
            "train/lr": lr,
            "train/updates": len(finite),
            "train/skipped_updates": grpo.updates_per_iteration - len(norms) + engine.skipped_updates - skipped_before,
        }

    def _trained_transitions(self, update: int, chosen: list[list[MicroBatch]]) -> int:
        """Transitions (of a sample, at a timestep) that count in an update, over all ranks."""
        rows = sum(row.weight > 0 for group in self.run.dealing.groups_of(update) for batch in chosen[group] for row in batch)
        return rows * self.steps.trained
