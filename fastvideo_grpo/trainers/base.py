"""Algorithm 1, once, for every model.

``GRPOTrainer.train`` reads beside Algorithm 1 of DanceGRPO (Xue et al. 2025, arXiv:2505.07818); what it asks of a model is
:class:`~fastvideo_grpo.trainers.policy.Policy`.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fastvideo_grpo.checkpoints.lock import lock_folder
from fastvideo_grpo.checkpoints.resume import check_resumable, image_digests, prompts_state
from fastvideo_grpo.checkpoints.run_status import RunStatus
from fastvideo_grpo.checkpoints.store import CheckpointStore
from fastvideo_grpo.config import saved as config_saved
from fastvideo_grpo.config.keys import checkpointed_blocks, make_objective
from fastvideo_grpo.disk.durable_files import keep_going, write_atomic
from fastvideo_grpo.engines.make import make_engine
from fastvideo_grpo.errors import ConfigError, UserError
from fastvideo_grpo.evaluation.fixed_set import FixedSamples, sample_fixed
from fastvideo_grpo.grpo import advantages as normalisations
from fastvideo_grpo.grpo import timesteps
from fastvideo_grpo.grpo.advantages import Advantages
from fastvideo_grpo.grpo.selection import MicroBatch, best_of, pairs, regroup, regroup_pairs
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.models.run_prompts import prompts_of
from fastvideo_grpo.planning.plan import all_done, dealing
from fastvideo_grpo.prompts.embeddings import encoder_identity
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.prompts.order import PromptOrder
from fastvideo_grpo.rewards.base import RewardRequest
from fastvideo_grpo.rewards.reward_set import PendingScores, RewardSet, ScoredBatch
from fastvideo_grpo.sampling import noise
from fastvideo_grpo.sampling.noise import SampleKey
from fastvideo_grpo.tracking.console import Console
from fastvideo_grpo.tracking.metrics import MetricsLog
from fastvideo_grpo.tracking.pictures import caption, save_samples
from fastvideo_grpo.tracking.provenance import git_commit, versions
from fastvideo_grpo.tracking.statistics import Clock, UpdateStatistics, memory_metrics
from fastvideo_grpo.tracking.wandb_run import WandbRun
from fastvideo_grpo.trainers.not_finite import (
    DECODING,
    SAMPLING,
    Blame,
    fault_metrics,
    newest_sound,
    since,
)
from fastvideo_grpo.trainers.policy import Policy
from fastvideo_grpo.trainers.replay import fetch_trajectories, replay_batch
from fastvideo_grpo.trainers.row_rounding import row_matters
from fastvideo_grpo.trainers.scoring import (
    MAX_PENDING,
    ScoreTable,
    TooManyInvalidRewards,
    begin_scoring,
    make_rewards,
    reward_metrics,
)
from fastvideo_grpo.trainers.stopping import EXIT_STOPPED, StopSignal

logger = logging.getLogger(__name__)


@dataclass
class Rollout:
    """What this rank drew in an iteration, and what everybody's rewards say of it.

    ``latents`` ``(group, member) -> [T + 1, ...]``, ``log_probs`` ``(group, member) -> [T]``: this rank's samples, none where
    the leader of its sequence-parallel group has them.
    ``scores``, ``valid``: reward name -> ``[P, G]``, all samples. ``raw``: the scores before the outputs' transforms.
    ``faults``: of each of ``FAULTS``, the samples that have it, bool ``[P, G]``.
    ``prompts``: of each group. ``retried``: requests to rewards that were made again.
    """

    prompts: list[Prompt]
    latents: dict[tuple[int, int], Tensor]
    log_probs: dict[tuple[int, int], Tensor]
    scores: dict[str, Tensor]
    raw: dict[str, Tensor]
    valid: dict[str, Tensor]
    faults: dict[str, Tensor]
    retried: int


class GRPOTrainer(Policy):
    """GRPO on a generator. A subclass is the generator's :class:`Policy`. Whoever loads one calls :meth:`close` in the end."""

    rewards: RewardSet

    # --- setting up ---------------------------------------------------------------------------------------------------

    def setup_training(self) -> None:
        """Everything training needs besides: rewards, prompts, dealing, engine, checkpoints, logs; resumes if it can."""
        config, world = self.config, self.world
        self.folder = Path(config.run.dir)
        self.console = Console(quiet=world.rank != 0)
        world.on_rank_0(lambda: self._held.enter_context(lock_folder(self.folder)))
        self.status = self._held.enter_context(RunStatus(self.folder if world.rank == 0 else None))
        if self.status.before is not None:
            logger.warning("%s", self.status.before)
        self.setup_rewards()
        self.prompts = prompts_of(config, config.prompts.path)
        self.eval_prompts = prompts_of(config, config.prompts.eval_path) if config.prompts.eval_path else []
        self.order = PromptOrder(len(self.prompts), config.prompts.seed)
        self.dealing = dealing(config, world.data_size)
        self.dealing.check()
        self.objective = make_objective(config)
        self.normalisation = normalisations.get(
            config.grpo.normalisation,
            history_size=config.grpo.history.size,
            history_minimum=config.grpo.history.minimum,
        )
        self.cache_embeddings([*self.prompts, *self.eval_prompts], self.console)
        if self.objective.needs_reference and config.model.lora is None:
            self._reference = self.make_reference()
        every = checkpointed_blocks(config.engine.activation_checkpointing)
        self.engine = make_engine(self.checkpoint_activations(every) if every else self.denoiser, config, world)
        self.store = CheckpointStore(self.folder / "checkpoints", config.run.keep, world)
        self.log = MetricsLog(self.folder / "metrics.jsonl")
        self._denoiser_identity = encoder_identity(self.checkpoint, [FAMILIES[config.model.kind].denoiser], {})
        self.first_iteration = self._resume()
        self._keep_rows_apart()
        self._saved = self.first_iteration
        world.on_rank_0(self._write_config)
        made = world.on_rank_0(lambda: WandbRun(config.run.wandb, self.folder, config_saved.to_dict(config)))
        self.wandb = made or WandbRun("disabled", self.folder, {})

    def _write_config(self) -> None:
        header = json.dumps({"versions": versions(), "git_commit": git_commit()})
        write_atomic(self.folder / "config.yaml", f"# {header}\n{config_saved.to_yaml(self.config)}".encode())

    def close(self) -> None:
        """Let go of the rewards and of the run's folder; may be called twice, and however far setting up came."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Say in the run's folder how the run ended, and :meth:`close`."""
        if error is not None:
            self.status.failed(error)
        self.close()

    @cached_property
    def status(self) -> RunStatus:
        """What the run is doing, for who starts it again; without :meth:`setup_training` it is not kept."""
        return RunStatus()

    @cached_property
    def _held(self) -> ExitStack:
        """What :meth:`close` lets go of."""
        return ExitStack()

    def _keep_rows_apart(self) -> None:
        """Decide on ``rows_apart``: only where samples may be trained on in other rows of a micro-batch than they were drawn in
        (best-of-N, pairs), and where the network's roundings depend on the row."""
        size = self.config.engine.micro_batch_size
        moves = self.objective.pairs or self.dealing.moves_rows
        # A resumed run goes on as it began: with other weights the trial may end otherwise.
        self.rows_apart = self.rows_apart or (moves and size > 1 and row_matters(self, self.prompts[0], size))
        if self.rows_apart:
            self.console.say(
                f"the network rounds differently in different rows of a micro-batch of {size} (engine.micro_batch_size) here, "
                f"and {'pairs' if self.objective.pairs else 'best-of-N'} put samples into other rows than they were drawn in: "
                "each sample passes through the network by itself, so that ratios stay exactly 1"
            )

    def _resume(self) -> int:
        """Load the newest whole checkpoint of this run, if there is one; returns the iteration to go on with."""
        self.store.clean()
        newest = self.store.newest()
        if newest is None:
            if self.store.iterations():
                raise ConfigError(self.store.all_damaged())
            self.world.on_rank_0(lambda: self.log.cut_back(0))
            return 0
        state = self.store.load_trainer_json(newest)
        check_resumable(state, self.config, self.prompts, self._denoiser_identity)
        assert self.engine is not None
        self.engine.load(newest / "state")
        if not self.engine.weights_are_finite():
            raise UserError(
                f"the weights in {newest} are not finite, so that sampling gives NaN: move it out of {self.store.folder} to go "
                "on from the checkpoint before it, or start anew in another run.dir"
            )
        self.normalisation.restore(state["normalisation"])
        self.rows_apart = state["rows_apart"]
        iteration = int(state["iteration"])
        self.world.on_rank_0(lambda: self.log.cut_back(iteration))
        self.console.say(f"resuming {self.folder} after iteration {iteration}")
        return iteration

    # --- scores -------------------------------------------------------------------------------------------------------

    def setup_rewards(self) -> None:
        """Make the configured rewards on the ranks that score; the others learn their names. An error is every rank's."""
        self.rewards = self._held.enter_context(closing(make_rewards(self.config, self.world, self.status.rewards)))

    def begin_scoring(self, failures: float = math.inf) -> None:
        """Begin an iteration's or an evaluation's requests; see :func:`~fastvideo_grpo.trainers.scoring.begin_scoring`."""
        begin_scoring(self.rewards, self.config, self.world, failures)

    def score(self, prompt: Prompt, media: Tensor) -> ScoredBatch:
        """What the rewards say of samples of one prompt, ``media`` uint8 ``[B, F, H, W, 3]``."""
        return self.submit_for_scores(prompt, media).result()

    def submit_for_scores(self, prompt: Prompt, media: Tensor) -> PendingScores:
        """Like :meth:`score`, whose result comes later."""
        count = len(media)
        return self.rewards.submit(
            RewardRequest([prompt.text] * count, media, fps=self.fps, metadata=[prompt.metadata] * count)
        )

    # --- Algorithm 1 ------------------------------------------------------------------------------------------------------

    def train(self, stop: StopSignal | None = None) -> bool:
        """Iterations of Algorithm 1, from where the run stands to ``run.iterations``.

        Returns:
            True when all of them are done; False when ``stop`` asked to leave before, and what was trained is saved.

        Raises:
            TooManyInvalidRewards: after saving what was trained so far, unless its weights draw what is not finite.
        """
        config = self.config.run
        if self.first_iteration >= config.iterations:
            self.console.say(all_done(self.config, self.first_iteration))
            self.status.end("finished")
            return True
        if self.first_iteration == 0:
            self._before_training()
        for iteration in range(self.first_iteration, config.iterations):
            if stop is not None and stop.agreed(self.world):
                self._stop(iteration)
                return False
            self.status.iteration(iteration + 1)
            clock = Clock(self.status.doing)
            prompts = [self.prompts[i] for i in self.order.draw(iteration, self.config.grpo.prompts_per_iteration)]
            rollout = self.rollout(iteration, prompts, clock)
            metrics = {"iteration": iteration, **fault_metrics(rollout.faults), **reward_metrics(rollout, self.rewards)}
            self._check_invalid(iteration, rollout)
            advantages = self.normalisation.advantages(
                rollout.scores, rollout.valid, self.rewards.weights, [prompt.id for prompt in prompts]
            )
            metrics["advantage/zero_spread_groups"] = int(advantages.zero_spread.sum())
            chosen = self.select(advantages)
            metrics.update(self.update(iteration, rollout, advantages, chosen, clock))
            self._finish_iteration(iteration + 1, metrics, clock)
        self.wandb.finish()
        if self._saved != config.iterations:
            raise UserError(f"the last iteration could not be saved in {self.store.folder}; see the error above")
        self.status.end("finished")
        return True

    def _stop(self, finished: int) -> None:
        """Leave with ``finished`` iterations done, saved (before the first one there is nothing to save)."""
        if self._saved != finished:
            self._save(finished)
        self.wandb.finish()
        if self._saved != finished:
            raise UserError(f"asked to stop, but iteration {finished} was not saved in {self.store.folder}: see above")
        self.status.end("stopped")
        self.console.say(
            f"stopped by SIGUSR1 after iteration {finished} of {self.config.run.iterations}, saved in {self.folder}: start the "
            f"same command again to go on (exit code {EXIT_STOPPED})"
        )

    def _finish_iteration(self, finished: int, metrics: dict[str, Any], clock: Clock) -> None:
        """Evaluate, log, save pictures and a checkpoint, each where it is due; ``finished`` iterations are done."""
        config = self.config.run

        def due(every: int) -> bool:
            return every > 0 and (finished % every == 0 or finished == config.iterations)

        if due(config.eval_every):
            with clock.phase("evaluation"):
                metrics.update(self.evaluate())
        metrics.update({f"time/{phase}": seconds for phase, seconds in clock.seconds.items()})
        metrics.update(memory_metrics(self.world))
        if self.world.rank == 0:
            with keep_going(self.log.path):
                self.log.append(metrics)
            self.wandb.log(metrics)
        self.console.iteration(finished, config.iterations, metrics)
        if due(config.sample_every):
            self.save_pictures(finished)
        if due(config.save_every):
            self._save(finished)

    def rollout(self, iteration: int, prompts: list[Prompt], clock: Clock) -> Rollout:
        """Steps 1 to 3: sample this rank's micro-batches, score them, and gather everybody's scores.

        With ``rewards.async`` the rewards look at a micro-batch while the next ones are sampled. Scoring itself exchanges
        nothing between ranks, so it cannot deadlock; a rank that waits for a reward (always without ``async``) lets those
        wait that share its samples' tokens or weights, which ``rewards.timeout_s`` bounds.
        """
        latents: dict[tuple[int, int], Tensor] = {}
        log_probs: dict[tuple[int, int], Tensor] = {}
        shape = (len(prompts), self.config.grpo.group_size)
        table = ScoreTable(self.rewards.names, *shape)
        self.forget_conditioning()
        jobs = self.dealing.rollout_batches(self.world.data_rank)
        show = self.console.progress(f"iteration {iteration + 1}: sampling")
        self.begin_scoring(self.config.rewards.max_invalid_fraction * math.prod(shape))
        retried = self.rewards.retried.total()
        pending: deque[tuple[int, Sequence[int], list[str | None], PendingScores]] = deque()

        def collect() -> None:
            group, members, faults, scores = pending.popleft()
            with clock.phase("reward"):
                table.add(group, members, scores.result(), faults)

        for done, (group, members) in enumerate(jobs, start=1):
            prompt = prompts[group]
            keys = [SampleKey(self.config.run.seed, iteration, group, prompt.id, member) for member in members]
            with clock.phase("rollout"):
                drawn = self.draw(prompt, keys)
            show(done, len(jobs))
            if not self.world.leads:
                continue  # the leader of the group decoded, scores and keeps the same samples
            assert drawn.trajectory is not None and drawn.media is not None
            faults = drawn.faults()
            self.note_faults(faults)
            for row, member in enumerate(members):
                states, densities = drawn.trajectory.latents[row], drawn.trajectory.log_probs[row]
                # A masked sample may still fill a micro-batch: as zeros, since weight 0 times NaN is NaN in the gradient.
                latents[group, member] = states if faults[row] is None else torch.zeros_like(states)
                log_probs[group, member] = densities if faults[row] is None else torch.zeros_like(densities)
            pending.append((group, members, faults, self.submit_for_scores(prompt, drawn.media)))
            if not self.config.rewards.async_ or len(pending) > MAX_PENDING:
                collect()
        while pending:
            collect()
        scores, raw, valid, lost = table.gather(self.world)
        retried = int(
            self.world.all_reduce_sum(torch.tensor([float(self.rewards.retried.total() - retried)], dtype=torch.float64))[0]
        )
        return Rollout(prompts, latents, log_probs, scores, raw, valid, lost, retried)

    def _check_invalid(self, iteration: int, rollout: Rollout) -> None:
        """Raise when too many samples of an iteration have no score that counts, with what was trained saved, unless it is
        the weights that draw what is not finite: they must not take the place of a sound checkpoint."""
        counted = torch.stack([rollout.valid[name] for name, weight in self.rewards.weights.items() if weight != 0]).all(0)
        total, failed = counted.numel(), int((~counted).sum())
        allowed = self.config.rewards.max_invalid_fraction
        if failed <= allowed * total:
            return
        diverged = int(rollout.faults[SAMPLING].sum()) > allowed * total
        if self._saved != iteration and not diverged:
            self._save(iteration)
        blame = self._blame(iteration, rollout)
        raise TooManyInvalidRewards(
            f"{failed} of {total} samples of iteration {iteration + 1} do not count, more than rewards.max_invalid_fraction="
            f"{allowed} allows: {blame.counts()}. {blame.advice(self.config)}"
        )

    def _blame(self, iteration: int, rollout: Rollout) -> Blame:
        """What spoiled an iteration's samples, the same on every rank."""
        faults = torch.stack(list(rollout.faults.values())).any(0)
        unscored = {
            name: int((~rollout.valid[name] & ~faults).sum()) for name, weight in self.rewards.weights.items() if weight != 0
        }
        reasons = [reason for rank in self.world.all_gather_object(dict(self.rewards.failure_counts)) for reason in rank]
        lines = self.world.broadcast_object(self.log.read() if self.world.rank == 0 else None)
        begun, sampling = iteration, int(rollout.faults[SAMPLING].sum())
        sound = None
        if sampling:
            begun = since(lines, iteration)
            sound = newest_sound(self.store, lines, begun)
        return Blame(
            iteration=iteration,
            sampling=sampling,
            decoding=int(rollout.faults[DECODING].sum()),
            rewards={name: count for name, count in unscored.items() if count},
            reasons=sorted(set(reasons)),
            since=begun,
            sound=sound,
            saved=self._saved == iteration,
        )

    def select(self, advantages: Advantages) -> list[list[MicroBatch]]:
        """Which members of each group are trained on, in update micro-batches ``[group][k]``."""
        slots, size, best = self.dealing.slots, self.config.engine.micro_batch_size, self.config.grpo.best_of
        chosen = []
        for values, valid in zip(advantages.values, advantages.valid, strict=True):
            if best is None:
                chosen.append(regroup([i for i, ok in enumerate(valid.tolist()) if ok], slots, size))
            elif self.objective.pairs:
                chosen.append(regroup_pairs(pairs(values, valid, best.top), slots, size))
            else:
                chosen.append(regroup(best_of(values, valid, best.top, best.bottom), slots, size))
        return chosen

    def update(
        self, iteration: int, rollout: Rollout, advantages: Advantages, chosen: list[list[MicroBatch]], clock: Clock
    ) -> dict[str, Any]:
        """Steps 5 and 6: the optimiser steps of an iteration, over replays of the rollout's micro-batches."""
        engine = self.engine
        assert engine is not None
        grpo = self.config.grpo
        total = UpdateStatistics()
        norms: list[float] = []
        skipped_before = engine.skipped_updates
        lr = engine.lr
        for update in range(grpo.updates_per_iteration):
            counted = self._trained_transitions(update, chosen)
            if counted == 0:
                continue  # no sample of these prompts counts, on all ranks alike
            batches = self.dealing.update_batches(update, self.world.data_rank)
            with clock.phase("exchange"):
                trajectories = fetch_trajectories(update, rollout, chosen, self.dealing, self.world)
            per_sample = timesteps.count(self.schedule.steps, grpo.timesteps.strategy, grpo.timesteps.fraction)
            engine.accumulate(len(batches) * per_sample)
            show = self.console.progress(f"iteration {iteration + 1}: update {update + 1}/{grpo.updates_per_iteration}")
            for done, (group, k) in enumerate(batches, start=1):
                replay, samples = replay_batch(self, iteration, rollout, trajectories, advantages, group, chosen[group][k])
                for i in range(per_sample):
                    with clock.phase("update"), self.pass_context(replay.conditioning):
                        loss, statistics = self.objective.loss(replay, samples, i)
                        # Gradients are summed over all processes, and those that share a sample have the same loss.
                        loss = (loss * samples.weights).sum() / counted / self.world.sequence_parallel
                        engine.backward(loss)
                    total.add(loss, statistics, samples.weights, first=not norms)
                show(done, len(batches))
            with clock.phase("update"):
                norms.append(engine.step())
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
            "train/grad_norm": sum(finite) / len(finite) if finite else math.nan,
            "train/lr": lr,
            "train/updates": len(finite),
            "train/skipped_updates": grpo.updates_per_iteration - len(norms) + engine.skipped_updates - skipped_before,
        }

    def _trained_transitions(self, update: int, chosen: list[list[MicroBatch]]) -> int:
        """Transitions (of a sample, at a timestep) that count in an update, over all ranks."""
        rows = sum(row.weight > 0 for group in self.dealing.groups_of(update) for batch in chosen[group] for row in batch)
        grpo = self.config.grpo
        return rows * timesteps.count(self.schedule.steps, grpo.timesteps.strategy, grpo.timesteps.fraction)

    # --- watching it --------------------------------------------------------------------------------------------------------

    def evaluation_sets(self) -> dict[str, list[Prompt]]:
        """``train`` and, with ``prompts.eval_path``, ``heldout``: the prompts of each evaluation."""
        sets = {"train": self.prompts[: self.config.run.eval_prompts]}
        if self.eval_prompts:
            sets["heldout"] = self.eval_prompts[: self.config.run.eval_prompts]
        return sets

    def evaluate(self) -> dict[str, float]:
        """``eval/SET/MODEL/OUTPUT/{mean,stderr}``, ``eval/SET/not_finite``: of fixed prompts and noise, by the ODE sampler."""
        metrics = {}
        for name, prompts in self.evaluation_sets().items():
            summary = sample_fixed(self, prompts, self.config.run.eval_samples, "evaluation", keep_media=False).summary()
            metrics.update({f"eval/{name}/{key}": value for key, value in summary.items()})
        return metrics

    def save_pictures(self, finished: int) -> FixedSamples:
        """Save pictures or clips of fixed prompts and noise in ``samples/FINISHED/``, the number of finished iterations."""
        self.status.doing("saving pictures")
        prompts = (self.eval_prompts or self.prompts)[: self.config.run.sample_prompts]
        drawn = sample_fixed(self, prompts, 1, "pictures")
        if drawn.media is not None:
            rewards = drawn.by_sample()
            folder = self.folder / "samples" / f"{finished:06d}"
            shown = zip(prompts, rewards, drawn.faults, strict=True)
            captions = [caption(p.text, r) for p, r, fault in shown if fault is None]
            texts = [p.text for p in prompts]
            with keep_going(folder):
                files = save_samples(folder, drawn.media, texts, rewards, faults=drawn.faults, fps=self.fps)
                self.wandb.log_pictures(max(finished - 1, 0), files, captions)
        return drawn

    def _before_training(self) -> None:
        """Evaluate and save pictures of the starting weights, where the run does so later."""
        if self.config.run.eval_every:
            self.status.doing("evaluation")
            metrics = self.evaluate()
            if self.world.rank == 0:
                with keep_going(self.folder / "evaluation_before.json"):
                    write_atomic(self.folder / "evaluation_before.json", json.dumps(metrics, indent=1).encode())
                self.wandb.log({"iteration": 0, **metrics})
            self.console.evaluation("before training", metrics)
        if self.config.run.sample_every:
            self.save_pictures(0)

    def _save(self, finished: int) -> None:
        """Save a checkpoint of ``finished`` iterations; a disk that refuses ends no run. Weights that are not finite are not
        saved: they would push out a sound checkpoint."""
        self.status.doing("saving a checkpoint")
        engine = self.engine
        assert engine is not None
        if not engine.weights_are_finite():
            if self.world.rank == 0:
                logger.error("iteration %d was not saved: its weights are not finite", finished)
            return

        def write(folder: Path) -> dict[str, Any]:
            (folder / "state").mkdir(exist_ok=True)
            engine.save(folder / "state")
            return {
                "config": config_saved.to_dict(self.config),
                "normalisation": self.normalisation.state(),
                **prompts_state(self.prompts, self.config),
                "images": image_digests(self.prompts),
                "denoiser": self._denoiser_identity,
                "noise": noise.VERSION,
                "rows_apart": self.rows_apart,
                "git_commit": git_commit(),
            }

        if self.store.save(finished, write):
            self._saved = finished
