"""The run configuration: dataclasses filled from YAML and dotted overrides, checked before anything is loaded.

Every key's meaning stands beside it (``docs/configuration.md`` is printed from here). Checks that need the checkpoint's own
configuration (patch size, channels) are its family's ``problems`` (:mod:`fastvideo_grpo.families`), called by
``plan.check_run``.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastvideo_grpo.errors import UserError
from fastvideo_grpo.extensions import Registry, nearest
from fastvideo_grpo.grpo import objectives, timesteps
from fastvideo_grpo.grpo.advantages import NORMALISATIONS
from fastvideo_grpo.rewards.http import TOKEN_VARIABLE
from fastvideo_grpo.rewards.placement import PLACEMENTS
from fastvideo_grpo.sampling import transitions


class ConfigError(UserError, ValueError):
    """A configuration that cannot run. The message names each key, its value, what is allowed and a way out."""


def _key(default: Any, help: str, *, choices: Callable[[], list[str]] | Sequence[str] | None = None, **bounds: float) -> Any:
    """A configuration key: default, meaning, and what is allowed (``minimum``, ``above``, ``maximum``, ``choices``)."""
    metadata = {"help": help, "choices": choices, **bounds}
    if isinstance(default, (list, dict)) or callable(default):
        factory = default if callable(default) else (lambda: type(default)(default))
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class LoRAConfig:
    """Low-rank adapters in place of full weights."""

    rank: int = _key(128, "inner dimension of each adapter", minimum=1)
    alpha: float = _key(256.0, "the adapter's output is scaled by alpha / rank", above=0)
    targets: list[str] | None = _key(
        None, "linear layers that get an adapter: ends of FastVideo's module names (default: the attention projections)"
    )


@dataclass
class ModelConfig:
    """The model to train."""

    kind: str = _key("flux", "model family", choices=lambda: _families().names())
    path: str = _key(MISSING, "checkpoint folder in diffusers layout (with model_index.json)")
    lora: LoRAConfig | None = _key(None, "train low-rank adapters instead of the full weights")
    precision: str = _key(
        "bf16", "dtype the network is loaded and runs in; bf16 keeps float32 master weights", choices=["fp32", "bf16"]
    )
    vae_precision: str = _key("fp32", "dtype the VAE is loaded and decodes in", choices=["fp32", "bf16", "fp16"])
    attention: str = _key("sdpa", "attention kernel: sdpa (torch) or flash (needs flash-attn)", choices=["sdpa", "flash"])
    cfg_batched: bool = _key(
        False,
        "classifier-free guidance in one pass over twice the batch, instead of one pass after the other; equal to rounding",
    )


@dataclass
class PromptsConfig:
    """What to draw, and the cache of its text embeddings."""

    path: str = _key(MISSING, "training prompts: .txt (one a line) or .jsonl ({'prompt', 'id'?, 'image'?, 'negative_prompt'?})")
    eval_path: str | None = _key(None, "prompts kept out of training, scored at each evaluation")
    embeddings: str = _key(
        "none",
        "folder of cached embeddings of texts and images (encoded once, text encoders then leave memory), or none: encode as "
        "needed",
    )
    embedding_dtype: str = _key("bf16", "dtype of cached embeddings", choices=["fp32", "bf16"])
    text_length: int = _key(
        512,
        "tokens of the sequence text encoder: FLUX's T5, Wan's UMT5 and stable_diffusion's CLIP (77 if left out) pad and cut "
        "to them, HunyuanVideo's Llama only cuts",
        minimum=1,
    )
    seed: int = _key(0, "seed of the order in which prompts are drawn")


@dataclass
class SampleConfig:
    """How a sample is drawn."""

    height: int = _key(720, "pixels (stable_diffusion: 512 if left out)", minimum=1)
    width: int = _key(720, "pixels (stable_diffusion: 512 if left out)", minimum=1)
    frames: int = _key(1, "frames of a video, 4k + 1; 1: an image (one latent frame)", minimum=1)
    fps: int = _key(8, "frames a second of saved videos, and what video rewards are told", minimum=1)
    vae_tiling: bool = _key(False, "decode in overlapping tiles: long or large videos in bounded memory, seams blended")
    steps: int = _key(16, "sampling steps, the paper's T (stable_diffusion: 50 if left out)", minimum=2)
    shift: float = _key(3.0, "shift of the flow schedule: sigma = shift t / (1 + (shift - 1) t)", above=0)
    transition: str = _key(
        "flow_sde",
        "sampler of the rollout: of models that predict a velocity flow_sde (eq. 8), of those that predict noise ddim or "
        "diffusion_sde (eq. 7) (stable_diffusion: ddim if left out)",
        choices=transitions.names,
    )
    noise_level: float = _key(
        0.3,
        "epsilon_t of the SDE, eta of ddim; 0 would leave nothing to learn from (stable_diffusion: 1.0 if left out)",
        above=0,
    )
    noise_decay: float = _key(
        0.0, "the noise level falls towards the data as t ** noise_decay, t from 1 to 0; 0: constant, 1: linear", minimum=0
    )
    guidance_scale: float = _key(3.5, "embedded guidance (models distilled for it; skyreels_i2v: 1.0 if left out)", minimum=0)
    cfg_scale: float = _key(
        1.0,
        "classifier-free guidance w: u + w (c - u); 1: none (skyreels_i2v, stable_diffusion, wan: 5.0 if left out)",
        minimum=1,
    )
    negative_prompt: str = _key("", "what guidance leads away from, where a line of the prompt file does not say")
    init_noise: str = _key(
        "shared",
        "initial noise: shared by a prompt's group (the paper) or per_sample (objectives ddpo, dpok, refl: this if left out)",
        choices=["shared", "per_sample"],
    )


@dataclass
class BestOfConfig:
    """Train on the best and worst of each group only."""

    top: int = _key(MISSING, "samples of highest advantage", minimum=1)
    bottom: int = _key(MISSING, "samples of lowest advantage", minimum=1)


@dataclass
class TimestepsConfig:
    """Which timesteps an update trains on."""

    strategy: str = _key(
        "random",
        "random, first (noisiest), last, all, or late: one drawn from the last ones (objective refl: late if left out)",
        choices=list(timesteps.STRATEGIES),
    )
    fraction: float = _key(
        0.6,
        "tau: min(ceil(fraction x steps), steps - 1) timesteps; 1.0 with all; with late the share of the trainable ones to "
        "draw from (objective refl: 0.25 if left out)",
        above=0,
        maximum=1,
    )
    per: str = _key(
        "sample", "one random draw per sample, or per group (objective dpo: group if left out)", choices=["sample", "group"]
    )


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
    best_of: BestOfConfig | None = _key(
        None, "train only on top and bottom samples of each group (objective dpo: {top: 1, bottom: 1} if left out)"
    )
    timesteps: TimestepsConfig = _key(TimestepsConfig, "timestep selection")
    normalisation: str = _key(
        "group",
        "what rewards are normalised over: the prompt's group (the paper), the iteration, or the prompt's last rewards "
        "(objective ddpo: prompt_history, dpok: global if left out)",
        choices=list(NORMALISATIONS),
    )
    history: HistoryConfig = _key(HistoryConfig, "of normalisation prompt_history")
    clip_range: float = _key(1e-4, "clip range of the ratio (grpo, ddpo, dpok)", above=0)
    advantage_clip: float | None = _key(5.0, "advantages are clamped to +- this (grpo, ddpo, dpok)", above=0)
    updates_per_iteration: int = _key(
        4,
        "optimiser steps per iteration; each takes whole prompts (skyreels_i2v, stable_diffusion, wan: 1 if left out)",
        minimum=1,
    )
    cfg_gradients: str = _key(
        "both",
        "passes of classifier-free guidance that are trained: both (the paper) or conditional",
        choices=["both", "conditional"],
    )
    kl_weight: float = _key(
        0.0,
        "weight of the KL to the starting weights (grpo, dpok); 0: none, and no second copy kept (objective dpok: 0.01 if left "
        "out)",
        minimum=0,
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

    kind: str = _key(MISSING, "registered reward")
    checkpoint: str | None = _key(None, "its weights, for kinds that have some")
    params: dict[str, Any] = _key({}, "settings of this kind")
    placement: str = _key(
        "inline", "where it runs: in the training process, in a process of its own, or behind a server", choices=PLACEMENTS
    )
    python: str | None = _key(None, "placement=process: interpreter of another environment (default: this one)")
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
    timeout_s: float = _key(300.0, "seconds in which a reward must have scored a micro-batch", above=0)
    retries: int = _key(2, "how often a request that failed is made again before its samples are masked", minimum=0)
    backoff_s: float = _key(0.5, "seconds before the first of these, doubled for each further one", minimum=0)
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


@dataclass
class EngineConfig:
    """Who moves the weights."""

    kind: str = _key("local", "local: one process; deepspeed: torchrun, any number", choices=["local", "deepspeed"])
    zero_stage: int = _key(2, "DeepSpeed ZeRO stage (deepspeed only)", minimum=0, maximum=3)
    offload: str = _key(
        "none", "what DeepSpeed keeps in host memory (deepspeed only)", choices=["none", "optimizer", "parameters"]
    )
    deepspeed_json: str | None = _key(None, "your DeepSpeed JSON: may repeat ours or say auto, and tunes the rest (deepspeed)")
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

    dir: str = _key(MISSING, "folder of the run: metrics, samples, checkpoints; a second start resumes from it")
    iterations: int = _key(300, "iterations of Algorithm 1", minimum=1)
    seed: int = _key(0, "seed of all sampling noise and timestep choices")
    save_every: int = _key(50, "iterations between checkpoints (the last iteration is always saved)", minimum=1)
    keep: int = _key(3, "newest checkpoints kept", minimum=1)
    eval_every: int = _key(50, "iterations between evaluations on fixed noise with the ODE sampler; 0: never", minimum=0)
    eval_prompts: int = _key(32, "prompts of each set (training, kept out) scored at an evaluation", minimum=1)
    eval_samples: int = _key(2, "samples per prompt at an evaluation", minimum=1)
    sample_every: int = _key(50, "iterations between saved pictures or clips of fixed prompts and noise; 0: never", minimum=0)
    sample_prompts: int = _key(8, "prompts of those pictures or clips", minimum=1)
    deterministic: bool = _key(False, "deterministic GPU kernels (slower); exact resume on GPUs needs it")
    threads: int | None = _key(None, "CPU threads per process; part of exact resume on CPUs", minimum=1)
    timeout_minutes: int = _key(30, "how long a process waits for the others before the run fails", minimum=1)
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


# Keys that may differ when a run is resumed: they change where things lie, what is kept and shown and how the work is
# spread, not what is computed. (The checkpoint, the prompts and the embeddings' dtype are compared by content.)
FREE_ON_RESUME = [
    "model.path",
    "prompts.path",
    "prompts.eval_path",
    "model.cfg_batched",
    "rewards.async",
    "rewards.timeout_s",
    "rewards.retries",
    "rewards.backoff_s",
    "rewards.max_invalid_fraction",
    "rewards.models.*.placement",
    "rewards.models.*.python",
    "rewards.models.*.device",
    "rewards.models.*.url",
    "rewards.models.*.token_variable",
    "rewards.models.*.checkpoint",
    "rewards.models.*.params.tokenizer",
    "rewards.models.*.params.clip",
    "rewards.models.*.params.template",
    "rewards.models.*.params.base",
    "engine.kind",
    "engine.zero_stage",
    "engine.offload",
    "engine.deepspeed_json",
    "engine.sequence_parallel",
    "engine.offload_idle",
    "engine.activation_checkpointing",
    "run.dir",
    "run.iterations",
    "run.save_every",
    "run.keep",
    "run.eval_*",
    "run.sample_*",
    "run.timeout_minutes",
    "run.wandb",
]


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply ``key=value`` overrides, and check every value on its own and against the others.

    A top-level ``base: FILE`` (relative to the file) is read first and overridden. Relative paths in values are relative to
    the working directory.

    Raises:
        ConfigError: unknown key, wrong type, value out of range, missing key, impossible combination.
        FileNotFoundError: no such file.
    """
    return build(_read_yaml(Path(path)), overrides)


def build(values: dict[str, Any] | DictConfig, overrides: list[str] | None = None) -> Config:
    """Like :func:`load`, from nested values in place of a file.

    Raises:
        ConfigError: as :func:`load` does.
    """
    given = OmegaConf.merge(values, _parse_overrides(overrides or []))
    of_objective = _defaults(given, "grpo.objective", objectives.OBJECTIVES)
    of_model = _defaults(given, "model.kind", _families())
    config = _to_dataclasses(OmegaConf.merge(of_objective, of_model, given))
    check(config)
    return config


def _families() -> Registry[Any]:
    from fastvideo_grpo.families import FAMILIES  # families are made of configurations

    return FAMILIES


def _defaults(given: Any, key: str, registry: Registry[Any]) -> DictConfig:
    """What the thing named by a key has instead of other keys' own defaults."""
    name = OmegaConf.select(given, key)
    if name not in registry.names():
        return OmegaConf.create()  # told with all other wrong values, or left out
    try:
        defaults = getattr(registry[name], "defaults", {})
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
    try:
        defaults = OmegaConf.create(dict(defaults))
        _merged(defaults)
    except ConfigError as error:
        raise ConfigError(f"{key}={name} brings defaults that cannot be: {error}") from error
    return defaults


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise FileNotFoundError(f"no such configuration file: {path}")
    try:
        raw = OmegaConf.load(path)
    except Exception as error:  # yaml's errors have no common public class that says where
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, DictConfig):
        raise ConfigError(f"{path} must hold a mapping of the sections {', '.join(f.name for f in fields(Config))}")
    base = raw.pop("base", None)
    if base is None:
        return raw
    merged = OmegaConf.merge(_read_yaml(path.parent / str(base)), raw)
    assert isinstance(merged, DictConfig)
    return merged


def _parse_overrides(overrides: list[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"override {item!r} must be written key=value, for example run.iterations=10")
    return OmegaConf.from_dotlist(overrides)


def _in_file(name: str) -> str:
    """A field's name as files have it."""
    return name.rstrip("_")


def _known_keys(cls: type[Any], prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        inner = next((a for a in (hint, *get_args(hint)) if is_dataclass(a)), None)
        yield prefix + _in_file(name)
        if isinstance(inner, type):
            yield from _known_keys(inner, f"{prefix}{name}{'.*' if 'dict' in str(hint) else ''}.")


def _merged(raw: Any) -> Any:
    """``raw`` over the keys' own defaults; raises ConfigError for an unknown key or a wrong type."""
    try:
        return OmegaConf.merge(OmegaConf.structured(Config), _renamed(raw, "async", "async_"))
    except OmegaConfBaseException as error:
        raise _told(error) from error


def _to_dataclasses(raw: Any) -> Config:
    merged = _merged(raw)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError("missing: " + "; ".join(f"{key} ({_help_of(key)})" for key in missing))
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _told(error) from error
    assert isinstance(config, Config)
    return config


def _told(error: OmegaConfBaseException) -> ConfigError:
    key = _in_file(str(getattr(error, "full_key", None) or ""))
    if "not in" in str(error):
        near = difflib.get_close_matches(key, list(_known_keys(Config)), n=1, cutoff=0.6)
        allowed = [_in_file(f.name) for f in fields(_section_of(key.rpartition(".")[0]))]
        hint = f"did you mean {near[0]}? " if near else ""
        return ConfigError(f"unknown key {key}: {hint}keys here: {', '.join(allowed)}")
    return ConfigError(f"{key}: {str(error).splitlines()[0]} ({_help_of(key)})")


def _renamed(raw: Any, old: str, new: str) -> Any:
    """``raw`` with the key ``old`` of the rewards called ``new``."""
    plain = OmegaConf.to_container(raw) if OmegaConf.is_config(raw) else raw
    rewards = plain.get("rewards") if isinstance(plain, dict) else None
    if not isinstance(rewards, dict):
        return raw
    if new in rewards:
        raise ConfigError(f"unknown key rewards.{new}: did you mean rewards.{old}?")
    assert isinstance(plain, dict)
    return OmegaConf.create({**plain, "rewards": {new if key == old else key: value for key, value in rewards.items()}})


def _section_of(key: str) -> type[Any]:
    """The dataclass that holds the keys under a dotted key (of a reward or an output: under its name)."""
    cls: Any = Config
    named = False  # the next part is the name of a reward or an output
    for part in key.split(".") if key else []:
        if named:
            named = False
            continue
        hint = get_type_hints(cls).get(part)
        inner = next((a for a in (hint, *get_args(hint)) if is_dataclass(a)), None)
        if inner is None:
            break
        cls, named = inner, "dict" in str(hint)
    return cls


def _help_of(key: str) -> str:
    section, _, name = key.rpartition(".")
    return next((f.metadata.get("help", "") for f in fields(_section_of(section)) if _in_file(f.name) == name), "")


def _check_values(node: Any, prefix: str) -> Iterator[str]:
    """Problems of single values, from the bounds and choices beside each key."""
    for f in fields(node):
        value, key, allowed = getattr(node, f.name), prefix + _in_file(f.name), f.metadata
        if is_dataclass(value):
            yield from _check_values(value, key + ".")
        elif isinstance(value, dict):
            for name, item in value.items():
                if is_dataclass(item):
                    yield from _check_values(item, f"{key}.{name}.")
        elif value is None:
            continue
        elif allowed.get("choices") is not None:
            known = allowed["choices"]() if callable(allowed["choices"]) else allowed["choices"]
            if value not in known:
                near = nearest(value, known) if isinstance(value, str) else ""
                yield f"{key} is {value!r}{near}; allowed: {', '.join(map(str, known))}"
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                yield f"{key} is {value}; it must be a finite number"
            elif "minimum" in allowed and value < allowed["minimum"]:
                yield f"{key} is {value}; it must be at least {allowed['minimum']}"
            elif "above" in allowed and value <= allowed["above"]:
                yield f"{key} is {value}; it must be above {allowed['above']}"
            elif "maximum" in allowed and value > allowed["maximum"]:
                yield f"{key} is {value}; it must be at most {allowed['maximum']}"


def _check_combinations(config: Config) -> Iterator[str]:
    grpo, sample = config.grpo, config.sample
    if grpo.best_of is not None and grpo.best_of.top + grpo.best_of.bottom > grpo.group_size:
        yield (
            f"grpo.best_of takes {grpo.best_of.top} + {grpo.best_of.bottom} samples of a group of {grpo.group_size}: "
            f"set grpo.group_size to at least {grpo.best_of.top + grpo.best_of.bottom}"
        )
    if grpo.history.minimum > grpo.history.size:
        yield (
            f"grpo.history.minimum is {grpo.history.minimum}, but no more than grpo.history.size={grpo.history.size} rewards "
            f"of a prompt are remembered: set the size to at least {grpo.history.minimum}"
        )
    try:
        objective = make_objective(config)
    except ValueError as error:
        yield str(error)
    else:
        yield from _check_objective(config, objective)
    if grpo.timesteps.strategy == "all" and grpo.timesteps.fraction != 1.0:
        yield f"grpo.timesteps.fraction is {grpo.timesteps.fraction}; with strategy all it must be 1.0"
    if sample.negative_prompt and sample.cfg_scale <= 1:
        yield (
            f"sample.negative_prompt is {sample.negative_prompt!r}, but sample.cfg_scale={sample.cfg_scale:g} is no guidance: "
            "set it above 1, or remove the negative prompt"
        )
    if config.model.cfg_batched and sample.cfg_scale <= 1:
        yield (
            f"model.cfg_batched is true, but sample.cfg_scale={sample.cfg_scale:g} is no guidance: set it above 1, or "
            "model.cfg_batched=false"
        )
    if grpo.cfg_gradients != "both" and sample.cfg_scale <= 1:
        yield (
            f"grpo.cfg_gradients is {grpo.cfg_gradients}, but sample.cfg_scale={sample.cfg_scale:g} is no guidance: set it "
            "above 1, or grpo.cfg_gradients=both"
        )
    if sample.transition == "ode":
        yield "sample.transition is 'ode', which has no log-prob to train on; use flow_sde (of noise predictors: ddim)"
    else:
        try:
            transitions.get(sample.transition, noise_level=sample.noise_level, noise_decay=sample.noise_decay)
        except ValueError as error:
            yield f"sample.transition: {error}"
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        yield f"optim.betas is {list(config.optim.betas)}; it must be two numbers from 0 to below 1"
    if config.optim.ema_decay == 1.0:
        yield "optim.ema_decay is 1.0, an average that never moves; use 0.995, or null for none"
    if not config.rewards.models:
        yield "rewards.models is empty; name at least one reward, for example rewards.models.size.kind=jpeg_size"
    rewards = config.rewards
    longest = rewards.timeout_s * (rewards.retries + 1) + rewards.backoff_s * (2**rewards.retries - 1)
    if config.engine.kind == "deepspeed" and longest >= 60 * config.run.timeout_minutes:
        yield (
            f"rewards.timeout_s={rewards.timeout_s:g} with {rewards.retries} retries lets a reward take {longest:g} s for a "
            f"micro-batch, and the other processes give up after run.timeout_minutes={config.run.timeout_minutes:g}: "
            f"set run.timeout_minutes to at least {math.ceil(longest / 60) + 5}"
        )
    weights = [o.weight for r in config.rewards.models.values() for o in r.outputs.values()]
    if weights and not any(weights) and all(r.outputs for r in config.rewards.models.values()):
        yield "every rewards.models.*.outputs.*.weight is 0; at least one must count"
    if config.engine.kind == "local" and config.engine.offload != "none":
        yield f"engine.offload is {config.engine.offload!r}, which needs engine.kind=deepspeed"
    if config.engine.kind == "local" and config.engine.deepspeed_json is not None:
        yield f"engine.deepspeed_json is {config.engine.deepspeed_json!r}, which needs engine.kind=deepspeed"
    if config.engine.offload == "parameters" and config.engine.zero_stage != 3:
        yield "engine.offload is 'parameters', which needs engine.zero_stage=3"
    if config.engine.kind == "local" and config.engine.sequence_parallel > 1:
        yield f"engine.sequence_parallel is {config.engine.sequence_parallel}, which needs engine.kind=deepspeed (and torchrun)"
    try:
        checkpointed_blocks(config.engine.activation_checkpointing)
    except ValueError as error:
        yield f"engine.activation_checkpointing {error}"
    if sample.frames % 4 != 1:
        below = max(1, sample.frames - (sample.frames - 1) % 4)
        yield f"sample.frames is {sample.frames}; it must be 4k + 1: {below} or {below + 4}"
    if config.engine.offload == "optimizer" and config.engine.zero_stage == 0:
        yield "engine.offload is 'optimizer', which needs engine.zero_stage of 1, 2 or 3"


def make_objective(config: Config) -> objectives.Objective:
    """The configured objective.

    Raises:
        ValueError: what :func:`fastvideo_grpo.grpo.objectives.get` refuses.
    """
    grpo = config.grpo
    return objectives.get(
        grpo.objective,
        clip_range=grpo.clip_range,
        advantage_clip=grpo.advantage_clip,
        kl_weight=grpo.kl_weight,
        params=grpo.objective_params,
    )


def _check_objective(config: Config, objective: objectives.Objective) -> Iterator[str]:
    """What the objective's needs rule out (whether the rewards have gradients: :mod:`fastvideo_grpo.plan`)."""
    grpo, engine = config.grpo, config.engine
    name, size, best, when = grpo.objective, engine.micro_batch_size, grpo.best_of, grpo.timesteps
    if grpo.kl_weight > 0 and not objectives.takes(name, "kl_weight"):
        yield (
            f"grpo.kl_weight is {grpo.kl_weight:g}, but objective {name} has no such term: set it to 0 (those of "
            f"{', '.join(objectives.taking('kl_weight'))} have)"
        )
    default = GRPOConfig()
    for key in ("clip_range", "advantage_clip"):
        if not objectives.takes(name, key) and getattr(grpo, key) != getattr(default, key):
            yield f"grpo.{key} is {getattr(grpo, key)}, but objective {name} does not use it: leave it out"
    if objective.needs_reward_gradients and grpo.normalisation != default.normalisation:
        yield f"grpo.normalisation is {grpo.normalisation}, but objective {name} has no advantages: leave it out"
    if grpo.normalisation != "prompt_history" and grpo.history != default.history:
        yield (
            f"grpo.history is set, but grpo.normalisation={grpo.normalisation} remembers nothing: set prompt_history, or leave "
            "it out"
        )
    if objective.pairs:
        if best is None or best.top != best.bottom:
            now = "null" if best is None else f"{{top: {best.top}, bottom: {best.bottom}}}"
            yield (
                f"grpo.best_of is {now}, but objective {name} takes pairs of a best and a worst sample: set as many top as "
                "bottom, for example grpo.best_of={top: 1, bottom: 1}"
            )
        if size % 2:
            yield (
                f"engine.micro_batch_size is {size}, but objective {name} takes pairs: set it to "
                f"{f'{size - 1} or ' if size > 1 else ''}{size + 1}"
            )
        if when.per == "sample" and when.strategy in ("random", "late"):
            yield (
                f"grpo.timesteps.per is 'sample', but the two samples of a pair of objective {name} are compared at the same "
                f"timesteps: set grpo.timesteps.per=group, or strategy first, last or all (not {when.strategy})"
            )
    if objective.needs_reward_gradients:
        if engine.sequence_parallel > 1:
            yield (
                f"engine.sequence_parallel is {engine.sequence_parallel}, but objective {name} needs the gradient of the "
                "rewards, which only the first process of a group has: use 1"
            )
        if engine.offload_idle:
            yield (
                f"engine.offload_idle is true, but objective {name} goes backwards through the VAE, which would have left the "
                "device: use false"
            )


def checkpointed_blocks(value: str) -> int:
    """``engine.activation_checkpointing`` as a number: 0 none, 1 every block, K every K-th.

    Raises:
        ValueError: it is something else.
    """
    known = {"none": 0, "full": 1}
    prefix, _, every = value.partition(":")
    if prefix == "every" and every.isdigit() and int(every) >= 1:
        return int(every)
    if value not in known:
        raise ValueError(f"is {value!r}; allowed: none, full, every:K with K of 1 or more (every:2 is every second block)")
    return known[value]


def cautions(config: Config) -> list[str]:
    """What can run but is seldom meant, a line each."""
    lines = []
    if config.sample.cfg_scale > 1 and config.grpo.updates_per_iteration > 1:
        lines.append(
            f"grpo.updates_per_iteration is {config.grpo.updates_per_iteration} with sample.cfg_scale="
            f"{config.sample.cfg_scale:g}: guidance multiplies what an update changes, and the paper makes one update per "
            "iteration with it; watch train/clip_fraction, or set 1"
        )
    when = config.grpo.timesteps
    if make_objective(config).needs_reward_gradients and when.strategy != "late":
        lines.append(
            f"grpo.timesteps.strategy is {when.strategy}, but objective {config.grpo.objective} is meant for one late step: "
            "the clean sample predicted at a noisy one is a blur that no reward was made for; set late, with fraction 0.25"
        )
    return lines


def check(config: Config) -> None:
    """Raise :class:`ConfigError` naming every bad value and impossible combination."""
    problems = list(_check_values(config, ""))
    problems += [] if problems else list(_check_combinations(config))
    if problems:
        raise ConfigError("\n".join(problems))


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain containers."""
    plain = OmegaConf.to_container(_renamed(OmegaConf.structured(config), "async_", "async"))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load` reads back."""
    return OmegaConf.to_yaml(_renamed(OmegaConf.structured(config), "async_", "async"))


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def changed_on_resume(old: dict[str, Any], config: Config) -> list[str]:
    """Keys that forbid to go on with a run that was started with the settings ``old`` (from :func:`to_dict`).

    Keys that a later version added count as their defaults.
    """
    known = {*_known_keys(Config)}
    before = _flat(to_dict(_to_dataclasses(OmegaConf.create({k: v for k, v in old.items() if k in known}))))
    after = _flat(to_dict(config))
    for flat in (before, after):
        # Which folder does not matter; whether embeddings passed through the cache's dtype does.
        flat["prompts.embeddings"] = flat["prompts.embeddings"] == "none"
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    # A server has its reward's parameters, and who names it answers for them.
    for name in config.rewards.models:
        if "http" in (flat.get(f"rewards.models.{name}.placement") for flat in (before, after)):
            changed = [key for key in changed if not key.startswith(f"rewards.models.{name}.params.")]
    return [key for key in changed if not any(fnmatch.fnmatchcase(key, pattern) for pattern in FREE_ON_RESUME)]


def reference() -> str:
    """Every key with default and meaning, as Markdown (docs/configuration.md)."""
    lines = []
    for section in fields(Config):
        cls = get_type_hints(Config)[section.name]
        lines += [f"## {section.name}", "", str(cls.__doc__), "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        lines += list(_reference_rows(cls, section.name + "."))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _reference_rows(cls: type[Any], prefix: str) -> Iterator[str]:
    for f in fields(cls):
        hint = get_type_hints(cls)[f.name]
        inner = next((a for a in (hint, *get_args(hint)) if is_dataclass(a)), None)
        default = f.default if f.default_factory is NO_DEFAULT else f.default_factory()
        shown = "required" if default == MISSING else "null" if default is None else str(default)
        if is_dataclass(default):
            shown = ""
        known = f.metadata["choices"]
        bounds = {"minimum": "at least", "above": "above", "maximum": "at most"}
        limits = [f"{words} {f.metadata[name]}" for name, words in bounds.items() if name in f.metadata]
        allowed = ", ".join((known() if callable(known) else known) if known is not None else limits)
        yield f"| `{prefix}{_in_file(f.name)}` | {shown} | {allowed} | {f.metadata['help']} |"
        if isinstance(inner, type):
            yield from _reference_rows(inner, f"{prefix}{f.name}.{'NAME.' if isinstance(default, dict) else ''}")


if __name__ == "__main__":
    print("# Configuration\n\nEvery key of a run, as `fastvideo_grpo/config.py` defines it; this page is printed from there")
    print("(`python -m fastvideo_grpo.config > docs/configuration.md`).\n")
    print(reference(), end="")
