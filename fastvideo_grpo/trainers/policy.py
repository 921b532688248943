"""A loaded generator as a policy: what a model must say for itself, and drawing and predicting with it."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvideo_grpo.config.keys import Config, checkpointed_blocks, guidance_of, make_transition
from fastvideo_grpo.engines.activation_checkpointing import checkpoint_blocks, find_blocks
from fastvideo_grpo.engines.base import Engine
from fastvideo_grpo.engines.compiled_blocks import Compilations, compile_blocks
from fastvideo_grpo.engines.lora import add_lora, lora_disabled
from fastvideo_grpo.engines.make import make_engine, uses_zero3
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.registry import FAMILIES, lora_settings
from fastvideo_grpo.planning.run_steps import RunSteps
from fastvideo_grpo.precision import DTYPES
from fastvideo_grpo.prompts.embeddings import Conditioning, EmbeddingCache
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.residency import resident
from fastvideo_grpo.sampling import noise
from fastvideo_grpo.sampling.noise import SampleKey
from fastvideo_grpo.sampling.rollout import Start, Trajectory, Walk, finite_rows, rollout
from fastvideo_grpo.sampling.schedules import Level, Schedule
from fastvideo_grpo.sampling.solvers import DPMSolver
from fastvideo_grpo.sampling.transitions import Transition
from fastvideo_grpo.tracking.console import Console
from fastvideo_grpo.tracking.statistics import FORWARD, TRAINED
from fastvideo_grpo.trainers.conditioning import NEGATIVE, embedding_cache, negative_of, split_guidance, to_encode
from fastvideo_grpo.trainers.decoding import as_rows, decode_checked
from fastvideo_grpo.trainers.not_finite import DECODING, SAMPLING, check_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """A micro-batch of samples.

    ``latents`` float32 ``[B, ...]`` on the CPU: the final ones. ``media`` uint8 ``[B, F, H, W, 3]`` on the CPU, on the leader
    of a sequence-parallel group only; a sample that is not ``decoded`` is black there, which a reward would score. ``finite``,
    ``decoded`` bool ``[B]`` on the CPU: whether the final latents are finite, and whether all is from latents to pixels (None
    without media). ``trajectory``, if it was recorded.
    """

    latents: Tensor
    media: Tensor | None
    finite: Tensor
    decoded: Tensor | None
    trajectory: Trajectory | None

    def parts(self) -> dict[str, Tensor]:
        """What an update is given of each sample, by name: its trajectory, or without one its final latents."""
        return {"clean": self.latents} if self.trajectory is None else self.trajectory.parts()

    def faults(self) -> list[str | None]:
        """What is not finite in each sample, ``SAMPLING`` or ``DECODING``; None for one that is sound."""
        sampled = self.finite
        if self.trajectory is not None:
            sampled = sampled & self.trajectory.log_probs.isfinite().all(1)
        decoded = torch.ones_like(sampled) if self.decoded is None else self.decoded
        return [
            SAMPLING if not drawn else DECODING if not shown else None
            for drawn, shown in zip(sampled.tolist(), decoded.tolist(), strict=True)
        ]


class Policy(ABC):
    """A generator that is drawn from, trained or not. A subclass loads the model.

    Attributes:
        text_encoders, tokenizers: component names in model_index.json; they leave memory when all embeddings are cached.
        encoding: what tells its embeddings from those that earlier versions of the trainer made of the same files.
        config, world: of the run, and its processes.
        facts: what the checkpoint's configuration files say.
        dtype: what the network computes in.
        schedule, transition, steps: how it is sampled.
        engine: around the network once it is trained.
        decodes_one_at_a_time: the VAE is given one sample at a time, as much as memory or the VAE itself allows.
        fault_counts: samples that were masked since they were not finite, by what was not.
        rows_apart: each row of a micro-batch passes through the network by itself.
        compilations: of its blocks, once it is trained; None: they are not compiled.
        passes: of the network so far, without gradients and with them, of one sample and text each (``FORWARD``, ``TRAINED`` of
            :mod:`~fastvideo_grpo.tracking.statistics`).
    """

    decodes_one_at_a_time: ClassVar[bool] = False
    text_encoders: ClassVar[tuple[str, ...]] = ()
    tokenizers: ClassVar[tuple[str, ...]] = ()
    encoding: ClassVar[dict[str, Any]] = {}

    config: Config
    world: World
    facts: ModelFacts
    dtype: torch.dtype
    schedule: Schedule
    transition: Transition
    steps: RunSteps
    engine: Engine | None = None
    fault_counts: Counter[str]
    passes: Counter[str]
    rows_apart = False
    compilations: Compilations | None = None

    _conditioning: dict[str, Conditioning]
    _prefix: tuple[tuple[str | int, ...], Start] | None = None
    _cache: EmbeddingCache | None = None
    _reference: nn.Module | None = None
    _inside_reference = False
    _guidance: float | None = None

    # --- what a model must say for itself -----------------------------------------------------------------------------

    @abstractmethod
    def __init__(self, config: Config, world: World, *, with_text_encoders: bool = True) -> None:
        """Load the checkpoint onto ``world.device``, set ``self.config`` and ``self.world``, then call :meth:`setup`.

        Args:
            with_text_encoders: False leaves text encoders and tokenizers on disk (all embeddings are cached).
        """

    @abstractmethod
    def encode(self, prompts: list[Prompt]) -> list[Conditioning]:
        """Conditioning of each prompt, tensors ``[1, ...]``. A prompt's must not depend on the others in the list."""

    @abstractmethod
    def network_output(self, sample: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
        """One pass of ``self.network`` at the states ``sample`` ``[B, ...]`` (float32): velocity or noise as the family's
        ``prediction`` says, same shape, any float dtype; with gradients when they are enabled."""

    @abstractmethod
    def pixels(self, latents: Tensor) -> Tensor:
        """What the VAE makes of final latents: float ``[B, 3, F, H, W]``, 0 black and 1 white, as it comes, neither clamped
        (infinity would be white) nor rounded; with gradients when they are enabled. :meth:`media_of` and :meth:`decode` ask
        for it, with the VAE on the device."""

    @abstractmethod
    def generate(self, conditioning: Conditioning, initial: Tensor, walk: Walk) -> Drawn:
        """From noise to media, through the model's own pipeline; media on the leader of a sequence-parallel group only.

        Enters :meth:`pass_context` around the network's passes, walks with :meth:`predict` and never scales by guidance
        itself.

        Args:
            conditioning: tensors ``[B, ...]``.
            initial: float32 ``[B, *latent_shape()]`` on the CPU.

        Returns:
            :meth:`drawn` of the final latents, or the same from the stages of a pipeline.
        """

    @abstractmethod
    def get_module(self, name: str) -> Any:
        """A loaded component by its name in model_index.json; None where it was left on disk."""

    @abstractmethod
    def release_text_encoders(self) -> None:
        """Let the text encoders leave memory: every embedding that will be asked for is cached."""

    # --- what a model may say besides -----------------------------------------------------------------------------------

    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample's initial noise, without the batch; see :meth:`pack` for that of the sampler's states."""
        return FAMILIES[self.config.model.kind].latent_shape(self.facts, self.config.sample)

    def pack(self, latents: Tensor) -> Tensor:
        """Noise ``[B, *latent_shape()]`` -> the shape of the sampler's states (FLUX packs 2x2 latents into tokens)."""
        return latents

    def load_denoiser(self) -> nn.Module:
        """The network as the checkpoint has it, frozen, with ZeRO-3 in partitions: asked for once more where a run with ZeRO-3
        needs a reference, since what no process holds whole cannot be copied.

        Raises:
            UserError: the model's trainer does not say how.
        """
        raise UserError(
            f"model.kind={self.config.model.kind}: a frozen reference is needed (grpo.objective={self.config.grpo.objective}, "
            f"grpo.kl_weight={self.config.grpo.kl_weight}), and its trainer has no load_denoiser that reads one with "
            "engine.zero_stage=3; use engine.zero_stage=2 or model.lora"
        )

    def checkpoint_activations(self, every: int) -> nn.Module:
        """The network with every ``every``-th block recomputed in the backward pass (``engine.activation_checkpointing``).

        Raises:
            UserError: the network's blocks are not those that the model's family names.
        """
        family = FAMILIES[self.config.model.kind]
        return checkpoint_blocks(self.denoiser, find_blocks(self.denoiser, family.blocks, family.not_recomputed), every)

    def forward_context(self, conditioning: Conditioning | None = None) -> AbstractContextManager[Any]:
        """Entered around every forward and backward of the network with this conditioning, and around text encoders."""
        return nullcontext()

    def join(self, first: Conditioning, second: Conditioning) -> Conditioning:
        """Two micro-batches' conditioning as one of both, ``[2 B, ...]`` (``model.cfg_batched``); a model whose texts differ in
        length overrides it."""
        return {name: torch.cat([tensor, second[name]]) for name, tensor in first.items()}

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

    @contextmanager
    def _on_device(self, *names: str) -> Iterator[None]:
        with ExitStack() as stack:
            for name in names if self.config.engine.offload_idle else ():
                stack.enter_context(resident(self.get_module(name), self.world.device))
            yield

    # --- pixels -------------------------------------------------------------------------------------------------------------

    def drawn(self, latents: Tensor, trajectory: Trajectory | None) -> Drawn:
        """What a rollout ended in, decoded where this process is the one to do it."""
        media, decoded = self.media_of(latents) if self.world.leads else (None, None)
        return Drawn(latents.cpu(), media, finite_rows(latents).cpu(), decoded, trajectory)

    def media_of(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Decode final latents ``[B, ...]``, without gradients.

        Returns:
            uint8 ``[B, F, H, W, 3]`` on the CPU, rounded as diffusers, black where it is not finite; and which samples are
            finite from latents to pixels, bool ``[B]`` on the CPU.
        """
        media, decoded = [], []
        with torch.no_grad(), self.vae_on_device():
            for part in self._vae_batches(latents):
                pixels, finite = decode_checked(self.pixels, self.get_module("vae"), part)
                # Bytes of NaN are whatever the processor makes of it.
                shown = torch.where(as_rows(finite, pixels), pixels * 255, 0.0)
                media.append(shown.round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().cpu())
                decoded.append(finite.cpu())
        return torch.cat(media), torch.cat(decoded)

    def decode(self, latents: Tensor, differentiable: bool = False) -> Tensor:
        """Final latents ``[B, ...]`` -> the media, or float ``[B, F, H, W, 3]`` in [0, 1] with gradients.

        With gradients a sample that is not finite somewhere from latents to pixels is NaN throughout, and no gradient comes
        back to its latents: 0 times NaN would be NaN for the whole update.
        """
        if not differentiable:
            return self.media_of(latents)[0]
        with torch.enable_grad(), self.vae_on_device():
            latents = latents.view_as(latents)  # so that the hook sees what comes through the VAE, and nothing else
            parts = [decode_checked(self.pixels, self.get_module("vae"), part) for part in self._vae_batches(latents)]
        pixels, finite = (torch.cat(each) for each in zip(*parts, strict=True))
        if latents.requires_grad:
            latents.register_hook(lambda gradient: torch.where(as_rows(finite, gradient), gradient, 0.0))
        return torch.where(as_rows(finite, pixels), pixels, torch.nan).permute(0, 2, 3, 4, 1)

    def _vae_batches(self, latents: Tensor) -> tuple[Tensor, ...]:
        return latents.split(1 if self.decodes_one_at_a_time else len(latents))

    def note_faults(self, faults: Sequence[str | None]) -> None:
        """Count samples that are not sound (:meth:`Drawn.faults`), and log each kind the first time."""
        for fault, count in Counter(fault for fault in faults if fault is not None).items():
            if fault not in self.fault_counts:
                logger.warning("%s (%d of %d samples masked; told once, counted always)", fault, count, len(faults))
            self.fault_counts[fault] += count

    # --- setting up ---------------------------------------------------------------------------------------------------

    def setup(self, config: Config, world: World) -> None:
        """Everything a loaded model needs to sample; called when its components are there.

        Raises:
            UserError: weights of network or VAE are not finite.
        """
        self.config, self.world = config, world
        parts = {name: self.get_module(name) for name in (FAMILIES[config.model.kind].denoiser, "vae")}
        check_weights({name: part for name, part in parts.items() if part is not None}, self.checkpoint, world)
        self.facts = model_facts(config)
        self.dtype = DTYPES[config.model.precision]
        self.schedule = FAMILIES[config.model.kind].schedule(config.sample, self.facts)
        self.transition = make_transition(config.sample)
        self.steps = RunSteps(config)
        self._conditioning = {}
        self.fault_counts, self.passes = Counter(), Counter()
        if config.model.lora is not None:
            add_lora(self.denoiser, lora_settings(config), config.run.seed)
        else:
            self.denoiser.requires_grad_(True)
        self.denoiser.eval()

    @classmethod
    def embedding_cache(cls, config: Config, world: World) -> EmbeddingCache:
        """The configured cache of what this model's text encoders make of prompts; the model need not be loaded."""
        encoders = [*cls.text_encoders, *cls.tokenizers]
        return embedding_cache(config, Path(config.model.path), encoders, cls.encoding, world)

    def cache_embeddings(self, prompts: Sequence[Prompt], console: Console) -> None:
        """With an embedding folder: encode what is missing there, and let the text encoders go."""
        if self.config.prompts.embeddings == "none":
            return
        self._cache = self.embedding_cache(self.config, self.world)
        prompts = to_encode(prompts, self.config)
        if self._cache.missing(prompts):  # else they were not even loaded
            with torch.no_grad(), self.forward_context(), self.text_encoders_on_device():
                self._cache.fill(prompts, self.encode, console.say, console.progress("encoding prompts"))
        self.release_text_encoders()

    # --- the network ----------------------------------------------------------------------------------------------------

    @property
    def network(self) -> nn.Module:
        """What :meth:`network_output` calls: the engine's module, or the reference while :meth:`reference_weights` is
        entered."""
        if self._inside_reference and self._reference is not None:
            return self._reference
        return self.denoiser if self.engine is None else self.engine.module

    @contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Within, the network is the starting one: LoRA switched off, or the frozen copy."""
        self._inside_reference = True
        try:
            with lora_disabled(self.denoiser) if self.config.model.lora is not None else nullcontext():
                yield
        finally:
            self._inside_reference = False

    @property
    def compiled(self) -> bool:
        """Whether the network's blocks are compiled: they are once it is trained (``model.compile``)."""
        return self.compilations is not None

    def weights_of(self, name: str) -> AbstractContextManager[None]:
        """Within, the network is that of an average of its weights, by the engine's name of it, or of the trained ones where
        there is none of that name: they draw where nothing follows them."""
        assert self.engine is not None
        return self.engine.averaged_weights(name) if name in self.engine.averages else nullcontext()

    def make_trainable(self, *, reference: bool) -> Engine:
        """Give the network to the configured engine, with blocks recomputed as ``engine.activation_checkpointing`` says.

        Args:
            reference: keep the starting weights beside it, for :meth:`reference_weights` (with LoRA they stay anyway).
        """
        config = self.config
        if reference and config.model.lora is None:
            self._reference = self.make_reference()
        if config.model.compile == "blocks":
            family = FAMILIES[config.model.kind]
            for network in filter(None, (self.denoiser, self._reference)):
                blocks = find_blocks(network, family.blocks, family.not_recomputed)
                compile_blocks(network, blocks, dynamic=family.texts_differ_in_length)
            self.compilations = Compilations()
        every = checkpointed_blocks(config.engine.activation_checkpointing)
        self.engine = make_engine(self.checkpoint_activations(every) if every else self.denoiser, config, self.world)
        return self.engine

    def make_reference(self) -> nn.Module:
        """A frozen copy of the starting weights, before the engine takes the network; with ZeRO-3 in partitions, too."""
        config = self.config
        if not uses_zero3(config):
            return copy.deepcopy(self.denoiser).requires_grad_(False)
        from fastvideo_grpo.engines.deepspeed import partitioned_reference

        return partitioned_reference(
            self.load_denoiser().eval(), config.optim, config.engine, precision=config.model.precision, world=self.world
        )

    @property
    def guidance(self) -> float:
        """The scale of classifier-free guidance of :meth:`conditioning` and :meth:`predict`: that of the rollout, or while
        :meth:`guided` is entered its own."""
        return guidance_of(self.config).rollout if self._guidance is None else self._guidance

    @contextmanager
    def guided(self, scale: float) -> Iterator[None]:
        """Within, classifier-free guidance has this scale."""
        before, self._guidance = self._guidance, scale
        try:
            yield
        finally:
            self._guidance = before

    def pass_context(self, conditioning: Conditioning) -> AbstractContextManager[Any]:
        """Entered around :meth:`predict` of a micro-batch with this conditioning and its backward: the :meth:`forward_context`
        of what passes through the network at once."""
        return self.forward_context(_row(conditioning, 0) if self.rows_apart else conditioning)

    def predict(self, sample: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
        """The network's output at ``sample`` ``[B, ...]``, with gradients when they are enabled, guidance included;
        float32 with guidance, else in the dtype that :meth:`network_output` gives.

        With classifier-free guidance of scale w (:meth:`guided`) it is u + w (c - u), where c is the output for the
        prompt and u that for the negative prompt: both are functions of the weights, and both get gradients (Ho and Salimans
        2022, arXiv:2207.12598). With ``grpo.cfg_gradients=conditional`` u counts as a constant.
        """
        if self.compiled and not torch.is_grad_enabled() and not self._inside_reference:
            # The graph of the update, which rounds otherwise than one without gradients.
            before = self.passes[TRAINED]
            with torch.enable_grad():
                output = self._predict_rows(sample, level, conditioning).detach()
            self.passes[FORWARD] += self.passes[TRAINED] - before  # none goes back through it
            self.passes[TRAINED] = before
            return output
        return self._predict_rows(sample, level, conditioning)

    def _predict_rows(self, sample: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
        if not self.rows_apart:
            return self._predict(sample, level, conditioning)
        outputs = []
        for i in range(len(sample)):
            outputs.append(self._predict(sample[i : i + 1], level.row(i), _row(conditioning, i)))
        return torch.cat(outputs)

    def _predict(self, sample: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
        positive, negative = split_guidance(conditioning)
        if negative is None:
            return self._pass(sample, level, positive)
        constant = self.config.grpo.cfg_gradients == "conditional"
        if self.config.model.cfg_batched:
            output = self._pass(torch.cat([sample, sample]), level.twice(), self.join(negative, positive))
            unconditional, conditional = output.float().chunk(2)
            if constant:
                unconditional = unconditional.detach()
        else:
            with torch.no_grad() if constant else nullcontext():
                unconditional = self._pass(sample, level, negative).float()
            conditional = self._pass(sample, level, positive).float()
        return unconditional + self.guidance * (conditional - unconditional)

    def _pass(self, sample: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
        self.passes[TRAINED if torch.is_grad_enabled() else FORWARD] += len(sample)
        return self.network_output(sample, level, conditioning)

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
        if self.guidance > 1:
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
            self._prefix = None
        else:
            self._conditioning.pop(prompt.id, None)

    def draw(self, prompt: Prompt, keys: Sequence[SampleKey]) -> Drawn:
        """Sample a micro-batch of one prompt for an update. What its group shares, one trajectory until its first stochastic
        step, is drawn once, at batch 1."""
        keys, shape = list(keys), self.latent_shape()
        initial = noise.initial_noise(keys, shape, shared=self.config.sample.init_noise == "shared")
        stochastic = self.steps.stochastic.span(keys)
        levels = self.steps.solved_levels(int(stochastic.first[0]))
        walk = Walk(
            self.schedule,
            self.transition,
            lambda i: self.pack(noise.step_noise(keys, shape, i)),
            stochastic,
            kept=self.steps.kept_span(stochastic) if self.world.leads and not self.steps.clean else None,
            keep_means=self.steps.keeps_means,
            solver=None if levels is None else DPMSolver(self.schedule, levels),
            start=self._shared_start(prompt, keys[0], initial),
        )
        return self.generate(self.conditioning(prompt, len(keys)), initial, walk)

    def _shared_start(self, prompt: Prompt, key: SampleKey, initial: Tensor) -> Start | None:
        """The state that all samples of a group have before its first stochastic step, which is not made: it belongs to the
        micro-batch, whose shape its log-probs depend on."""
        steps = self.steps.shared_prefix(key)
        if steps == 0:
            return None
        group = (key.stream, key.seed, key.iteration, key.group, key.prompt_id)
        if self._prefix is None or self._prefix[0] != group:
            walk = Walk(self.schedule, self.transition.deterministic(), stop=steps)
            state = self.pack(initial[:1]).to(self.world.device)
            self._prefix = group, Start(steps, self._walk_alone(prompt, state, walk))
        return self._prefix[1]

    def _walk_alone(self, prompt: Prompt, state: Tensor, walk: Walk) -> Tensor:
        """Where a walk of one sample from ``state`` ``[1, ...]`` ends, without the rest of the model's pipeline."""
        conditioning = self.conditioning(prompt, 1)
        with self.pass_context(conditioning):
            return rollout(lambda sample, level: self.predict(sample, level, conditioning), state, walk)[0]

    def predict_idly(self, prompt: Prompt, count: int) -> None:
        """Evaluate the network so often, at batch 1, for nothing: where its weights lie in partitions (ZeRO-3), every process
        has to make as many passes as the others."""
        for _ in range(count):
            walk = Walk(self.schedule, self.transition.deterministic(), stop=1)
            self._walk_alone(prompt, self.pack(torch.zeros(1, *self.latent_shape())).to(self.world.device), walk)

    def draw_fixed(self, prompt: Prompt, keys: Sequence[SampleKey]) -> Drawn:
        """Sample a micro-batch of one prompt to look at: without noise on the way, from noise of each sample's own, nothing
        written down, with ``sample.eval_solver`` in ``sample.eval_steps``."""
        schedule, solver = self.eval_schedule, None
        initial = noise.initial_noise(list(keys), self.latent_shape(), shared=False)
        if self.config.sample.eval_solver == "dpm_solver":
            solver = DPMSolver(schedule, range(schedule.steps + 1))
        walk = Walk(schedule, self.transition.deterministic(), solver=solver)
        with self.guided(guidance_of(self.config).evaluation):
            return self.generate(self.conditioning(prompt, len(keys)), initial, walk)

    @cached_property
    def eval_schedule(self) -> Schedule:
        """The levels of samples that are looked at."""
        sample = self.config.sample
        if sample.eval_steps in (None, sample.steps):
            return self.schedule
        return FAMILIES[self.config.model.kind].schedule(replace(sample, steps=sample.eval_steps), self.facts)

    @property
    def fps(self) -> float | None:
        """Frames a second of a video; None for images."""
        return float(self.config.sample.fps) if self.config.sample.frames > 1 else None


def _row(conditioning: Conditioning, i: int) -> Conditioning:
    """One row of a micro-batch's conditioning: tensors ``[1, ...]``."""
    return {name: tensor[i : i + 1] for name, tensor in conditioning.items()}
