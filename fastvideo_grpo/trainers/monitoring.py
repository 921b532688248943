"""What is seen of a run while it goes on: metrics, and evaluations and pictures of fixed prompts and noise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo_grpo.checkpoints.run_status import RunStatus
from fastvideo_grpo.disk.durable_files import keep_going, write_atomic
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.tracking.console import Console
from fastvideo_grpo.tracking.metrics import MetricsLog
from fastvideo_grpo.tracking.pictures import caption, save_samples
from fastvideo_grpo.tracking.statistics import Clock, memory_metrics
from fastvideo_grpo.tracking.wandb_run import WandbRun
from fastvideo_grpo.trainers.fixed_set import FixedSamples, sample_fixed
from fastvideo_grpo.trainers.policy import Policy
from fastvideo_grpo.trainers.scoring import Scoring
from fastvideo_grpo.trainers.throughput import Throughput


@dataclass
class Monitor:
    """Shows and writes what becomes of a policy; a disk that refuses ends no run.

    ``folder``: of the run. ``prompts``, ``eval_prompts``: those that are trained on, and those kept out. ``throughput``: what
    it logs of an iteration's speed.
    """

    policy: Policy
    scoring: Scoring
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    folder: Path
    status: RunStatus
    console: Console
    log: MetricsLog
    wandb: WandbRun
    throughput: Throughput
    _compiled_before: bool = False

    def evaluation_sets(self) -> dict[str, list[Prompt]]:
        """``train`` and, with ``prompts.eval_path``, ``heldout``: the prompts of each evaluation."""
        config = self.policy.config.run
        sets = {"train": self.prompts[: config.eval_prompts]}
        if self.eval_prompts:
            sets["heldout"] = self.eval_prompts[: config.eval_prompts]
        return sets

    def evaluate(self) -> dict[str, float]:
        """``eval/SET/MODEL/OUTPUT/{mean,stderr}``, ``eval/SET/not_finite``: of fixed prompts and noise, by the ODE sampler."""
        samples = self.policy.config.run.eval_samples
        metrics = {}
        for name, prompts in self.evaluation_sets().items():
            drawn = sample_fixed(self.policy, self.scoring, prompts, samples, "evaluation", keep_media=False)
            metrics.update({f"eval/{name}/{key}": value for key, value in drawn.summary().items()})
        return metrics

    def save_pictures(self, finished: int) -> FixedSamples:
        """Save pictures or clips of fixed prompts and noise in ``samples/FINISHED/``, the number of finished iterations."""
        self.status.doing("saving pictures")
        prompts = (self.eval_prompts or self.prompts)[: self.policy.config.run.sample_prompts]
        drawn = sample_fixed(self.policy, self.scoring, prompts, 1, "pictures")
        if drawn.media is not None:
            rewards = drawn.by_sample()
            folder = self.folder / "samples" / f"{finished:06d}"
            shown = zip(prompts, rewards, drawn.faults, strict=True)
            captions = [caption(p.text, r) for p, r, fault in shown if fault is None]
            texts = [p.text for p in prompts]
            with keep_going(folder):
                files = save_samples(folder, drawn.media, texts, rewards, faults=drawn.faults, fps=self.policy.fps)
                self.wandb.log_pictures(max(finished - 1, 0), files, captions)
        return drawn

    def before_training(self) -> None:
        """Evaluate and save pictures of the starting weights, where the run does so later."""
        config = self.policy.config.run
        if config.eval_every:
            self.status.doing("evaluation")
            metrics = self.evaluate()
            if self.policy.world.rank == 0:
                with keep_going(self.folder / "evaluation_before.json"):
                    write_atomic(self.folder / "evaluation_before.json", json.dumps(metrics, indent=1).encode())
                self.wandb.log({"iteration": 0, **metrics})
            self.console.evaluation("before training", metrics)
        if config.sample_every:
            self.save_pictures(0)

    def note_compilations(self, finished: int, metrics: dict[str, Any]) -> None:
        """Count what torch compiled in an iteration, ``perf/compilations``; after the run's first one say what, and why."""
        compilations = self.policy.compilations
        if compilations is None:
            return
        new = compilations.new()
        metrics["perf/compilations"] = len(new)
        if self._compiled_before:
            for each in new:
                why = "" if each.reason is None else f": {each.reason.splitlines()[0]}"
                self.console.say(f"iteration {finished}: compiled {each.function}, {each.seconds:.0f} s{why}")
        self._compiled_before = True

    def after_iteration(self, finished: int, metrics: dict[str, Any], clock: Clock) -> None:
        """Evaluate where it is due, log ``metrics`` with it, and save pictures where they are; ``finished`` iterations are
        done."""
        config, world = self.policy.config.run, self.policy.world
        if due(config.eval_every, finished, config.iterations):
            with clock.phase("evaluation"):
                metrics.update(self.evaluate())
        self.note_compilations(finished, metrics)
        metrics.update({f"time/{phase}": seconds for phase, seconds in clock.seconds.items()})
        metrics.update(self.throughput.metrics(clock))
        metrics.update(memory_metrics(world))
        if world.rank == 0:
            with keep_going(self.log.path):
                self.log.append(metrics)
            self.wandb.log(metrics)
        self.console.iteration(finished, config.iterations, metrics)
        if due(config.sample_every, finished, config.iterations):
            self.save_pictures(finished)


def due(every: int, finished: int, iterations: int) -> bool:
    """Whether what happens every so many iterations (0: never) happens after ``finished``; after the last it does."""
    return every > 0 and (finished % every == 0 or finished == iterations)
