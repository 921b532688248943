"""The keys of a run's configuration, their defaults, meanings and bounds.

Every key's meaning stands beside it (:mod:`fastvideo_grpo.config.reference` lists them). What values alone rule out is in
:mod:`fastvideo_grpo.config.checks`; what the model rules out is in its family's ``problems``, which
:func:`fastvideo_grpo.planning.plan.check_run` asks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastvideo_grpo.config.values import LARGEST_SEED
from fastvideo_grpo.grpo import objectives, timestep_weights, timesteps
from fastvideo_grpo.grpo.advantages import NORMALISATIONS
from fastvideo_grpo.grpo.decay import Decay
from fastvideo_grpo.grpo.objectives import trust_regions
from fastvideo_grpo.rewards.placement.entries import PLACEMENTS
from fastvideo_grpo.rewards.placement.http import TOKEN_VARIABLE
from fastvideo_grpo.sampling import noise_levels, transitions
from fastvideo_grpo.sampling.stochastic_steps import CHOICES, MOVES, StochasticSteps

SOLVERS = ("ode", "dpm_solver")
REQUIRED: Any = "???"
"""In place of a default: a run has to give the key."""


def _key(
    default: Any,
    help: str,
    *,
    choices: Callable[[], list[str]] | Sequence[str] | None = None,
    path: bool = False,
    **bounds: float,
) -> Any:
    """A configuration key: default, meaning, and what is allowed (``minimum``, ``above``, ``maximum``, ``choices``).

    ``path``: it names a file or a folder, in which ``~`` and variables are expanded.
    """
    metadata = {"help": help, "choices": choices, "path": path, "required": default is REQUIRED, **bounds}
    if isinstance(default, (list, dict)) or callable(default):
        factory = default if callable(default) else (lambda: type(default)(default))
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class LoRAConfig:
    """Low-rank adapters in place of full weights."""

    rank: int = _key(128, "inner dimension of each adapter", minimum=1, maximum=2**16)
    alpha: float = _key(256.0, "the adapter's output is scaled by alpha / rank", above=0)
    targets: list[str] | None = _key(
        None, "linear layers that get an adapter: ends of FastVideo's module names (default: the attention projections)"
    )


@dataclass
class ModelConfig:
    """The model to train."""

    kind: str = _key("flux", "model family")  # what is known: fastvideo_grpo.models
    path: str = _key(REQUIRED, "checkpoint folder in diffusers layout (with model_index.json)", path=True)
    lora: LoRAConfig | None = _key(None, "train low-rank adapters instead of the full weights")
    precision: str = _key(
        "bf16", "dtype the network is loaded and runs in; bf16 keeps float32 master weights", choices=["fp32", "bf16"]
    )
    vae_precision: str = _key("fp32", "dtype the VAE is loaded and decodes in", choices=["fp32", "bf16", "fp16"])
    attention: str = _key("sdpa", "attention kernel: sdpa (torch) or flash (needs flash-attn)", choices=["sdpa", "flash"])
    compile: str = _key(
        "none",
        "blocks: torch compiles each kind of block of the network, a minute at the first start; quicker, and the ratio stays 1",
        choices=["none", "blocks"],
    )
    cfg_batched: bool = _key(
        False,
        "classifier-free guidance in one pass over twice the batch, instead of one pass after the other; equal to rounding",
    )


@dataclass
class PromptsConfig:
    """What to draw, and the cache of its text embeddings."""

    path: str = _key(
        REQUIRED,
        "training prompts: .txt (one a line), or .jsonl, .json or .csv with prompt and, if wanted, id, image, negative_prompt "
        "(docs/prompts.md)",
        path=True,
    )
    eval_path: str | None = _key(
        None,
        "prompts kept out of training, scored at each evaluation; goes with path: who sets another path sets it anew",
        path=True,
    )
    duplicates: str = _key(
        "drop",
        "a prompt that repeats another of its file is left out (drop), or kept under an id of its own",
        choices=["drop", "keep"],
    )
    embeddings: str = _key(
        "none",
        "folder of cached embeddings of texts and images (encoded once, text encoders then leave memory), or none: encode as "
        "needed",
        path=True,
    )
    embedding_dtype: str = _key("bf16", "dtype of cached embeddings", choices=["fp32", "bf16"])
    text_length: int = _key(
        512,
        "tokens of the text encoder whose sequence the network reads: texts are cut to them, and padded where the model reads "
        "padding",
        minimum=1,
    )
    seed: int = _key(0, "seed of the order in which prompts are drawn", minimum=0, maximum=LARGEST_SEED)


@dataclass
class StochasticConfig:
    """Which steps of a rollout draw noise; the others are those of the ODE."""

    steps: str = _key(
        "all",
        "all (the paper), a window of them, one for each group or sample (docs/methods.md), or none, for objectives on clean "
        "samples; a group that shares its initial noise is one trajectory until its first, and drawn once",
        choices=list(CHOICES),
    )
    width: int = _key(4, "window: how many", minimum=1)
    start: int = _key(0, "window: the first of them, 0 the noisiest, where it is fixed or begins", minimum=0)
    moves: str = _key(
        "fixed",
        "window: fixed, progressive (on by stride every so many iterations, from 0 again behind the end), or random: a place "
        "for each iteration",
        choices=list(MOVES),
    )
    stride: int = _key(1, "progressive: steps that it moves on by", minimum=1)
    every: int = _key(25, "progressive: iterations between moves", minimum=1)
    fraction: float = _key(0.5, "one: the share of the steps, from noise on, that it is drawn from", minimum=1e-6, maximum=1)
    per: str = _key("group", "one: a draw per group, or per sample", choices=["group", "sample"])
    tail: float = _key(
        1.0,
        "the steps behind the stochastic ones become this share of their number, made by a solver of second order "
        "(DPM-Solver++, of models that predict a velocity); 1: each by itself",
        minimum=1e-3,
        maximum=1,
    )


@dataclass
class SampleConfig:
    """How a sample is drawn."""

    height: int = _key(720, "pixels", minimum=1, maximum=2**16)
    width: int = _key(720, "pixels", minimum=1, maximum=2**16)
    frames: int = _key(1, "frames of a video, as many as the model's VAE takes (those here 4k + 1); 1: an image", minimum=1)
    fps: int = _key(8, "frames a second of saved videos, and what video rewards are told", minimum=1, maximum=1000)
    vae_tiling: bool = _key(False, "decode in overlapping tiles: long or large videos in bounded memory, seams blended")
    steps: int = _key(16, "sampling steps, the paper's T", minimum=2, maximum=1000)
    shift: float = _key(3.0, "shift of the flow schedule: sigma = shift t / (1 + (shift - 1) t)", above=0)
    transition: str = _key(
        "flow_sde",
        "sampler of the rollout: of models that predict a velocity flow_sde (eq. 8) or cps, of those that predict noise ddim "
        "or diffusion_sde (eq. 7)",
        choices=transitions.names,
    )
    noise_level: float = _key(
        0.3, "epsilon_t of the SDE, eta of ddim, a of cps (below 1); 0 would leave nothing to learn from", above=0
    )
    noise_schedule: str = _key(
        "constant",
        "the noise level is constant, or multiplied by sqrt(sigma / (1 - sigma)) (flow_grpo, of models that predict a "
        "velocity)",
        choices=list(noise_levels.NOISE_SCHEDULES),
    )
    noise_decay: float = _key(
        0.0, "the noise level falls towards the data as t ** noise_decay, t from 1 to 0; 0: constant, 1: linear", minimum=0
    )
    guidance_scale: float = _key(3.5, "embedded guidance, of models distilled for it", minimum=0, maximum=1000)
    cfg_scale: float = _key(1.0, "classifier-free guidance w: u + w (c - u); 1: none", minimum=1, maximum=1000)
    eval_cfg_scale: float | None = _key(
        None,
        "that of evaluations, of pictures and of fastvideo-grpo sample (default: sample.cfg_scale)",
        minimum=1,
        maximum=1000,
    )
    negative_prompt: str = _key("", "what guidance leads away from, where a line of the prompt file does not say")
    init_noise: str = _key(
        "shared",
        "initial noise: shared by a prompt's group (the paper) or per_sample",
        choices=["shared", "per_sample"],
    )
    stochastic: StochasticConfig = _key(StochasticConfig, "which steps draw noise")
    solver: str = _key(
        "ode",
        "the rollout's sampler where no step draws noise: the ODE of the transition, or dpm_solver: DPM-Solver++ of second "
        "order (of models that predict a velocity)",
        choices=list(SOLVERS),
    )
    eval_steps: int | None = _key(
        None, "steps of evaluations, of pictures and of fastvideo-grpo sample (default: sample.steps)", minimum=2, maximum=1000
    )
    eval_solver: str = _key(
        "ode",
        "their sampler: the ODE of the transition, or dpm_solver: DPM-Solver++ of second order (of models that predict a "
        "velocity)",
        choices=list(SOLVERS),
    )


@dataclass
class BestOfConfig:
    """Train on the best and worst of each group only."""

    top: int = _key(REQUIRED, "samples of highest advantage", minimum=1)
    bottom: int = _key(REQUIRED, "samples of lowest advantage", minimum=1)


@dataclass
class TimestepsConfig:
    """Which timesteps an update trains on."""

    strategy: str = _key(
        "random",
        "random, first (noisiest), last, all, or late: one drawn from the last ones",
        choices=list(timesteps.STRATEGIES),
    )
    fraction: float = _key(
        0.6,
        "tau: min(ceil(fraction x steps), steps - 1) timesteps; 1.0 with all; with late the share of the trainable ones to "
        "draw from",
        minimum=1e-6,
        maximum=1,
    )
    per: str = _key("sample", "one random draw per sample, or per group", choices=["sample", "group"])
    within: float = _key(
        1.0, "only the first share of them, from noise on, is trained: what the others are chosen from", minimum=1e-6, maximum=1
    )
    levels: str = _key(
        "sampler",
        "objectives on clean samples: noise is added as at the sampler's timesteps, or at levels drawn for each sample, "
        "uniform or logit_normal, as many (with strategy random)",
        choices=list(timesteps.LEVELS),
    )
    level_mean: float = _key(0.0, "logit_normal: mean of logit(t)", minimum=-20, maximum=20)
    level_std: float = _key(1.0, "logit_normal: standard deviation of logit(t)", above=0, maximum=20)
    level_shift: float = _key(1.0, "drawn levels: t becomes shift t / (1 + (shift - 1) t)", above=0, maximum=1000)
    weight: str = _key(
        "none",
        "what a timestep counts: none (the paper: each as much), rectified (1 / the scale of its gradient), guard (1 / its "
        "step) or noise (its standard deviation), each 1 on average over an iteration",
        choices=list(timestep_weights.WEIGHTS),
    )


@dataclass
class OldWeightsConfig:
    """Weights that follow the trained ones once an iteration, old = d old + (1 - d) new, and draw the samples."""

    decay: float = _key(0.5, "d, or with a ramp what it rises to", minimum=0, maximum=1)
    ramp: float | None = _key(
        None, "d rises by this with every iteration, from 0 to decay (default: it is decay from the first)", above=0
    )
    delay: int = _key(0, "iterations before that in which d is 0: the trained weights draw", minimum=0)


@dataclass
class HistoryConfig:
    """What normalisation prompt_history remembers of each prompt."""

    size: int = _key(32, "last rewards of a prompt that are remembered", minimum=2)
    minimum: int = _key(
        16, "a prompt with fewer of them is normalised with the statistics of the iteration (1: never)", minimum=1
    )


@dataclass
class GRPOConfig:
    """Algorithm 1."""

    prompts_per_iteration: int = _key(32, "prompts drawn per iteration", minimum=1)
    group_size: int = _key(12, "samples of each prompt, the paper's G", minimum=2)
    best_of: BestOfConfig | None = _key(None, "train only on top and bottom samples of each group")
    timesteps: TimestepsConfig = _key(TimestepsConfig, "timestep selection")
    normalisation: str = _key(
        "group",
        "what rewards are normalised over: the prompt's group (the paper), the iteration (global), the prompt's last rewards, "
        "or the group's mean and the iteration's standard deviation (global_std)",
        choices=list(NORMALISATIONS),
    )
    history: HistoryConfig = _key(HistoryConfig, "of normalisation prompt_history")
    # 1 + 1e-8 is 1 in float32: the ratio could never move.
    clip_range: float = _key(
        1e-4, "how far the ratio may go below 1, and above (grpo, ddpo, dpok; trust regions clip and guard)", minimum=1e-7
    )
    clip_range_upper: float | None = _key(None, "how far it may go above 1 (default: clip_range)", minimum=1e-7)
    trust_region: str = _key(
        "clip",
        "what keeps the policy near that of the rollout (grpo, ddpo, dpok): clip (the paper), guard (the ratio without the "
        "drift that steps give it, clipped), or dppo (no update of what has moved away by kl_threshold already)",
        choices=list(trust_regions.TRUST_REGIONS),
    )
    kl_threshold: float = _key(1e-5, "trust region dppo: KL to the rollout's policy, a mean over dimensions", above=0)
    advantage_clip: float | None = _key(
        5.0, "advantages are clamped to at least - this, and at most this (grpo, ddpo, dpok)", above=0
    )
    advantage_clip_upper: float | None = _key(None, "what they are at most (default: advantage_clip)", above=0)
    updates_per_iteration: int = _key(4, "optimiser steps per iteration; each takes whole prompts", minimum=1)
    cfg_gradients: str = _key(
        "both",
        "passes of classifier-free guidance that are trained: both (the paper) or conditional",
        choices=["both", "conditional"],
    )
    kl_weight: float = _key(
        0.0, "weight of the KL to the starting weights (grpo, dpok, nft, awm); 0: none, and no second copy kept", minimum=0
    )
    ema_kl_weight: float = _key(
        0.0, "weight of the KL to the moving average of the weights, optim.ema_decay (grpo, dpok, nft, awm); 0: none", minimum=0
    )
    old_weights: OldWeightsConfig | None = _key(
        None,
        "objectives on clean samples: who draws the samples, weights that follow the trained ones (null: these themselves)",
    )
    cfg_scale: float | None = _key(
        None,
        "objectives on clean samples: guidance of what is trained, whatever drew the samples (default: sample.cfg_scale)",
        minimum=1,
        maximum=1000,
    )
    objective: str = _key("grpo", "what an update minimises (docs/objectives.md)", choices=objectives.names)
    objective_params: dict[str, Any] = _key({}, "settings of the objective's own (dpo: beta)")


@dataclass
class OutputConfig:
    """What one output of a reward counts for. What changes the score comes in the order affine, clamp, threshold, invert."""

    weight: float = _key(1.0, "factor of its advantage; 0 only watches it")
    threshold: float | None = _key(None, "score becomes 1 above this, else 0 (binary reward)")
    invert: bool = _key(False, "score becomes -score: less is better")
    affine: list[float] | None = _key(None, "[a, b]: score becomes a * score + b")
    clamp: list[float] | None = _key(None, "[low, high]: score is brought between them")


@dataclass
class RewardConfig:
    """One reward model."""

    kind: str = _key(REQUIRED, "registered reward")
    checkpoint: str | None = _key(None, "its weights, for kinds that have some", path=True)
    params: dict[str, Any] = _key({}, "settings of this kind")
    placement: str = _key(
        "inline", "where it runs: in the training process, in a process of its own, or behind a server", choices=PLACEMENTS
    )
    python: str | None = _key(None, "placement=process: interpreter of another environment (default: this one)", path=True)
    device: str | None = _key(None, "placement=process: where its weights lie, e.g. cuda:1 (default: the trainer's device)")
    url: str | None = _key(None, "placement=http: its server (fastvideo-grpo serve-reward), e.g. http://127.0.0.1:8800")
    token_variable: str | None = _key(
        None, f"placement=http: environment variable that holds the server's token (default: {TOKEN_VARIABLE})"
    )
    outputs: dict[str, OutputConfig] = _key({}, "outputs that count; none named: all, with weight 1")


@dataclass
class RewardsConfig:
    """The reward models."""

    # "async" in files and on the command line; Python has that word for itself.
    async_: bool = _key(False, "score while later micro-batches of the iteration are sampled; the same numbers")
    timeout_s: float = _key(300.0, "seconds in which a reward must have scored a micro-batch", above=0, maximum=1e7)
    retries: int = _key(2, "how often a request that failed is made again before its samples are masked", minimum=0, maximum=30)
    backoff_s: float = _key(0.5, "seconds before the first of these, doubled for each further one", minimum=0, maximum=1e5)
    max_invalid_fraction: float = _key(
        0.1, "the run stops when more than this share of an iteration's samples could not be scored", minimum=0, maximum=1
    )
    models: dict[str, RewardConfig] = _key({}, "name -> reward model")


@dataclass
class OptimConfig:
    """AdamW."""

    lr: float = _key(1e-5, "learning rate", above=0)
    betas: list[float] = _key([0.9, 0.999], "AdamW betas")
    weight_decay: float = _key(1e-4, "decoupled weight decay", minimum=0)
    max_grad_norm: float = _key(1.0, "gradients are clipped to this global norm", above=0)
    warmup_steps: int = _key(0, "optimiser steps of linear warm-up", minimum=0)
    ema_decay: float | None = _key(None, "decay of an exponential moving average of the weights", above=0, maximum=1)
    ema_ramp: float | None = _key(
        None,
        "the decay rises by this with every update, from 0 to ema_decay (default: it is ema_decay from the first)",
        above=0,
    )


@dataclass
class EngineConfig:
    """Who moves the weights."""

    kind: str = _key("local", "local: one process; deepspeed: torchrun, any number", choices=["local", "deepspeed"])
    zero_stage: int = _key(2, "DeepSpeed ZeRO stage (deepspeed only)", minimum=0, maximum=3)
    offload: str = _key(
        "none", "what DeepSpeed keeps in host memory (deepspeed only)", choices=["none", "optimizer", "parameters"]
    )
    deepspeed_json: str | None = _key(
        None, "your DeepSpeed JSON: may repeat ours or say auto, and tunes the rest (deepspeed)", path=True
    )
    sequence_parallel: int = _key(
        1, "processes that share the tokens of one sample (Ulysses attention); divides heads and processes", minimum=1
    )
    offload_idle: bool = _key(False, "VAE, text encoders and inline rewards leave the device while they are not used")
    activation_checkpointing: str = _key(
        "none", "activations recomputed in the backward pass: none, full (every block), or every:K (every K-th block)"
    )
    micro_batch_size: int = _key(1, "samples of one prompt that go through the network together", minimum=1)


@dataclass
class RunConfig:
    """Where and how long."""

    dir: str = _key(REQUIRED, "folder of the run: metrics, samples, checkpoints; a second start resumes from it", path=True)
    iterations: int = _key(300, "iterations of Algorithm 1", minimum=1)
    seed: int = _key(0, "seed of all sampling noise and timestep choices", minimum=0, maximum=LARGEST_SEED)
    save_every: int = _key(50, "iterations between checkpoints (the last iteration is always saved)", minimum=1)
    keep: int = _key(3, "newest checkpoints kept", minimum=1)
    eval_every: int = _key(50, "iterations between evaluations on fixed noise with the ODE sampler; 0: never", minimum=0)
    eval_prompts: int = _key(32, "prompts of each set (training, kept out) scored at an evaluation", minimum=1)
    eval_samples: int = _key(2, "samples per prompt at an evaluation", minimum=1)
    sample_every: int = _key(50, "iterations between saved pictures or clips of fixed prompts and noise; 0: never", minimum=0)
    sample_prompts: int = _key(8, "prompts of those pictures or clips", minimum=1)
    deterministic: bool = _key(False, "deterministic GPU kernels (slower); exact resume on GPUs needs it")
    threads: int | None = _key(None, "CPU threads per process; part of exact resume on CPUs", minimum=1, maximum=4096)
    timeout_minutes: int = _key(30, "how long a process waits for the others before the run fails", minimum=1, maximum=10**6)
    wandb: str = _key("disabled", "Weights & Biases", choices=["disabled", "offline", "online"])


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)


def make_objective(config: Config) -> objectives.Objective:
    """The configured objective.

    Raises:
        ValueError: what :func:`fastvideo_grpo.grpo.objectives.get` refuses.
    """
    grpo = config.grpo
    return objectives.get(
        grpo.objective,
        trust_region=trust_regions.get(grpo.trust_region, grpo.clip_range, grpo.clip_range_upper, grpo.kl_threshold),
        advantage_range=(grpo.advantage_clip, grpo.advantage_clip_upper),
        clip_range=grpo.clip_range,
        advantage_clip=grpo.advantage_clip,
        kl_weight=grpo.kl_weight,
        ema_kl_weight=grpo.ema_kl_weight,
        params=grpo.objective_params,
    )


class Guidance(NamedTuple):
    """Scales of classifier-free guidance; 1: none."""

    rollout: float
    training: float
    evaluation: float


def guidance_of(config: Config) -> Guidance:
    """Those of the configuration, whose defaults are ``sample.cfg_scale``."""
    scale, training, evaluation = config.sample.cfg_scale, config.grpo.cfg_scale, config.sample.eval_cfg_scale
    return Guidance(scale, scale if training is None else training, scale if evaluation is None else evaluation)


def trainable_steps(config: Config, objective: objectives.Objective) -> int:
    """How many transitions of a sample, or levels of its noise, an update chooses from.

    Raises:
        ValueError: there is no such window.
    """
    steps = config.sample.steps if getattr(objective, "clean", False) else stochastic_steps(config).trainable
    return timesteps.within(steps, config.grpo.timesteps.within)


def stochastic_steps(config: Config) -> StochasticSteps:
    """Those of the configuration.

    Raises:
        ValueError: there is no such window.
    """
    chosen = config.sample.stochastic
    return StochasticSteps(
        steps=config.sample.steps,
        choice=chosen.steps,
        width=chosen.width,
        start=chosen.start,
        moves=chosen.moves,
        stride=chosen.stride,
        every=chosen.every,
        fraction=chosen.fraction,
        per=chosen.per,
    )


def old_weights_decay(config: Config) -> Decay | None:
    """How the weights that draw the samples follow the trained ones; None: the trained ones draw.

    Raises:
        ValueError: the decay is no average.
    """
    old = config.grpo.old_weights
    return None if old is None else Decay(old.decay, old.ramp, old.delay)


def make_transition(sample: SampleConfig) -> transitions.Transition:
    """The configured transition.

    Raises:
        ValueError: what :func:`fastvideo_grpo.sampling.transitions.get` refuses.
    """
    return transitions.get(
        sample.transition,
        noise_level=sample.noise_level,
        noise_schedule=sample.noise_schedule,
        noise_decay=sample.noise_decay,
    )


def checkpointed_blocks(value: str) -> int:
    """``engine.activation_checkpointing`` as a number: 0 none, 1 every block, K every K-th.

    Raises:
        ValueError: it is something else.
    """
    known = {"none": 0, "full": 1}
    prefix, _, every = value.partition(":")
    if prefix == "every" and re.fullmatch("[1-9][0-9]{0,8}", every):
        return int(every)
    if value not in known:
        raise ValueError(f"is {value!r}; allowed: none, full, every:K with K of 1 or more (every:2 is every second block)")
    return known[value]
