"""What a configuration will do, worked out before anything is loaded: checks at the model's size, and ``train --dry-run``."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from fastvideo_grpo import launcher
from fastvideo_grpo.checkpoints import folder
from fastvideo_grpo.checkpoints.store import CheckpointError, CheckpointStore
from fastvideo_grpo.config.checks import cautions
from fastvideo_grpo.config.keys import Config, LoRAConfig, RewardConfig, SampleConfig, guidance_of, make_objective
from fastvideo_grpo.disk.room import free_bytes, refusal
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.grpo import timesteps
from fastvideo_grpo.grpo.dealing import Dealing
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.registry import FAMILIES, lora_settings
from fastvideo_grpo.models.run_prompts import configured_prompts, prompt_file_of, prompts_of
from fastvideo_grpo.planning.checkpoint_checks import checkpoint_problems, unread_files
from fastvideo_grpo.planning.memory import describe_memory, estimate, too_little, too_little_on_host
from fastvideo_grpo.planning.run_steps import RunSteps, drawing_of, evaluations_per_sample, idle_of
from fastvideo_grpo.planning.sampling_checks import sampling_problem
from fastvideo_grpo.printed_sizes import gib
from fastvideo_grpo.prompts.cut import cut_texts, describe_cut
from fastvideo_grpo.prompts.entries import shortened
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.rewards import registry as rewards_registry
from fastvideo_grpo.rewards import reward_set
from fastvideo_grpo.rewards.models.weight_files import check_files
from fastvideo_grpo.rewards.placement.entries import check_here, check_kind_of_media
from fastvideo_grpo.tracking import wandb_run

logger = logging.getLogger(__name__)


def dealing(config: Config, ranks: int) -> Dealing:
    """How the configured iteration is cut into micro-batches and dealt to ``ranks`` data-parallel ranks."""
    best = config.grpo.best_of
    return Dealing(
        config.grpo.prompts_per_iteration,
        config.grpo.group_size,
        config.grpo.group_size if best is None else best.top + best.bottom,
        config.engine.micro_batch_size,
        config.grpo.updates_per_iteration,
        ranks,
    )


def check_run(config: Config, facts: ModelFacts, ranks: int, *, here: bool = True, training: bool = True) -> None:
    """Raise :class:`ConfigError` for whatever this model, these sizes and this many processes rule out.

    Args:
        here: the run will start on this machine: what it needs must be installed and its files present.
        training: False only draws pictures: training prompts and dealing do not matter.
    """
    problems = [*FAMILIES[config.model.kind].problems(config, facts), *checkpoint_problems(config, facts)]
    shared = config.engine.sequence_parallel
    heads = FAMILIES[config.model.kind].heads(facts)
    if heads == 1 and shared > 1:
        problems.append(
            f"engine.sequence_parallel is {shared}, but the tokens of one sample of {config.model.kind} cannot be shared by "
            "processes; use 1 (each process then has samples of its own)"
        )
    elif ranks % shared or heads % shared:
        ways = [n for n in range(1, heads + 1) if ranks % n == 0 and heads % n == 0]
        problems.append(
            f"engine.sequence_parallel is {shared}; it must divide the {ranks} processes and the model's {heads} "
            f"attention heads: {', '.join(map(str, ways))}"
        )
    if training:
        for key, prompts in (("path", config.prompts.path), ("eval_path", config.prompts.eval_path)):
            try:
                if prompts is not None:
                    prompts_of(config, prompts)
            except (ValueError, FileNotFoundError) as error:
                problems.append(f"prompts.{key}: {error}")
    if here:
        for name, reward in config.rewards.models.items():
            if reward.checkpoint is not None and not Path(reward.checkpoint).exists():
                source = rewards_registry.source(reward.kind)
                advice = "" if source is None else f"; the published one: {source.advice()}"
                problems.append(f"rewards.models.{name}.checkpoint={reward.checkpoint} does not exist{advice}")
        if config.engine.deepspeed_json is not None and not Path(config.engine.deepspeed_json).is_file():
            problems.append(f"engine.deepspeed_json={config.engine.deepspeed_json} is no file")
        if config.model.attention == "flash" and importlib.util.find_spec("flash_attn") is None:
            problems.append(
                "model.attention is flash, but flash-attn is not installed: pip install flash-attn, or attention=sdpa"
            )
    if here and training and launcher.rank() == 0:
        problems += filter(None, [wandb_run.missing_key(config.run.wandb)])
    if config.engine.kind == "local" and ranks > 1:
        problems.append(f"engine.kind is local, but there are {ranks} processes; set engine.kind=deepspeed")
    checks: list[Callable[[], object]] = [dealing(config, ranks // shared).check] if training and ranks % shared == 0 else []
    checks += [partial(_check_reward, name, entry, config.sample.frames, here) for name, entry in config.rewards.models.items()]
    checks += [partial(_check_reward_files, name, entry) for name, entry in config.rewards.models.items()]
    if training and make_objective(config).needs_reward_gradients:
        checks += [partial(reward_set.check_differentiable, name, entry) for name, entry in config.rewards.models.items()]
    json_file = config.engine.deepspeed_json
    if config.engine.kind == "deepspeed" and json_file is not None and Path(json_file).is_file():
        from fastvideo_grpo.engines.deepspeed import deepspeed_config

        world = World(size=ranks)
        checks.append(lambda: deepspeed_config(config.optim, config.engine, config.model.precision, world))
    for check in checks:
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    if config.model.attention == "flash" and config.model.precision == "fp32":
        problems.append("model.attention is flash, which computes in bf16; set model.precision=bf16, or attention=sdpa")
    if not problems:
        problems += filter(None, [_sampling_problem(config, facts)])
    if not problems and config.model.lora is not None:
        count_parameters(config, facts)  # a wrong model.lora.targets is told here, not after loading
    if problems:
        raise ConfigError("\n".join(problems))


def _sampling_problem(config: Config, facts: ModelFacts) -> str | None:
    family = FAMILIES[config.model.kind]
    usual = replace(SampleConfig(), **dict(family.defaults.get("sample", {})))
    return sampling_problem(config, lambda sample: family.schedule(sample, facts), usual)


def check_folder(config: Config) -> None:
    """Raise :class:`ConfigError` if ``run.dir`` holds another run, from its newest checkpoint, or damaged ones only, as far as
    can be seen without reading them, before anything is loaded."""
    from fastvideo_grpo.checkpoints.resume import check_resumable
    from fastvideo_grpo.prompts.embeddings import encoder_identity

    store = folder.run_store(config)
    for iteration in reversed(store.iterations()):
        try:
            state = store.load_trainer_json(store.path(iteration))
        except CheckpointError:
            continue  # damaged: resuming will name it and take the one before
        check_resumable(
            state,
            config,
            prompts_of(config, config.prompts.path),
            encoder_identity(Path(config.model.path), [FAMILIES[config.model.kind].denoiser], {}),
        )
        return
    if store.iterations():
        raise ConfigError(store.all_damaged())


def check_disk(config: Config, facts: ModelFacts) -> None:
    """Raise :class:`ConfigError` if the run cannot write to ``run.dir``, or its checkpoints will not fit; warn where
    ``run.keep`` of them do not. Call it on one process, after :func:`check_folder`."""
    folder.make_writable(config)
    room = folder.checkpoint_room(config, checkpoint_bytes(config, facts))
    problem, caution = folder.room_problem(config, room), folder.room_caution(config, room)
    if problem is not None:
        raise ConfigError(problem)
    if caution is not None:
        logger.warning("%s", caution)


def _disk_notes(config: Config, facts: ModelFacts, embeddings: int) -> list[str]:
    """What :func:`check_disk` would say on this machine, and whether the embeddings would fit; nothing is changed."""
    answer = folder.refused(config)
    notes = [] if answer is None else [folder.not_written(config, answer)]
    if answer is None or answer.full:
        room = folder.checkpoint_room(config, checkpoint_bytes(config, facts))
        notes += [line for line in (folder.room_problem(config, room), folder.room_caution(config, room)) if line is not None]
    if config.prompts.embeddings != "none":
        cache = Path(config.prompts.embeddings)
        answer = refusal(cache)
        if answer is not None:
            notes.append(f"prompts.embeddings={cache} takes no new ones: {answer.reason}")
        elif not cache.exists() and embeddings > free_bytes(cache):
            notes.append(
                f"prompts.embeddings={cache}: {gib(embeddings)} of embeddings, and {gib(free_bytes(cache))} are free on the "
                "disk there; point it at another, or set it to none"
            )
    return notes


def checkpoint_bytes(config: Config, facts: ModelFacts) -> int:
    """Of a checkpoint: float32 weights and two moments of what is trained, and its averages."""
    averages = (config.optim.ema_decay is not None) + (config.grpo.old_weights is not None)
    return (12 + 4 * averages) * count_parameters(config, facts)[0]


def iterations_done(config: Config, world: World) -> int | None:
    """Iterations of a run that has all of its own, in a whole checkpoint; None of one that has iterations to make.

    Said without a model; all ranks call it."""
    store = CheckpointStore(Path(config.run.dir) / "checkpoints", config.run.keep, world)
    if world.broadcast_object(store.iterations()[-1:] < [config.run.iterations]):
        return None  # without reading checkpoints, which takes long
    newest = store.newest()
    done = 0 if newest is None else int(newest.name)
    return done if done >= config.run.iterations else None


def all_done(config: Config, done: int) -> str:
    """What is said of a run that has its iterations."""
    return f"{config.run.dir} has its {done} iterations (run.iterations={config.run.iterations}); raise run.iterations to go on"


def _resumption(config: Config) -> str | None:
    """What starting will find in the run's folder, as far as names say it."""
    there = CheckpointStore(Path(config.run.dir) / "checkpoints", config.run.keep).iterations()
    if not there:
        return None
    if there[-1] >= config.run.iterations:
        return all_done(config, there[-1])
    return f"{config.run.dir} has a checkpoint of iteration {there[-1]}: the run goes on there"


def check_images(config: Config, world: World) -> None:
    """Read every image that the prompts name once; see :func:`fastvideo_grpo.prompts.images.check_images`."""
    from fastvideo_grpo.prompts.images import check_images
    from fastvideo_grpo.tracking.console import Console

    if FAMILIES[config.model.kind].reads_images:
        show = Console(quiet=world.rank != 0).progress("checking images")
        check_images(configured_prompts(config), config.sample.height, config.sample.width, world, show)


def warn(config: Config, facts: ModelFacts) -> None:
    """Log what can run but is seldom meant."""
    if launcher.rank() == 0:
        for line in _cautions(config, facts):
            logger.warning("%s", line)


def warn_of_cut(config: Config, prompts: Sequence[Prompt]) -> None:
    """Log which of the prompts that will be drawn a text encoder does not read to their end."""
    if launcher.rank() == 0:
        for line in cut_by_encoders(config, prompts):
            logger.warning("%s", line)


def cut_by_encoders(config: Config, prompts: Sequence[Prompt]) -> list[str]:
    """A line for each text encoder that does not read all prompts to their end, by the checkpoint's tokenizers; nothing is
    loaded besides.

    Raises:
        TokenizerError: a tokenizer cannot be read, or its files disagree.
    """
    from fastvideo_grpo.tracking.console import Console

    checkpoint, lines = Path(config.model.path), []
    texts = {"prompts": [prompt.text for prompt in prompts]}
    if max(guidance_of(config)) > 1:
        negative = (prompt.negative_text(config.sample.negative_prompt) for prompt in prompts)
        texts["negative prompts"] = list(dict.fromkeys(negative))
    for reader in FAMILIES[config.model.kind].text_readers(config, model_facts(config)):
        tokenizer = reader.load_tokenizer(checkpoint)
        for what, listed in texts.items():
            show = Console().progress(f"tokens of {what} for {reader.name}")
            cut = cut_texts(listed, reader, tokenizer, show)
            lines += [describe_cut(listed, cut, reader, what)] if cut else []
    return lines


def _cautions(config: Config, facts: ModelFacts) -> list[str]:
    """What can run but is seldom meant, and what of the prompts will not be seen."""
    lines = cautions(config)
    if config.model.vae_precision == "fp16" and facts.vae.get("force_upcast"):
        lines.append(
            f"model.vae_precision is fp16, but the VAE of {facts.source} overflows in it (its config.json says force_upcast): "
            "samples that are not finite are masked, and too many of them stop the run; set bf16 or fp32"
        )
    paths = [path for path in (config.prompts.path, config.prompts.eval_path) if path is not None]
    files = [prompt_file_of(config, path) for path in paths]
    prompts = [prompt for file in files for prompt in file.prompts]
    lines += [note for file in files for note in file.notes]
    trained = {(prompt.text, prompt.image) for prompt in files[0].prompts}
    shared = [prompt for file in files[1:] for prompt in file.prompts if (prompt.text, prompt.image) in trained]
    if shared:
        lines.append(
            f"{len(shared)} of the {len(files[1].prompts)} prompts of prompts.eval_path are trained on, too, so that what is "
            f"evaluated as heldout is not kept out: the first is {shortened(shared[0].text, 60)!r}"
        )
    unread = sum(prompt.negative_prompt is not None for prompt in prompts)
    if unread and max(guidance_of(config)) <= 1:
        lines.append(
            f"{unread} of {len(prompts)} prompts have a negative prompt, which nobody reads without guidance: set "
            "sample.cfg_scale above 1, or leave them out"
        )
    if Path(config.model.path).exists():
        lines += cut_by_encoders(config, prompts)
    return lines


def warn_of_memory(config: Config, facts: ModelFacts, ranks: int) -> None:
    """Log a warning where the estimate is beyond what a device of this machine has, or beyond a process's share of its memory
    (which on CPUs holds everything)."""
    import torch

    if launcher.rank() != 0:
        return
    memory = estimate(config, facts, ranks, count_parameters(config, facts))
    host = sum(memory.host.values())
    if torch.cuda.is_available():
        available = float(torch.cuda.get_device_properties(0).total_memory)
        if memory.peak > available:
            logger.warning("%s", too_little(config, memory, memory.peak, available))
    else:
        host += memory.peak
    share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / launcher.number("LOCAL_WORLD_SIZE", ranks)
    if host > share:
        on_gpu = torch.cuda.is_available()
        logger.warning("%s", too_little_on_host(memory, host, share) if on_gpu else too_little(config, memory, host, share))


def _check_reward(name: str, reward: RewardConfig, frames: int, here: bool) -> None:
    reward_set.check_entry(name, reward)
    check_kind_of_media(name, reward, frames)
    if here:
        check_here(name, reward, frames)


def _check_reward_files(name: str, reward: RewardConfig) -> None:
    """Raise ValueError for a checkpoint that is there and not whole. (One behind a server is the server's.)"""
    if reward.placement == "http" or reward.checkpoint is None or not Path(reward.checkpoint).exists():
        return
    try:
        check_files(Path(reward.checkpoint))
    except (OSError, ValueError) as error:
        raise ValueError(f"rewards.models.{name}.checkpoint: {error}") from error


def _describe_reward(name: str, reward: RewardConfig) -> str:
    where = {"inline": "", "process": ", in its own process", "http": f", at {reward.url}"}[reward.placement]
    return f"{name} ({reward.kind}{where})"


def describe(config: Config, facts: ModelFacts, ranks: int) -> str:
    """What one iteration does and what it needs, for a person."""
    import torch

    trainable, total = count_parameters(config, facts)
    sample, grpo = config.sample, config.grpo
    family = FAMILIES[config.model.kind]
    shared = config.engine.sequence_parallel
    dealt = dealing(config, ranks // shared)
    latent = family.latent_shape(facts, sample)
    tokens = family.image_tokens(facts, sample)
    steps = RunSteps(config)
    drawn, trained = evaluations_per_sample(config, dealt)
    drawing, idle = drawing_of(config, dealt, 0), idle_of(config, dealt, 0)
    prompts = prompts_of(config, config.prompts.path)
    samples = grpo.prompts_per_iteration * grpo.group_size
    rollouts = len(dealt.rollout_batches(0))
    updates = sum(len(dealt.update_batches(u, 0)) for u in range(grpo.updates_per_iteration))
    bytes_per = 2 if config.prompts.embedding_dtype == "bf16" else 4
    embedding = config.prompts.text_length * family.text_width(facts) * bytes_per
    if family.reads_images:
        embedding += latent[0] * latent[-2] * latent[-1] * bytes_per
    guidance = guidance_of(config)
    passes, trained_passes = (2 if scale > 1 else 1 for scale in (guidance.rollout, guidance.training))
    gpus = torch.cuda.device_count()
    lines = [
        f"model        {facts.source}: {_count(total)} parameters, {_count(trainable)} trained"
        + (f" (LoRA rank {config.model.lora.rank})" if config.model.lora else ""),
        *describe_memory(estimate(config, facts, ranks, (trainable, total))),
        f"disk         {gib(checkpoint_bytes(config, facts))} a checkpoint, {config.run.keep} kept",
        f"sample       {sample.width}x{sample.height} pixels"
        + (f" x {sample.frames} frames" if sample.frames > 1 else "")
        + f" = latents {'x'.join(map(str, latent))}, {tokens} tokens, "
        f"{config.prompts.text_length} text tokens, {sample.steps} steps of {sample.transition} "
        f"(noise level {sample.noise_level}"
        + (f", falling as t ** {sample.noise_decay:g}" if sample.noise_decay else "")
        + (" sqrt(sigma / (1 - sigma))" if sample.noise_schedule == "flow_grpo" else "")
        + (f", shift {sample.shift})" if family.prediction == "velocity" else ")")
        + _guided(config)
        + (", the conditional one trained" if grpo.cfg_gradients == "conditional" else ""),
        f"prompts      {len(prompts)} in {config.prompts.path}: an epoch is "
        f"{len(prompts) / grpo.prompts_per_iteration:.1f} iterations"
        + (
            f"; embeddings {gib(embedding * len(prompts))} in {config.prompts.embeddings}"
            if config.prompts.embeddings != "none"
            else "; encoded as they come"
        ),
        f"processes    {ranks} ({config.engine.kind}"
        + (f", ZeRO {config.engine.zero_stage}" if config.engine.kind == "deepspeed" else "")
        + (f", {ranks // shared} groups of {shared} share a sample's tokens" if shared > 1 else "")
        + f"); {gpus} GPUs here",
        f"iteration    {grpo.prompts_per_iteration} prompts x {grpo.group_size} samples = {samples} samples "
        f"({sample.init_noise} initial noise)",
        f"  rollout    {rollouts} micro-batches of {config.engine.micro_batch_size} x {sample.steps} steps"
        + _stochastic(config, steps)
        + f" = {_number((drawing.predictions + idle) * passes)} forwards a process"
        + (f", {_number(idle * passes)} of them idle" if idle >= 0.05 else ""),
        f"  rewards    {', '.join(_describe_reward(name, reward) for name, reward in config.rewards.models.items())}",
        f"  update     {grpo.objective}{_changed(config)}, {_normalised(config)}: {grpo.updates_per_iteration} "
        f"optimiser steps of {len(dealt.groups_of(0))} prompts"
        + (f", best {grpo.best_of.top} + worst {grpo.best_of.bottom} of each" if grpo.best_of else "")
        + f"; {_trained_at(config, steps)} a sample = {updates * steps.trained * trained_passes} forwards and backwards "
        "a process",
        *_other_weights(config, steps, updates * steps.trained * trained_passes),
        f"  network    {_number(drawn)} evaluations a sample in the rollout, {trained} in the update (a backward counts two), "
        f"{_number(drawn + trained)} in all; DanceGRPO's recipe, all steps stochastic and 0.6 of them trained, makes "
        f"{sample.steps + 3 * timesteps.count(sample.steps, 'random', 0.6)}",
        f"run          {config.run.iterations} iterations in {config.run.dir}; checkpoint every {config.run.save_every}",
    ]
    if not Path(config.model.path).exists():
        lines.append(f"note         {config.model.path} is not there: whether its text encoders cut prompts is not known yet")
    found = [_resumption(config), wandb_run.missing_key(config.run.wandb), *_cautions(config, facts)]
    found += [*_disk_notes(config, facts, embedding * len(prompts)), unread_files(config)]
    lines += [f"note         {line}" for line in found if line is not None]
    if grpo.prompts_per_iteration > len(prompts):
        lines.append(f"note         there are fewer prompts ({len(prompts)}) than an iteration draws: some come twice")
    return "\n".join(lines)


def _stochastic(config: Config, steps: RunSteps) -> str:
    """Which steps of a sample are stochastic, for a person; nothing where all are."""
    chosen, grpo = config.sample.stochastic, config.grpo
    if chosen.steps == "all":
        return ""
    if chosen.steps == "none":
        return f" of {'DPM-Solver++' if config.sample.solver == 'dpm_solver' else 'the ODE'}, none stochastic"
    if chosen.steps == "one":
        text = f", one of the first {steps.stochastic.candidates} stochastic, drawn per {chosen.per}"
    else:
        moves = {
            "fixed": f"from step {chosen.start + 1} on",
            "progressive": f"from step {chosen.start + 1} on, {chosen.stride} further every {chosen.every} iterations",
            "random": "anywhere",
        }[chosen.moves]
        text = f", {chosen.width} stochastic {moves}"
    if (
        config.sample.init_noise == "shared"
        and max(first for first, _ in steps.stochastic.places(grpo.group_size, config.run.iterations)) > 0
    ):
        text += ", those before once a group"
    if chosen.tail < 1:
        text += f", those behind solved in {chosen.tail:g} of their number"
    return text


def _guided(config: Config) -> str:
    """The guidance of the rollout, and where they have others of training and evaluation."""
    guidance = guidance_of(config)
    if max(guidance) <= 1:
        return ""
    scales = [f"guidance {guidance.rollout:g}"]
    scales += [
        f"{scale:g} {where}"
        for scale, where in zip(guidance[1:], ("trained", "evaluated"), strict=True)
        if scale != guidance.rollout
    ]
    return f", {', '.join(scales)} in {'one pass' if config.model.cfg_batched else 'two passes'}"


def _trained_at(config: Config, steps: RunSteps) -> str:
    """At how many of its timesteps, or with how much noise, a sample is trained."""
    if not steps.clean:
        return f"{steps.trained} of {steps.steps} timesteps"
    if steps.draws_levels:
        return f"clean samples with noise at {steps.trained} {config.grpo.timesteps.levels} levels"
    return f"clean samples with noise at {steps.trained} of {steps.steps} levels"


def _other_weights(config: Config, steps: RunSteps, count: int) -> list[str]:
    """Who draws the samples where it is not the trained weights, and what is asked of others before an update."""
    old, lines = config.grpo.old_weights, []
    if old is not None:
        rise = f", rising by {old.ramp:g} an iteration" if old.ramp is not None else ""
        delay = f", after {old.delay} iterations of 0" if old.delay else ""
        lines.append(f"  drawn by   old weights that follow the trained ones with decay {old.decay:g}{rise}{delay}")
    if steps.stored:
        names = {"old": "weights that drew", "ema": "the moving average"}
        check = ", and one that checks them" if "old" in steps.stored else ""
        lines.append(
            f"  stored     outputs of {' and '.join(names[name] for name in steps.stored)}, {count * len(steps.stored)} "
            f"forwards a process before the first update{check}"
        )
    return lines


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}".removesuffix(".0")


def _changed(config: Config) -> str:
    """What an update does otherwise than the paper's."""
    grpo = config.grpo
    region = f" in trust region {grpo.trust_region}" if grpo.trust_region != "clip" else ""
    return region + (f", timesteps weighted by {grpo.timesteps.weight}" if grpo.timesteps.weight != "none" else "")


def _normalised(config: Config) -> str:
    if make_objective(config).needs_reward_gradients:
        return "by the rewards' gradients"
    last = f"prompt's last {config.grpo.history.size} rewards"
    mixed = "group's mean and the iteration's standard deviation"
    over = {"group": "group", "global": "iteration", "prompt_history": last, "global_std": mixed}[config.grpo.normalisation]
    return f"rewards normalised over the {over}"


def count_parameters(config: Config, facts: ModelFacts) -> tuple[int, int]:
    """(trained, all) parameters of the network, built at its real size on the meta device."""
    lora = None if config.model.lora is None else tuple(sorted(vars(lora_settings(config)).items(), key=lambda item: item[0]))
    return _count_parameters(config.model.kind, json.dumps(facts.denoiser), json.dumps(lora))


@cache
def _count_parameters(kind: str, denoiser: str, lora: str) -> tuple[int, int]:
    from fastvideo_grpo.engines.lora import add_lora

    settings = json.loads(lora)
    module = FAMILIES[kind].network(json.loads(denoiser), as_trained=settings is not None)
    total = sum(p.numel() for p in module.parameters())
    if settings is not None:
        add_lora(module, LoRAConfig(**dict(settings)), seed=0)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained, total


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3f} B" if parameters >= 1e8 else f"{parameters / 1e6:.3f} M"
