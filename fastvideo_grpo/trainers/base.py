"""Algorithm 1, once, for every model.

``GRPOTrainer.train`` reads beside SPEC section 2. What a model must say for itself are the methods that raise
NotImplementedError; everything here works on the tensors they return.
"""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor, nn

from fastvideo_grpo import config as configuration
from fastvideo_grpo.checkpoints.resume import check_resumable, image_digests, prompts_digest
from fastvideo_grpo.checkpoints.store import CheckpointStore, write_atomic
from fastvideo_grpo.config import Config, ConfigError
from fastvideo_grpo.engines.base import Engine
from fastvideo_grpo.engines.lora import add_lora, lora_disabled
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.engines.residency import resident
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.evaluation.fixed_set import FixedSamples, sample_fixed
from fastvideo_grpo.families import FAMILIES, lora_settings, prompts_of
from fastvideo_grpo.grpo import objectives, timesteps
from fastvideo_grpo.grpo.advantages import Advantages, normalisation
from fastvideo_grpo.grpo.selection import Row, best_of, pairs, regroup
from fastvideo_grpo.plan import dealing
from fastvideo_grpo.precision import DTYPES
from fastvideo_grpo.prompts.embeddings import Conditioning, EmbeddingCache, encoder_identity
from fastvideo_grpo.prompts.files import Prompt, text_id
from fastvideo_grpo.prompts.order import PromptOrder
from fastvideo_grpo.rewards.base import RewardRequest
from fastvideo_grpo.rewards.reward_set import PendingScores, RewardSet, ScoredBatch
from fastvideo_grpo.sampling import noise, schedules, transitions
from fastvideo_grpo.sampling.noise import SampleKey
from fastvideo_grpo.sampling.rollout import Trajectory, Walk
from fastvideo_grpo.sampling.schedules import Level, Schedule
from fastvideo_grpo.tracking.console import Console
from fastvideo_grpo.tracking.metrics import MetricsLog
from fastvideo_grpo.tracking.pictures import caption, save_samples
from fastvideo_grpo.tracking.provenance import git_commit, versions
from fastvideo_grpo.tracking.statistics import Clock, UpdateStatistics, memory_metrics
from fastvideo_grpo.tracking.wandb_run import WandbRun
from fastvideo_grpo.trainers.replay import TrajectoryReplay
from fastvideo_grpo.trainers.stopping import EXIT_STOPPED, StopSignal

logger = logging.getLogger(__name__)

MAX_PENDING = 4
"""Micro-batches that may wait to be scored (``rewards.async``): their media take host memory."""


_MARGIN_S = 60.0  # of what processes wait for each other, for what is no failure of a reward


class TooManyInvalidRewards(UserError):
    """More samples of an iteration could not be scored than ``rewards.max_invalid_fraction`` allows."""


@dataclass(frozen=True)
class Drawn:
    """A micro-batch of samples.

    ``media`` uint8 ``[B, F, H, W, 3]`` on the CPU, on the leader of a sequence-parallel group only; ``finite`` bool ``[B]``:
    whether the final latents are (NaN pixels would become a black picture, which a reward would score); ``trajectory``, if
    it was recorded.
    """

    media: Tensor | None
    finite: Tensor
    trajectory: Trajectory | None


@dataclass
class Rollout:
    """What this rank drew in an iteration, and what everybody's rewards say of it.

    ``latents`` ``(group, member) -> [T + 1, ...]``, ``log_probs`` ``(group, member) -> [T]``: this rank's samples, none where
    the leader of its sequence-parallel group has them.
    ``scores``, ``valid``: reward name -> ``[P, G]``, all samples. ``retried``: requests to rewards that were made again.
    """

    prompts: list[Prompt]
    latents: dict[tuple[int, int], Tensor]
    log_probs: dict[tuple[int, int], Tensor]
    scores: dict[str, Tensor]
    raw: dict[str, Tensor]
    valid: dict[str, Tensor]
    retried: int


class GRPOTrainer:
    """GRPO on a generator. A subclass loads the model, then calls :meth:`setup`."""

    text_encoders: ClassVar[tuple[str, ...]] = ()
    tokenizers: ClassVar[tuple[str, ...]] = ()

    config: Config
    world: World
    engine: Engine | None = None
    rewards: RewardSet

    # --- what a model must say for itself -----------------------------------------------------------------------------

    def encode(self, prompts: list[Prompt]) -> list[Conditioning]:
        """Conditioning of each prompt, tensors ``[1, ...]``. A prompt's must not depend on the others in the list."""
        raise NotImplementedError

    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample's initial noise."""
        raise NotImplementedError

    def network_output(self, sample: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
        """One pass of ``self.network`` at ``sample`` ``[B, ...]``, with gradients when they are enabled."""
        raise NotImplementedError

    def decode(self, latents: Tensor, differentiable: bool = False) -> Tensor:
        """Final latents -> uint8 ``[B, F, H, W, 3]`` on the CPU, or float in [0, 1] with gradients."""
        raise NotImplementedError

    def generate(self, conditioning: Conditioning, initial: Tensor, walk: Walk) -> Drawn:
        """From noise to media, through the model's own pipeline; media on the leader of a sequence-parallel group only.

        Args:
            conditioning: tensors ``[B, ...]``.
            initial: float32 ``[B, *latent_shape()]`` on the CPU.
        """
        raise NotImplementedError

    def get_module(self, name: str) -> Any:
        """A loaded component by its name in model_index.json; None where it was left on disk."""
        raise NotImplementedError

    def release_text_encoders(self) -> None:
        """Let the text encoders leave memory: every embedding that will be asked for is cached."""
        raise NotImplementedError

    def checkpoint_activations(self, every: int) -> nn.Module:
        """The network with every ``every``-th block recomputed in the backward pass (``engine.activation_checkpointing``)."""
        raise NotImplementedError

    # --- what a model may say besides -----------------------------------------------------------------------------------

    def forward_context(self, conditioning: Conditioning | None = None) -> AbstractContextManager[Any]:
        """Entered around every forward and backward of the network with this conditioning, and around text encoders."""
        return nullcontext()

    def join(self, first: Conditioning, second: Conditioning) -> Conditioning:
        """Two micro-batches' conditioning as one of both, ``[2 B, ...]`` (``model.cfg_batched``); a model whose texts differ in
        length overrides it."""
        return {name: torch.cat([tensor, second[name]]) for name, tensor in first.items()}

    def make_schedule(self) -> Schedule:
        """The sampling schedule; a model of another paradigm overrides it."""
        return schedules.flow(self.config.sample.steps, self.config.sample.shift)

    # --- the loaded components --------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> nn.Module:
        """The network that is trained, as loaded."""
        return self.get_module(FAMILIES[self.config.model.kind].denoiser)

    @property
    def checkpoint(self) -> Path:
        """The folder the model was loaded from."""
        return Path(self.config.model.path)

    def vae_on_device(self) -> AbstractContextManager[Any]:
        """Entered around every use of the VAE; with ``engine.offload_idle`` it is in host memory outside."""
        return self._on_device("vae")

    def text_encoders_on_device(self) -> AbstractContextManager[Any]:
        """Entered around every use of the text encoders; with ``engine.offload_idle`` they are in host memory outside."""
        return self._on_device(*self.text_encoders)

    def _on_device(self, *names: str) -> AbstractContextManager[Any]:
        stack = ExitStack()
        for name in names if self.config.engine.offload_idle else ():
            stack.enter_context(resident(self.get_module(name), self.world.device))
        return stack

    @staticmethod
    def to_media(pixels: Tensor) -> Tensor:
        """Float ``[B, 3, F, H, W]`` in [0, 1] -> uint8 ``[B, F, H, W, 3]`` on the CPU, rounded as diffusers."""
        return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().cpu()

    # --- setting up ---------------------------------------------------------------------------------------------------

    def setup(self, config: Config, world: World) -> None:
        """Everything a loaded model needs to sample."""
        self.config, self.world = config, world
        self.dtype = DTYPES[config.model.precision]
        self.schedule = self.make_schedule()
        self.transition = transitions.get(
            config.sample.transition, noise_level=config.sample.noise_level, noise_decay=config.sample.noise_decay
        )
        self._conditioning: dict[str, Conditioning] = {}
        self._cache: EmbeddingCache | None = None
        if config.model.lora is not None:
            add_lora(self.denoiser, lora_settings(config), config.run.seed)
        else:
            self.denoiser.requires_grad_(True)
        self.denoiser.eval()

    def setup_rewards(self) -> None:
        """Make the configured rewards on the ranks that score; the others learn their names. An error is every rank's."""
        config = self.config.rewards

        def make(elsewhere: dict[str, tuple[str, ...]] | None = None) -> RewardSet:
            return RewardSet(
                config.models,
                device=self.world.device,
                offload_idle=self.config.engine.offload_idle,
                timeout_s=config.timeout_s,
                retries=config.retries,
                backoff_s=config.backoff_s,
                elsewhere=elsewhere,
            )

        error = None
        if self.world.leads:
            try:
                self.rewards = make()
                self.rewards.check_frames(self.config.sample.frames)
            except (ValueError, UserError, OSError, ImportError) as failure:  # what rewards raise for the user
                error = str(failure)
        errors = [failure for failure in self.world.all_gather_object(error) if failure is not None]
        if errors:
            raise ConfigError(errors[0])
        found = self.world.broadcast_object(self.rewards.outputs if self.world.leads else None)
        if not self.world.leads:
            self.rewards = make(found)
        attempt = config.timeout_s + max(self.world.all_gather_object(self.rewards.restart_s))
        if self.world.size > 1 and attempt + _MARGIN_S >= 60 * self.config.run.timeout_minutes:
            raise ConfigError(
                f"a reward's process took long to start, so that a request may take {attempt:.0f} s where it has to be started "
                f"anew, and the other processes give up after run.timeout_minutes={self.config.run.timeout_minutes}: set "
                f"run.timeout_minutes to at least {math.ceil(2 * (attempt + _MARGIN_S) / 60)}, or rewards.timeout_s lower"
            )

    def begin_scoring(self, failures: float = math.inf) -> None:
        """Begin an iteration's or an evaluation's requests to the rewards (:meth:`RewardSet.begin`).

        Where other processes wait, they give up after ``run.timeout_minutes``: a reward's failures may take as much of it as
        leaves an attempt room.
        """
        attempt = self.config.rewards.timeout_s + self.rewards.restart_s
        patience = 60.0 * self.config.run.timeout_minutes - attempt - _MARGIN_S
        self.rewards.begin(failures, patience if self.world.size > 1 else math.inf)

    def setup_training(self) -> None:
        """Everything training needs besides: rewards, prompts, dealing, engine, checkpoints, logs; resumes if it can."""
        config, world = self.config, self.world
        self.folder = Path(config.run.dir)
        self.console = Console(quiet=world.rank != 0)
        self.setup_rewards()
        self.prompts = prompts_of(config, config.prompts.path)
        self.eval_prompts = prompts_of(config, config.prompts.eval_path) if config.prompts.eval_path else []
        self.order = PromptOrder(len(self.prompts), config.prompts.seed)
        self.dealing = dealing(config, world.data_size)
        self.dealing.check()
        self.objective = configuration.make_objective(config)
        self.normalisation = normalisation(
            config.grpo.normalisation,
            history_size=config.grpo.history.size,
            history_minimum=config.grpo.history.minimum,
        )
        self.cache_embeddings([*self.prompts, *self.eval_prompts])
        if self.objective.needs_reference and config.model.lora is None:
            self._reference = self.make_reference()
        self._lock = self.world.on_rank_0(lambda: lock_folder(self.folder))
        self.engine = make_engine(self)
        self.store = CheckpointStore(self.folder / "checkpoints", config.run.keep, world)
        self.log = MetricsLog(self.folder / "metrics.jsonl")
        self._denoiser_identity = encoder_identity(self.checkpoint, [FAMILIES[config.model.kind].denoiser], {})
        try:
            self.first_iteration = self._resume()
        except BaseException:
            self.unlock()
            raise
        self._saved = self.first_iteration
        if world.rank == 0:
            header = json.dumps({"versions": versions(), "git_commit": git_commit()})
            write_atomic(self.folder / "config.yaml", f"# {header}\n{configuration.to_yaml(config)}".encode())
        mode = config.run.wandb if world.rank == 0 else "disabled"
        self.wandb = WandbRun(mode, self.folder, configuration.to_dict(config))

    def cache_embeddings(self, prompts: Sequence[Prompt]) -> None:
        """With an embedding folder: encode what is missing there, and let the text encoders go."""
        if self.config.prompts.embeddings == "none":
            return
        self._cache = embedding_cache(self.config, self.checkpoint, type(self), self.world)
        prompts = to_encode(prompts, self.config)
        if self._cache.missing(prompts):  # else they were not even loaded
            with torch.no_grad(), self.forward_context(), self.text_encoders_on_device():
                self._cache.fill(prompts, self.encode, self.console.say, self.console.progress("encoding prompts"))
        self.release_text_encoders()

    def _resume(self) -> int:
        """Load the newest whole checkpoint of this run, if there is one; returns the iteration to go on with."""
        self.store.clean()
        newest = self.store.newest()
        if newest is None:
            if self.store.iterations():
                raise ConfigError(
                    f"every checkpoint in {self.store.folder} is damaged; to start over, choose another run.dir or move "
                    "the folder away"
                )
            if self.world.rank == 0:
                self.log.cut_back(0)
            return 0
        state = self.store.load_trainer_json(newest)
        check_resumable(state, self.config, self.prompts, self._denoiser_identity)
        assert self.engine is not None
        self.engine.load(newest / "state")
        self.normalisation.restore(state.get("normalisation", {}))  # runs from before there was another one have none
        iteration = int(state["iteration"])
        if self.world.rank == 0:
            self.log.cut_back(iteration)
        self.console.say(f"resuming {self.folder} after iteration {iteration}")
        return iteration

    # --- the network ----------------------------------------------------------------------------------------------------

    @property
    def network(self) -> nn.Module:
        """What ``predict`` calls: the engine's module, or the reference while :meth:`reference_weights` is entered."""
        if self._inside_reference and self._reference is not None:
            return self._reference
        return self.denoiser if self.engine is None else self.engine.module

    _reference: nn.Module | None = None
    _inside_reference = False

    @contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Within, the network is the starting one: LoRA switched off, or the frozen copy."""
        self._inside_reference = True
        try:
            with lora_disabled(self.denoiser) if self.config.model.lora is not None else nullcontext():
                yield
        finally:
            self._inside_reference = False

    def make_reference(self) -> nn.Module:
        """A frozen copy of the starting weights, before the engine takes the network."""
        return copy.deepcopy(self.denoiser).requires_grad_(False)

    def predict(self, sample: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
        """The network's output at ``sample`` ``[B, ...]``, with gradients when they are enabled, guidance included.

        With classifier-free guidance of scale w (``sample.cfg_scale``) it is u + w (c - u), where c is the output for the
        prompt and u that for the negative prompt: both are functions of the weights, and both get gradients (Ho and Salimans
        2022, arXiv:2207.12598; SPEC section 2). With ``grpo.cfg_gradients=conditional`` u counts as a constant.
        """
        positive, negative = split_guidance(conditioning)
        if negative is None:
            return self.network_output(sample, level, positive)
        constant = self.config.grpo.cfg_gradients == "conditional"
        if self.config.model.cfg_batched:
            twice = Level(*(torch.cat([part, part]) for part in (level.alpha, level.sigma, level.timestep)))
            output = self.network_output(torch.cat([sample, sample]), twice, self.join(negative, positive))
            unconditional, conditional = output.float().chunk(2)
            if constant:
                unconditional = unconditional.detach()
        else:
            with torch.no_grad() if constant else nullcontext():
                unconditional = self.network_output(sample, level, negative).float()
            conditional = self.network_output(sample, level, positive).float()
        return unconditional + self.config.sample.cfg_scale * (conditional - unconditional)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put trained weights (names without wrappers) into the network, before there is an engine.

        Raises:
            UserError: they are those of another model, or LoRA on one side only.
        """
        trained = {name for name, p in self.denoiser.named_parameters() if p.requires_grad}
        if set(weights) != trained:
            wrong = sorted(trained.symmetric_difference(weights))
            raise UserError(
                f"the checkpoint's weights do not fit {self.checkpoint}: {len(wrong)} names are on one side "
                f"only, first {wrong[0]}"
            )
        self.denoiser.load_state_dict(weights, strict=False)

    def conditioning(self, prompt: Prompt, count: int) -> Conditioning:
        """The prompt's conditioning for a micro-batch of ``count``: tensors ``[count, ...]`` on the device, contiguous.

        With classifier-free guidance that of its negative prompt, too, under names that begin with ``NEGATIVE``.
        """
        one = dict(self._encoded(prompt))
        if self.config.sample.cfg_scale > 1:
            negative = self._encoded(negative_of(prompt, self.config))
            one.update({f"{NEGATIVE}{name}": tensor for name, tensor in negative.items()})
        # An expanded view (stride 0) takes other kernels than a real batch: log-probs would differ in bf16.
        return {name: t.to(self.world.device).repeat_interleave(count, dim=0).contiguous() for name, t in one.items()}

    def _encoded(self, prompt: Prompt) -> Conditioning:
        """A prompt's conditioning, tensors ``[1, ...]``: from the cache, or from the encoders."""
        if self._cache is not None:
            return self._cache.get(prompt)
        if prompt.id not in self._conditioning:
            with torch.no_grad(), self.forward_context(), self.text_encoders_on_device():
                # Kept for the update of the same iteration.
                (self._conditioning[prompt.id],) = self.encode([prompt])
        return self._conditioning[prompt.id]

    def forget_conditioning(self, prompt: Prompt | None = None) -> None:
        """Let go of what a prompt was encoded to, or all of them (a few megabytes each); what is cached on disk stays there."""
        if prompt is None:
            self._conditioning.clear()
        else:
            self._conditioning.pop(prompt.id, None)

    def draw(self, prompt: Prompt, keys: Sequence[SampleKey], *, deterministic: bool = False) -> Drawn:
        """Sample a micro-batch of one prompt; ``deterministic``: the ODE sampler, nothing recorded, noise per sample."""
        shape = self.latent_shape()
        shared = self.config.sample.init_noise == "shared" and not deterministic
        initial = noise.initial_noise(list(keys), shape, shared=shared)
        walk = Walk(
            self.schedule,
            self.transition.deterministic() if deterministic else self.transition,
            lambda i: self.pack(noise.step_noise(list(keys), shape, i)),
            record=not deterministic and self.world.leads,
        )
        return self.generate(self.conditioning(prompt, len(keys)), initial, walk)

    def score(self, prompt: Prompt, media: Tensor) -> ScoredBatch:
        """What the rewards say of samples of one prompt, ``media`` uint8 ``[B, F, H, W, 3]``."""
        return self.submit_for_scores(prompt, media).result()

    def submit_for_scores(self, prompt: Prompt, media: Tensor) -> PendingScores:
        """Like :meth:`score`, whose result comes later."""
        count = len(media)
        return self.rewards.submit(
            RewardRequest([prompt.text] * count, media, fps=self.fps, metadata=[prompt.metadata] * count)
        )

    @property
    def fps(self) -> float | None:
        """Frames a second of a video; None for images."""
        return float(self.config.sample.fps) if self.config.sample.frames > 1 else None

    def pack(self, latents: Tensor) -> Tensor:
        """Noise in :meth:`latent_shape` -> the shape of the sampler's states, where a model packs them."""
        return latents

    # --- Algorithm 1 ------------------------------------------------------------------------------------------------------

    def train(self, stop: StopSignal | None = None) -> bool:
        """Iterations of Algorithm 1, from where the run stands to ``run.iterations``.

        Returns:
            True when all of them are done; False when ``stop`` asked to leave before, and what was trained is saved.

        Raises:
            TooManyInvalidRewards: after saving what was trained so far.
        """
        config = self.config.run
        if self.first_iteration >= config.iterations:
            self.console.say(f"{self.folder} has its {config.iterations} iterations; raise run.iterations to go on")
            self.unlock()
            return True
        if self.first_iteration == 0:
            self._evaluate_and_picture(0)
        for iteration in range(self.first_iteration, config.iterations):
            if stop is not None and stop.agreed(self.world):
                self._stop(iteration)
                return False
            clock = Clock()
            groups = [self.prompts[i] for i in self.order.draw(iteration, self.config.grpo.prompts_per_iteration)]
            rollout = self.rollout(iteration, groups, clock)
            metrics = self._reward_metrics(iteration, rollout)
            advantages = self.normalisation(
                rollout.scores, rollout.valid, self.rewards.weights, [prompt.id for prompt in groups]
            )
            metrics["advantage/zero_spread_groups"] = int(advantages.zero_spread.sum())
            chosen = self.select(advantages)
            metrics.update(self.update(iteration, rollout, advantages, chosen, clock))
            self._finish_iteration(iteration + 1, metrics, clock)
        self.wandb.finish()
        self.unlock()
        if self._saved != config.iterations:
            raise UserError(f"the last iteration could not be saved in {self.store.folder}; see the error above")
        return True

    def _stop(self, finished: int) -> None:
        """Leave with ``finished`` iterations done, saved (before the first one there is nothing to save)."""
        if self._saved != finished:
            self._save(finished)
        self.wandb.finish()
        self.unlock()
        if self._saved != finished:
            raise UserError(f"asked to stop, but iteration {finished} was not saved in {self.store.folder}: see above")
        self.console.say(
            f"stopped by SIGUSR1 after iteration {finished} of {self.config.run.iterations}, saved in {self.folder}: start the "
            f"same command again to go on (exit code {EXIT_STOPPED})"
        )
        self.world.barrier()  # torchrun ends the others when one of them has left, and rank 0 had most to do

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
            self.picture(finished)
        if due(config.save_every):
            self._save(finished)

    def unlock(self) -> None:
        """Let another process train in this run's folder."""
        if self.world.rank == 0:
            self._lock.close()

    def rollout(self, iteration: int, groups: list[Prompt], clock: Clock) -> Rollout:
        """Steps 1 to 3: sample this rank's micro-batches, score them, and gather everybody's scores.

        With ``rewards.async`` the rewards look at a micro-batch while the next ones are sampled. Scoring itself exchanges
        nothing between ranks, so it cannot deadlock; a rank that waits for a reward (always without ``async``) lets those
        wait that share its samples' tokens or weights, which ``rewards.timeout_s`` bounds.
        """
        latents: dict[tuple[int, int], Tensor] = {}
        log_probs: dict[tuple[int, int], Tensor] = {}
        names = self.rewards.names
        shape = (len(groups), self.config.grpo.group_size)
        table = torch.zeros(3, len(names), *shape, dtype=torch.float32)  # score, raw score, valid
        self.forget_conditioning()
        jobs = self.dealing.rollout(self.world.data_rank)
        show = self.console.progress(f"iteration {iteration + 1}: sampling")
        self.begin_scoring(self.config.rewards.max_invalid_fraction * math.prod(shape))
        retried = self.rewards.retried.total()
        pending: deque[tuple[int, Sequence[int], Tensor, PendingScores]] = deque()

        def collect() -> None:
            group, members, sound, scores = pending.popleft()
            with clock.phase("reward"):
                scored = scores.result()
            for k, name in enumerate(names):
                valid = scored.valid[name] & sound
                table[0, k, group, members] = torch.where(valid, scored.scores[name], 0.0)
                table[1, k, group, members] = torch.where(valid, scored.raw[name], 0.0)
                table[2, k, group, members] = valid.float()

        for done, (group, members) in enumerate(jobs, start=1):
            prompt = groups[group]
            keys = [SampleKey(self.config.run.seed, iteration, group, prompt.id, member) for member in members]
            with clock.phase("rollout"):
                drawn = self.draw(prompt, keys)
            show(done, len(jobs))
            if not self.world.leads:
                continue  # the leader of the group decoded, scores and keeps the same samples
            assert drawn.trajectory is not None and drawn.media is not None
            sound = self._sound(drawn, drawn.trajectory)
            for row, member in enumerate(members):
                states, densities = drawn.trajectory.latents[row], drawn.trajectory.log_probs[row]
                # A masked sample may still fill a micro-batch: as zeros, since weight 0 times NaN is NaN in the gradient.
                latents[group, member] = states if sound[row] else torch.zeros_like(states)
                log_probs[group, member] = densities if sound[row] else torch.zeros_like(densities)
            pending.append((group, members, sound, self.submit_for_scores(prompt, drawn.media)))
            if not self.config.rewards.async_ or len(pending) > MAX_PENDING:
                collect()
        while pending:
            collect()
        # Each sample was scored by one rank, and the others have 0 there: the sum is exact.
        table = self.world.all_gather_rows(table[None]).sum(0)
        by_name = [{name: part[k] for k, name in enumerate(names)} for part in table]
        scored_ok = {name: part.bool() for name, part in by_name[2].items()}
        retried = int(
            self.world.all_reduce_sum(torch.tensor([float(self.rewards.retried.total() - retried)], dtype=torch.float64))[0]
        )
        return Rollout(groups, latents, log_probs, by_name[0], by_name[1], scored_ok, retried)

    def _sound(self, drawn: Drawn, trajectory: Trajectory) -> Tensor:
        """Samples whose latents and trainable log-probs are finite, ``[B]``; the others are masked, counted and named."""
        last = trajectory.log_probs.shape[1] - 1
        sound = drawn.finite & trajectory.log_probs[:, :last].isfinite().all(1)
        if not bool(sound.all()):
            message = "sampling: latents or log-probs are not finite"
            if message not in self.rewards.failure_counts:
                logger.warning("%s (%d of %d samples masked; told once, counted always)", message, (~sound).sum(), len(sound))
            self.rewards.failure_counts[message] += 1
        return sound

    def _reward_metrics(self, iteration: int, rollout: Rollout) -> dict[str, Any]:
        """Numbers of an iteration's rewards; saves what was trained and raises when too many samples have none."""
        metrics: dict[str, Any] = {"iteration": iteration, "reward/retried": rollout.retried}
        counted = torch.stack([rollout.valid[name] for name, weight in self.rewards.weights.items() if weight != 0]).all(0)
        total, failed = counted.numel(), int((~counted).sum())
        for name in self.rewards.names:
            valid = rollout.valid[name]
            values = rollout.raw[name][valid].double()
            invalid = int((~valid).sum())
            metrics[f"reward/{name}/mean"] = values.mean().item() if len(values) else math.nan
            metrics[f"reward/{name}/std"] = values.std().item() if len(values) > 1 else math.nan
            metrics[f"reward/{name}/max"] = values.max().item() if len(values) else math.nan
            metrics[f"reward/{name}/invalid"] = invalid
            if self.rewards.transforms[name].threshold is not None:
                above = rollout.scores[name][valid].double().abs()  # 0 and 1, or 0 and -1 where inverted
                metrics[f"reward/{name}/above_threshold"] = above.mean().item() if len(above) else math.nan
        if failed > self.config.rewards.max_invalid_fraction * total:
            reasons = [reason for rank in self.world.all_gather_object(dict(self.rewards.failure_counts)) for reason in rank]
            if self._saved != iteration:
                self._save(iteration)
            raise TooManyInvalidRewards(
                f"{failed} of {total} samples of this iteration could not be scored, more than rewards.max_invalid_fraction="
                f"{self.config.rewards.max_invalid_fraction} allows: {'; '.join(sorted(set(reasons))) or 'no reason given'}. "
                "What was trained before it is saved; repair the reward and start the same command again"
            )
        return metrics

    def select(self, advantages: Advantages) -> list[list[list[Row]]]:
        """Which members of each group are trained on: for each group its update micro-batches of rows."""
        size, best = self.config.engine.micro_batch_size, self.config.grpo.best_of
        chosen = []
        for values, valid in zip(advantages.values, advantages.valid, strict=True):
            if best is None:
                members = [i for i, ok in enumerate(valid.tolist()) if ok]
            elif self.objective.pairs:
                members = pairs(values, valid, best.top)
            else:
                members = best_of(values, valid, best.top, best.bottom)
            chosen.append(regroup(members, self.dealing.slots, size))
        return chosen

    def update(
        self, iteration: int, rollout: Rollout, advantages: Advantages, chosen: list[list[list[Row]]], clock: Clock
    ) -> dict[str, Any]:
        """Steps 5 and 6: the optimiser steps of an iteration, over replays of the rollout's micro-batches."""
        engine = self.engine
        assert engine is not None
        grpo = self.config.grpo
        stats = UpdateStatistics()
        norms: list[float] = []
        skipped_before = engine.skipped_updates
        lr = engine.lr
        for update in range(grpo.updates_per_iteration):
            counted = self._counted_draws(update, chosen)
            if counted == 0:
                continue  # no sample of these prompts counts, on all ranks alike
            batches = self.dealing.update(update, self.world.data_rank)
            with clock.phase("exchange"):
                rows = self._fetch_rows(update, rollout, chosen)
            per_sample = timesteps.count(self.schedule.steps, grpo.timesteps.strategy, grpo.timesteps.fraction)
            engine.accumulate(len(batches) * per_sample)
            show = self.console.progress(f"iteration {iteration + 1}: update {update + 1}/{grpo.updates_per_iteration}")
            for done, (group, k) in enumerate(batches, start=1):
                members = chosen[group][k]
                keys = [SampleKey(self.config.run.seed, iteration, group, rollout.prompts[group].id, r.member) for r in members]
                when = timesteps.choose(
                    keys, self.schedule.steps, grpo.timesteps.strategy, grpo.timesteps.fraction, grpo.timesteps.per
                )
                latents = torch.stack([rows["latents", group, r.member] for r in members])
                log_probs = torch.stack([rows["log_probs", group, r.member] for r in members])
                samples = objectives.SampleBatch(
                    advantages=advantages.values[group, [r.member for r in members]].to(self.world.device),
                    log_probs=log_probs.gather(1, when).to(self.world.device),
                    timesteps=when,
                    weights=torch.tensor([r.weight for r in members], device=self.world.device),
                )
                conditioning = self.conditioning(rollout.prompts[group], len(members))
                replay = TrajectoryReplay(self, latents, when, conditioning, rollout.prompts[group])
                for i in range(per_sample):
                    with clock.phase("update"), self.forward_context(conditioning):
                        loss, info = self.objective.loss(replay, samples, i)
                        # Gradients are summed over all processes, and those that share a sample have the same loss.
                        loss = (loss * samples.weights).sum() / counted / self.world.sequence_parallel
                        engine.backward(loss)
                    stats.add(loss, info, samples.weights, first=not norms)
                show(done, len(batches))
            with clock.phase("update"):
                norms.append(engine.step())
        finite = [norm for norm in norms if math.isfinite(norm)]
        if not norms:
            logger.warning("iteration %d made no update: no sample counts (all masked, or no pair differs)", iteration + 1)
        return {
            **stats.summary(self.world),
            "train/grad_norm": sum(finite) / len(finite) if finite else math.nan,
            "train/lr": lr,
            "train/updates": len(finite),
            "train/skipped_updates": grpo.updates_per_iteration - len(norms) + engine.skipped_updates - skipped_before,
        }

    def _counted_draws(self, update: int, chosen: list[list[list[Row]]]) -> int:
        """(sample, timestep) pairs that count in an update, over all ranks."""
        rows = sum(row.weight > 0 for group in self.dealing.groups_of(update) for batch in chosen[group] for row in batch)
        grpo = self.config.grpo
        return rows * timesteps.count(self.schedule.steps, grpo.timesteps.strategy, grpo.timesteps.fraction)

    def _fetch_rows(self, update: int, rollout: Rollout, chosen: list[list[list[Row]]]) -> dict[Any, Tensor]:
        """The trajectories this rank trains on in an update, from who has them: the leader of its own sequence-parallel
        group, or another's, since best-of-N may put a sample with a group that did not draw it."""
        size = self.world.sequence_parallel
        owners = {key: data_rank * size for key, data_rank in self.dealing.owners().items()}
        wanted: list[list[Any]] = []
        for rank in range(self.world.size):
            keys = [
                (what, group, row.member)
                for group, k in self.dealing.update(update, rank // size)
                for row in chosen[group][k]
                for what in ("latents", "log_probs")
            ]
            wanted.append(list(dict.fromkeys(keys)))
        have: dict[Any, Tensor] = {("latents", *key): t for key, t in rollout.latents.items()}
        have.update({("log_probs", *key): t for key, t in rollout.log_probs.items()})
        owner: dict[Any, int] = {(what, *key): rank for key, rank in owners.items() for what in ("latents", "log_probs")}
        return self.world.exchange(have, wanted, owner)

    # --- watching it --------------------------------------------------------------------------------------------------------

    def evaluation_sets(self) -> dict[str, list[Prompt]]:
        """``train`` and, with ``prompts.eval_path``, ``heldout``: the prompts of each evaluation."""
        sets = {"train": self.prompts[: self.config.run.eval_prompts]}
        if self.eval_prompts:
            sets["heldout"] = self.eval_prompts[: self.config.run.eval_prompts]
        return sets

    def evaluate(self) -> dict[str, float]:
        """``eval/SET/MODEL/OUTPUT/{mean,stderr}`` on fixed prompts and noise, with the ODE sampler."""
        metrics = {}
        for name, prompts in self.evaluation_sets().items():
            summary = sample_fixed(self, prompts, self.config.run.eval_samples, "evaluation", keep_media=False).summary()
            metrics.update({f"eval/{name}/{key}": value for key, value in summary.items()})
        return metrics

    def picture(self, iteration: int) -> FixedSamples:
        """Save pictures or clips of fixed prompts and noise in ``samples/ITERATION/``."""
        prompts = (self.eval_prompts or self.prompts)[: self.config.run.sample_prompts]
        drawn = sample_fixed(self, prompts, 1, "pictures")
        if drawn.media is not None:
            rewards = [
                {name: None if math.isnan(scores[i]) else scores[i].item() for name, scores in drawn.scores.items()}
                for i in range(len(prompts))
            ]
            folder = self.folder / "samples" / f"{iteration:06d}"
            captions = [caption(p.text, r) for p, r in zip(prompts, rewards, strict=True)]
            with keep_going(folder):
                files = save_samples(folder, drawn.media, [p.text for p in prompts], rewards, fps=self.fps)
                self.wandb.log_pictures(max(iteration - 1, 0), files, captions)
        return drawn

    def _evaluate_and_picture(self, iteration: int) -> None:
        if self.config.run.eval_every:
            metrics = self.evaluate()
            if self.world.rank == 0:
                with keep_going(self.folder / "evaluation_before.json"):
                    write_atomic(self.folder / "evaluation_before.json", json.dumps(metrics, indent=1).encode())
                self.wandb.log({"iteration": 0, **metrics})
            self.console.evaluation("before training", metrics)
        if self.config.run.sample_every:
            self.picture(iteration)

    def _save(self, iteration: int) -> None:
        engine = self.engine
        assert engine is not None

        def write(folder: Path) -> dict[str, Any]:
            (folder / "state").mkdir(exist_ok=True)
            engine.save(folder / "state")
            return {
                "config": configuration.to_dict(self.config),
                "normalisation": self.normalisation.state(),
                "prompts": prompts_digest(self.prompts, self.config),
                "images": image_digests(self.prompts),
                "denoiser": self._denoiser_identity,
                "git_commit": git_commit(),
            }

        if self.store.save(iteration, write):
            self._saved = iteration


NEGATIVE = "negative/"
"""How the names of a negative prompt's tensors begin in a micro-batch's conditioning."""


def split_guidance(conditioning: Conditioning) -> tuple[Conditioning, Conditioning | None]:
    """What the two passes of classifier-free guidance are given: for the prompt, and for the negative prompt, which differs in
    what a negative prompt has (the text, not a reference image); None without guidance."""
    positive = {name: tensor for name, tensor in conditioning.items() if not name.startswith(NEGATIVE)}
    negative = {n.removeprefix(NEGATIVE): tensor for n, tensor in conditioning.items() if n.startswith(NEGATIVE)}
    return positive, {**positive, **negative} if negative else None


def negative_of(prompt: Prompt, config: Config) -> Prompt:
    """The negative prompt, as a prompt of its own (most prompts share one): the file's, or ``sample.negative_prompt``."""
    text = config.sample.negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt
    return Prompt(text_id(f"{NEGATIVE}{text}"), text)


def to_encode(prompts: Sequence[Prompt], config: Config) -> list[Prompt]:
    """The prompts whose embeddings a run needs: these, and with classifier-free guidance their negative prompts."""
    if config.sample.cfg_scale <= 1:
        return list(prompts)
    return [*prompts, *dict.fromkeys(negative_of(prompt, config) for prompt in prompts)]


def embedding_cache(config: Config, checkpoint: Path, model: type[GRPOTrainer], world: World) -> EmbeddingCache:
    """The configured cache, for the text encoders of this checkpoint."""
    settings: dict[str, Any] = {
        "text_length": config.prompts.text_length,
        "dtype": config.prompts.embedding_dtype,
        "precision": config.model.precision,
    }
    components = [*model.text_encoders, *model.tokenizers]
    if FAMILIES[config.model.kind].reads_images:
        components.append("vae")
        settings |= {
            "size": [config.sample.height, config.sample.width],
            "vae_precision": config.model.vae_precision,
        }
    identity = encoder_identity(checkpoint, components, settings)
    return EmbeddingCache(config.prompts.embeddings, identity, DTYPES[config.prompts.embedding_dtype], world)


def is_partitioned(config: Config) -> bool:
    """Whether the network's weights live in ZeRO-3 partitions."""
    return config.engine.kind == "deepspeed" and config.engine.zero_stage == 3


def make_engine(trainer: GRPOTrainer) -> Engine:
    """The configured engine around the trainer's network."""
    config, world = trainer.config, trainer.world
    every = configuration.checkpointed_blocks(config.engine.activation_checkpointing)
    module = trainer.checkpoint_activations(every) if every else trainer.denoiser
    if config.engine.kind == "deepspeed":
        from fastvideo_grpo.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, config.optim, config.engine, precision=config.model.precision, world=world)
    from fastvideo_grpo.engines.local import LocalEngine

    return LocalEngine(module, config.optim, precision=config.model.precision, device=world.device)


@contextmanager
def keep_going(file: str | Path) -> Iterator[None]:
    """A full disk must not end a run: what cannot be written is told, and training goes on."""
    try:
        yield
    except OSError as error:
        logger.error("%s was not written: %s; the run goes on without it", file, error)


def lock_folder(folder: Path) -> IO[str]:
    """Hold ``folder/lock`` as long as the returned file is open (the kernel lets go of it when the process ends).

    Raises:
        UserError: another process trains in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process is training in {folder}; wait for it, stop it, or choose another run.dir") from error
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s): take care that no second training writes to it", folder, error)
    return file
