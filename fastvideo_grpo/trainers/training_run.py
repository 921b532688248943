"""A run around the model it trains: what is set up before the loop, its checkpoints, and how it ends."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fastvideo_grpo.checkpoints.lock import lock_folder
from fastvideo_grpo.checkpoints.resume import check_resumable, image_digests, prompts_state
from fastvideo_grpo.checkpoints.run_status import RunStatus
from fastvideo_grpo.checkpoints.store import CheckpointStore
from fastvideo_grpo.config import saved as config_saved
from fastvideo_grpo.config.keys import make_objective
from fastvideo_grpo.disk.durable_files import write_atomic
from fastvideo_grpo.engines.compiled_blocks import cache_folder
from fastvideo_grpo.errors import ConfigError, UserError
from fastvideo_grpo.grpo import advantages
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.models.run_prompts import prompts_of
from fastvideo_grpo.planning.plan import all_done, dealing
from fastvideo_grpo.prompts.embeddings import encoder_identity
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.prompts.order import PromptOrder
from fastvideo_grpo.sampling import noise
from fastvideo_grpo.tracking.console import Console
from fastvideo_grpo.tracking.metrics import MetricsLog
from fastvideo_grpo.tracking.provenance import git_commit, versions
from fastvideo_grpo.tracking.statistics import Clock
from fastvideo_grpo.tracking.wandb_run import WandbRun
from fastvideo_grpo.trainers.monitoring import Monitor, due
from fastvideo_grpo.trainers.policy import Policy
from fastvideo_grpo.trainers.row_rounding import keep_rows_apart
from fastvideo_grpo.trainers.scoring import Scoring
from fastvideo_grpo.trainers.stopping import EXIT_STOPPED
from fastvideo_grpo.trainers.throughput import throughput

logger = logging.getLogger(__name__)


class TrainingRun:
    """Everything training needs besides the model, made once, before the loop; goes on from the newest whole checkpoint of
    ``run.dir`` if there is one. The folder is this run's until it is left (``with``) or closed.

    Attributes:
        policy: the model, given to ``engine`` here, which trains it.
        folder, status, console: where the run is, what it is doing, and what a person sees of it.
        scoring: its rewards.
        prompts, eval_prompts: trained on, and kept out; ``order``: which of them an iteration has.
        dealing: the samples of an iteration, in micro-batches of each rank.
        objective, normalisation: of the update.
        store, log, wandb: its checkpoints, and its metrics. ``monitor``: shows what becomes of the policy.
        first_iteration: the one to go on with. ``saved``: iterations that the newest checkpoint has.

    Raises:
        UserError: the folder is another run's at work, or holds a checkpoint of other settings; a reward cannot be made.
        ValueError: the prompts are not as they must be, or the samples cannot be dealt evenly.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.config, self.world = policy, policy.config, policy.world
        self.folder = Path(self.config.run.dir)
        self.console = Console(quiet=self.world.rank != 0)
        self.status = RunStatus(self.folder if self.world.rank == 0 else None)
        self._held = ExitStack()
        try:
            self._set_up()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def _set_up(self) -> None:
        policy, config, world = self.policy, self.config, self.world
        world.on_rank_0(lambda: self._held.enter_context(lock_folder(self.folder)))
        self._held.enter_context(self.status)
        if self.status.before is not None:
            logger.warning("%s", self.status.before)
        self.scoring = self._held.enter_context(closing(Scoring(config, world, policy.fps, self.status.rewards)))
        self.prompts = prompts_of(config, config.prompts.path)
        self.eval_prompts = prompts_of(config, config.prompts.eval_path) if config.prompts.eval_path else []
        self.order = PromptOrder(len(self.prompts), config.prompts.seed)
        self.dealing = dealing(config, world.data_size)
        self.dealing.check()
        self.objective = make_objective(config)
        self.normalisation = advantages.get(
            config.grpo.normalisation,
            history_size=config.grpo.history.size,
            history_minimum=config.grpo.history.minimum,
        )
        policy.cache_embeddings([*self.prompts, *self.eval_prompts], self.console)
        self.engine = policy.make_trainable(reference=self.objective.needs_reference)
        if policy.compiled:
            self.console.say(
                f"compiling each kind of block when it is first called, about a minute; {cache_folder()} keeps them for the "
                "next start"
            )
        self.store = CheckpointStore(self.folder / "checkpoints", config.run.keep, world)
        self.log = MetricsLog(self.folder / "metrics.jsonl")
        self._denoiser_identity = encoder_identity(policy.checkpoint, [FAMILIES[config.model.kind].denoiser], {})
        self.first_iteration = self._resume()
        keep_rows_apart(policy, self.prompts[0], self.dealing, self.objective, self.console)
        self.saved = self.first_iteration
        world.on_rank_0(self._write_config)
        made = world.on_rank_0(lambda: WandbRun(config.run.wandb, self.folder, config_saved.to_dict(config)))
        self.wandb = made or WandbRun("disabled", self.folder, {})
        self.monitor = Monitor(
            policy,
            self.scoring,
            self.prompts,
            self.eval_prompts,
            folder=self.folder,
            status=self.status,
            console=self.console,
            log=self.log,
            wandb=self.wandb,
            throughput=throughput(policy),
        )

    def _write_config(self) -> None:
        header = json.dumps({"versions": versions(), "git_commit": git_commit()})
        write_atomic(self.folder / "config.yaml", f"# {header}\n{config_saved.to_yaml(self.config)}".encode())

    def close(self) -> None:
        """Let go of the rewards and of the run's folder; may be called twice."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Say in the run's folder how the run ended, and :meth:`close`."""
        if error is not None:
            self.status.failed(error)
        self.close()

    # --- checkpoints --------------------------------------------------------------------------------------------------

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
        self.engine.load(newest / "state")
        if not self.engine.weights_are_finite():
            raise UserError(
                f"the weights in {newest} are not finite, so that sampling gives NaN: move it out of {self.store.folder} to go "
                "on from the checkpoint before it, or start anew in another run.dir"
            )
        self.normalisation.restore(state["normalisation"])
        self.policy.rows_apart = state["rows_apart"]
        iteration = int(state["iteration"])
        self.world.on_rank_0(lambda: self.log.cut_back(iteration))
        self.console.say(f"resuming {self.folder} after iteration {iteration}")
        return iteration

    def save(self, finished: int) -> None:
        """Save a checkpoint of ``finished`` iterations; a disk that refuses ends no run. Weights that are not finite are not
        saved: they would push out a sound checkpoint."""
        self.status.doing("saving a checkpoint")
        if not self.engine.weights_are_finite():
            if self.world.rank == 0:
                logger.error("iteration %d was not saved: its weights are not finite", finished)
            return

        def write(folder: Path) -> dict[str, Any]:
            (folder / "state").mkdir(exist_ok=True)
            self.engine.save(folder / "state")
            return {
                "config": config_saved.to_dict(self.config),
                "normalisation": self.normalisation.state(),
                **prompts_state(self.prompts, self.config),
                "images": image_digests(self.prompts),
                "denoiser": self._denoiser_identity,
                "noise": noise.VERSION,
                "rows_apart": self.policy.rows_apart,
                "git_commit": git_commit(),
            }

        if self.store.save(finished, write):
            self.saved = finished

    # --- the loop ---------------------------------------------------------------------------------------------------------

    def begin(self) -> bool:
        """Look at the starting weights, before the first iteration; False if none is left."""
        if self.first_iteration >= self.config.run.iterations:
            self.console.say(all_done(self.config, self.first_iteration))
            self.status.end("finished")
            return False
        if self.first_iteration == 0:
            self.monitor.before_training()
        return True

    def draw_prompts(self, iteration: int) -> list[Prompt]:
        """The prompts of an iteration, one of each group."""
        return [self.prompts[i] for i in self.order.draw(iteration, self.config.grpo.prompts_per_iteration)]

    def finish_iteration(self, finished: int, metrics: dict[str, Any], clock: Clock) -> None:
        """Log and look at what an iteration made, and save a checkpoint if it is due; ``finished`` iterations are done."""
        self.monitor.after_iteration(finished, metrics, clock)
        if due(self.config.run.save_every, finished, self.config.run.iterations):
            self.save(finished)

    def stop(self, finished: int) -> None:
        """Leave with ``finished`` iterations done, saved (before the first one there is nothing to save)."""
        if self.saved != finished:
            self.save(finished)
        self.wandb.finish()
        if self.saved != finished:
            raise UserError(f"asked to stop, but iteration {finished} was not saved in {self.store.folder}: see above")
        self.status.end("stopped")
        self.console.say(
            f"stopped by SIGUSR1 after iteration {finished} of {self.config.run.iterations}, saved in {self.folder}: start the "
            f"same command again to go on (exit code {EXIT_STOPPED})"
        )

    def finish(self) -> None:
        """Leave with all iterations done.

        Raises:
            UserError: the last one could not be saved.
        """
        self.wandb.finish()
        if self.saved != self.config.run.iterations:
            raise UserError(f"the last iteration could not be saved in {self.store.folder}; see the error above")
        self.status.end("finished")
