"""The run configuration: dataclasses filled from YAML and dotted overrides, checked before anything is loaded.

Every key's meaning stands beside it (:mod:`fastvideo_grpo.config_reference` prints them). What values alone rule out is in
:mod:`fastvideo_grpo.config_checks`; what the model rules out is in its family's ``problems``, which
:func:`fastvideo_grpo.plan.check_run` asks.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastvideo_grpo.errors import UserError
from fastvideo_grpo.extensions import Registry
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
        "tokens of the sequence text encoder: FLUX's T5, Wan's UMT5 and Stable Diffusion's CLIP pad and cut to them, "
        "HunyuanVideo's Llama only cuts",
        minimum=1,
    )
    seed: int = _key(0, "seed of the order in which prompts are drawn")


@dataclass
class SampleConfig:
    """How a sample is drawn."""

    height: int = _key(720, "pixels", minimum=1)
    width: int = _key(720, "pixels", minimum=1)
    frames: int = _key(1, "frames of a video, as many as the model's VAE takes (those here 4k + 1); 1: an image", minimum=1)
    fps: int = _key(8, "frames a second of saved videos, and what video rewards are told", minimum=1)
    vae_tiling: bool = _key(False, "decode in overlapping tiles: long or large videos in bounded memory, seams blended")
    steps: int = _key(16, "sampling steps, the paper's T", minimum=2)
    shift: float = _key(3.0, "shift of the flow schedule: sigma = shift t / (1 + (shift - 1) t)", above=0)
    transition: str = _key(
        "flow_sde",
        "sampler of the rollout: of models that predict a velocity flow_sde (eq. 8), of those that predict noise ddim or "
        "diffusion_sde (eq. 7)",
        choices=transitions.names,
    )
    noise_level: float = _key(0.3, "epsilon_t of the SDE, eta of ddim; 0 would leave nothing to learn from", above=0)
    noise_decay: float = _key(
        0.0, "the noise level falls towards the data as t ** noise_decay, t from 1 to 0; 0: constant, 1: linear", minimum=0
    )
    guidance_scale: float = _key(3.5, "embedded guidance, of models distilled for it", minimum=0)
    cfg_scale: float = _key(1.0, "classifier-free guidance w: u + w (c - u); 1: none", minimum=1)
    negative_prompt: str = _key("", "what guidance leads away from, where a line of the prompt file does not say")
    init_noise: str = _key(
        "shared",
        "initial noise: shared by a prompt's group (the paper) or per_sample",
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
        "random, first (noisiest), last, all, or late: one drawn from the last ones",
        choices=list(timesteps.STRATEGIES),
    )
    fraction: float = _key(
        0.6,
        "tau: min(ceil(fraction x steps), steps - 1) timesteps; 1.0 with all; with late the share of the trainable ones to "
        "draw from",
        above=0,
        maximum=1,
    )
    per: str = _key("sample", "one random draw per sample, or per group", choices=["sample", "group"])


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
        "what rewards are normalised over: the prompt's group (the paper), the iteration, or the prompt's last rewards",
        choices=list(NORMALISATIONS),
    )
    history: HistoryConfig = _key(HistoryConfig, "of normalisation prompt_history")
    clip_range: float = _key(1e-4, "clip range of the ratio (grpo, ddpo, dpok)", above=0)
    advantage_clip: float | None = _key(5.0, "advantages are clamped to +- this (grpo, ddpo, dpok)", above=0)
    updates_per_iteration: int = _key(4, "optimiser steps per iteration; each takes whole prompts", minimum=1)
    cfg_gradients: str = _key(
        "both",
        "passes of classifier-free guidance that are trained: both (the paper) or conditional",
        choices=["both", "conditional"],
    )
    kl_weight: float = _key(
        0.0, "weight of the KL to the starting weights (grpo, dpok); 0: none, and no second copy kept", minimum=0
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
    from fastvideo_grpo.config_checks import check  # checks are made of configurations

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


def name_in_file(name: str) -> str:
    """A field's name as files have it."""
    return name.rstrip("_")


def known_keys(cls: type[Any], prefix: str = "") -> Iterator[str]:
    """All keys of a section and those below it, as files have them; ``*`` stands for a name that a run gives."""
    for name, hint in get_type_hints(cls).items():
        inner = next((a for a in (hint, *get_args(hint)) if is_dataclass(a)), None)
        yield prefix + name_in_file(name)
        if isinstance(inner, type):
            yield from known_keys(inner, f"{prefix}{name}{'.*' if 'dict' in str(hint) else ''}.")


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
    key = name_in_file(str(getattr(error, "full_key", None) or ""))
    if "not in" in str(error):
        near = difflib.get_close_matches(key, list(known_keys(Config)), n=1, cutoff=0.6)
        allowed = [name_in_file(f.name) for f in fields(_section_of(key.rpartition(".")[0]))]
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
    return next((f.metadata.get("help", "") for f in fields(_section_of(section)) if name_in_file(f.name) == name), "")


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
    known = {*known_keys(Config)}
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
