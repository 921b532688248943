"""What a configuration cannot be, from its values alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from fastvideo_grpo.config.keys import (
    Config,
    GRPOConfig,
    SampleConfig,
    StochasticConfig,
    TimestepsConfig,
    checkpointed_blocks,
    guidance_of,
    make_objective,
    make_transition,
    old_weights_decay,
    stochastic_steps,
    trainable_steps,
)
from fastvideo_grpo.config.values import name_in_file
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.extensions import nearest
from fastvideo_grpo.grpo import objectives, timesteps
from fastvideo_grpo.sampling import transitions

_FLOAT32, _INT32 = torch.finfo(torch.float32), torch.iinfo(torch.int32)
LARGEST_ITERATION = 10**7
"""Samples of an iteration: each is a row of tables that every process keeps."""


def check(config: Config, models: Sequence[str]) -> None:
    """Raise :class:`ConfigError` naming every bad value and impossible combination.

    Args:
        models: what ``model.kind`` may be.
    """
    problems = list(_check_choice("model.kind", config.model.kind, models))
    problems += _check_values(config, "")
    problems += [] if problems else list(_check_combinations(config))
    if problems:
        raise ConfigError("\n".join(problems))


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


def _check_values(node: Any, prefix: str) -> Iterator[str]:
    """Problems of single values, from the bounds and choices beside each key."""
    for f in fields(node):
        value, key, allowed = getattr(node, f.name), prefix + name_in_file(f.name), f.metadata
        if is_dataclass(value):
            yield from _check_values(value, key + ".")
        elif isinstance(value, dict):
            for name, item in value.items():
                if is_dataclass(item):
                    yield from _check_values(item, f"{key}.{name}.")
        elif value is None:
            continue
        elif allowed.get("choices") is not None:
            yield from _check_choice(key, value, allowed["choices"]() if callable(allowed["choices"]) else allowed["choices"])
        elif isinstance(value, list):
            yield from (problem for i, item in enumerate(value) for problem in _check_number(f"{key}.{i}", item, {}))
        else:
            yield from _check_number(key, value, allowed)


def _check_choice(key: str, value: Any, known: Sequence[str]) -> Iterator[str]:
    if value not in known:
        near = nearest(value, known) if isinstance(value, str) else ""
        yield f"{key} is {value!r}{near}; allowed: {', '.join(map(str, known))}"


def _check_number(key: str, value: Any, allowed: Mapping[str, Any]) -> Iterator[str]:
    """The problem of a number, of which there is at most one; what is no number has none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    # What is computed is computed in float32, and what is counted is counted in 32 bits somewhere.
    largest, smallest = (_FLOAT32.max, _FLOAT32.tiny) if isinstance(value, float) else (_INT32.max, 0)
    if not math.isfinite(value):
        yield f"{key} is {value}; it must be a finite number"
    elif "minimum" in allowed and value < allowed["minimum"]:
        yield f"{key} is {value}; it must be at least {allowed['minimum']}"
    elif "above" in allowed and value <= allowed["above"]:
        yield f"{key} is {value}; it must be above {allowed['above']}"
    elif value > allowed.get("maximum", largest):
        yield f"{key} is {value}; it must be at most {allowed.get('maximum', largest)}"
    elif value < -largest:
        yield f"{key} is {value}; it must be at least {-largest}"
    elif value and abs(value) < smallest:
        zero = "" if "above" in allowed else ", or 0"
        yield f"{key} is {value}, which float32 loses; it must be at least {smallest:.2g}{zero}"


def _check_combinations(config: Config) -> Iterator[str]:
    grpo, sample = config.grpo, config.sample
    if grpo.best_of is not None and grpo.best_of.top + grpo.best_of.bottom > grpo.group_size:
        yield (
            f"grpo.best_of takes {grpo.best_of.top} + {grpo.best_of.bottom} samples of a group of {grpo.group_size}: "
            f"set grpo.group_size to at least {grpo.best_of.top + grpo.best_of.bottom}"
        )
    samples = grpo.prompts_per_iteration * grpo.group_size
    if samples > LARGEST_ITERATION:
        yield (
            f"grpo.prompts_per_iteration x grpo.group_size is {grpo.prompts_per_iteration} x {grpo.group_size} = {samples} "
            f"samples an iteration, of at most {LARGEST_ITERATION}: lower one of them"
        )
    if grpo.history.minimum > grpo.history.size:
        yield (
            f"grpo.history.minimum is {grpo.history.minimum}, but no more than grpo.history.size={grpo.history.size} rewards "
            f"of a prompt are remembered: set the size to at least {grpo.history.minimum}"
        )
    try:
        objective: objectives.Objective | None = make_objective(config)
    except ValueError as error:
        objective = None
        yield str(error)
    if objective is not None:
        yield from _check_objective(config, objective)
    yield from _check_stochastic(config, objective)
    if grpo.timesteps.strategy == "all" and grpo.timesteps.fraction != 1.0:
        yield f"grpo.timesteps.fraction is {grpo.timesteps.fraction}; with strategy all it must be 1.0"
    guidance = guidance_of(config)
    if sample.negative_prompt and max(guidance) <= 1:
        yield (
            f"sample.negative_prompt is {sample.negative_prompt!r}, but sample.cfg_scale={sample.cfg_scale:g} is no guidance: "
            "set it above 1, or remove the negative prompt"
        )
    if config.model.cfg_batched and max(guidance) <= 1:
        yield (
            f"model.cfg_batched is true, but sample.cfg_scale={sample.cfg_scale:g} is no guidance: set it above 1, or "
            "model.cfg_batched=false"
        )
    if grpo.cfg_gradients != "both" and guidance.training <= 1:
        key = "sample" if grpo.cfg_scale is None else "grpo"
        yield (
            f"grpo.cfg_gradients is {grpo.cfg_gradients}, but {key}.cfg_scale={guidance.training:g} is no guidance: set it "
            "above 1, or grpo.cfg_gradients=both"
        )
    if sample.transition == "ode":
        yield "sample.transition is 'ode', which has no log-prob to train on; use flow_sde (of noise predictors: ddim)"
    else:
        try:
            make_transition(sample)
        except ValueError as error:
            yield f"sample.transition: {error}"
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        yield f"optim.betas is {list(config.optim.betas)}; it must be two numbers from 0 to below 1"
    if config.optim.ema_decay is not None and torch.tensor(config.optim.ema_decay) == 1.0:  # to float32
        yield f"optim.ema_decay is {config.optim.ema_decay}, an average that never moves; use 0.995, or null for none"
    if config.optim.ema_ramp is not None and config.optim.ema_decay is None:
        yield f"optim.ema_ramp is {config.optim.ema_ramp:g}, but optim.ema_decay=null averages nothing: set that, e.g. to 0.3"
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
    if config.model.compile != "none" and config.engine.kind == "deepspeed" and config.engine.zero_stage == 3:
        yield (
            "model.compile is 'blocks', but with engine.zero_stage=3 weights are gathered at every layer inside a block, where "
            "torch stops compiling; use engine.zero_stage=2, or compile=none"
        )
    if config.engine.offload == "parameters" and config.engine.zero_stage != 3:
        yield "engine.offload is 'parameters', which needs engine.zero_stage=3"
    if config.engine.kind == "local" and config.engine.sequence_parallel > 1:
        yield f"engine.sequence_parallel is {config.engine.sequence_parallel}, which needs engine.kind=deepspeed (and torchrun)"
    try:
        checkpointed_blocks(config.engine.activation_checkpointing)
    except ValueError as error:
        yield f"engine.activation_checkpointing {error}"
    if config.engine.offload == "optimizer" and config.engine.zero_stage == 0:
        yield "engine.offload is 'optimizer', which needs engine.zero_stage of 1, 2 or 3"


# Keys of grpo -> the settings of an objective by which it has them.
_SETTINGS_OF = {
    ("clip_range",): ("clip_range", "trust_region"),
    ("clip_range_upper", "trust_region", "kl_threshold"): ("trust_region",),
    ("advantage_clip",): ("advantage_clip", "advantage_range"),
    ("advantage_clip_upper",): ("advantage_range",),
}


def _check_trust_region(grpo: GRPOConfig, default: GRPOConfig) -> Iterator[str]:
    """Keys that the trust region does not read."""
    if grpo.trust_region == "dppo":
        for key in ("clip_range", "clip_range_upper"):
            if getattr(grpo, key) != getattr(default, key):
                yield (
                    f"grpo.{key} is {getattr(grpo, key)}, but trust region dppo clips no ratio: leave it out (it reads "
                    "grpo.kl_threshold)"
                )
    elif grpo.kl_threshold != default.kl_threshold:
        yield f"grpo.kl_threshold is {grpo.kl_threshold:g}, which only trust region dppo reads: leave it out"


# Which choice of sample.stochastic.steps reads which of its keys.
_READ_BY = {
    "width": ("window",),
    "start": ("window",),
    "moves": ("window",),
    "stride": ("window",),
    "every": ("window",),
    "fraction": ("one",),
    "per": ("one",),
    "tail": ("window", "one"),
}


def _check_stochastic(config: Config, objective: objectives.Objective | None) -> Iterator[str]:
    """What cannot be of the steps that draw noise, and of the samplers that draw none."""
    sample, grpo = config.sample, config.grpo
    chosen, default = sample.stochastic, StochasticConfig()
    unread = [
        key
        for key, choices in _READ_BY.items()
        if chosen.steps not in choices and getattr(chosen, key) != getattr(default, key)
    ]
    for key in unread:
        yield (
            f"sample.stochastic.{key} is {getattr(chosen, key)}, which is of steps={' or '.join(_READ_BY[key])}, and steps is "
            f"{chosen.steps}: leave it out"
        )
    if chosen.steps == "window":
        if chosen.moves != "progressive":
            for key in ("stride", "every"):
                if getattr(chosen, key) != getattr(default, key):
                    yield f"sample.stochastic.{key} is {getattr(chosen, key)}, which is of moves=progressive: leave it out"
        if chosen.moves == "random" and chosen.start:
            yield f"sample.stochastic.start is {chosen.start}, but moves=random draws where the window begins: leave it out"
    try:
        velocity = transitions.prediction(sample.transition) == "velocity"
    except ValueError:
        return  # the transition is not there, which is told by itself
    if chosen.tail < 1:
        if not velocity:
            yield (
                f"sample.stochastic.tail is {chosen.tail:g}, but its solver is made for networks that predict a velocity, and "
                f"transition {sample.transition} is one of those that predict noise: use 1"
            )
        if chosen.steps == "one" and chosen.per == "sample":
            yield (
                f"sample.stochastic.tail is {chosen.tail:g}, but with per=sample the samples of a micro-batch have their "
                "stochastic steps at several places, and no tail in common: use per=group, or tail=1"
            )
    if sample.eval_solver == "dpm_solver" and not velocity:
        yield (
            f"sample.eval_solver is dpm_solver, which is made for networks that predict a velocity, and transition "
            f"{sample.transition} is one of those that predict noise: use ode"
        )
    if chosen.steps == "none" and sample.init_noise == "shared":
        yield (
            "sample.init_noise is shared, but with sample.stochastic.steps=none nothing else is drawn, and all samples of a "
            "prompt would be the same: use per_sample"
        )
    if sample.solver != SampleConfig().solver:
        if chosen.steps != "none":
            yield (
                f"sample.solver is {sample.solver}, which is of sample.stochastic.steps=none, and steps is {chosen.steps}: "
                "leave it out (what lies behind stochastic steps is solved by sample.stochastic.tail)"
            )
        elif not velocity:
            yield (
                f"sample.solver is {sample.solver}, which is made for networks that predict a velocity, and transition "
                f"{sample.transition} is one of those that predict noise: use ode"
            )
    try:
        stochastic_steps(config)
    except ValueError as error:
        yield f"sample.stochastic.{error}"
        return
    when = grpo.timesteps
    try:
        if objective is not None:
            timesteps.count(sample.steps, when.strategy, when.fraction, trainable_steps(config, objective))
    except ValueError as error:
        yield f"grpo.timesteps.{error}"
    if objective is None or chosen.steps == "all" or getattr(objective, "clean", False):
        return
    if chosen.steps == "none":
        yield (
            f"sample.stochastic.steps is none, but objective {grpo.objective} trains steps that draw noise: use all, window or "
            "one"
        )
        return
    if not getattr(objective, "needs_density", True):
        yield (
            f"sample.stochastic.steps is {chosen.steps}, but objective {grpo.objective} needs no density and trains steps of "
            "any kind: use all"
        )
    if objective.pairs and chosen.steps == "one" and chosen.per == "sample":
        yield (
            f"sample.stochastic.per is 'sample', but the two samples of a pair of objective {grpo.objective} are compared at "
            "the same timesteps: use per=group"
        )


def _check_clean(config: Config, objective: objectives.Objective) -> Iterator[str]:
    """Keys of objectives on clean samples, and keys that these do not read."""
    grpo, when, default = config.grpo, config.grpo.timesteps, TimestepsConfig()
    of_drawn = [key for key in ("level_mean", "level_std", "level_shift") if getattr(when, key) != getattr(default, key)]
    if not getattr(objective, "clean", False):
        keys = [f"grpo.{key}" for key in ("old_weights", "cfg_scale") if getattr(grpo, key) is not None]
        keys += [f"grpo.timesteps.{key}" for key in ["levels"] * (when.levels != default.levels) + of_drawn]
        if keys:
            known = ", ".join(objectives.on_clean_samples())
            yield (
                f"{', '.join(keys)} is set, which is of objectives on clean samples ({known}), and {grpo.objective} is none: "
                "leave it out"
            )
        return
    try:
        old_weights_decay(config)
    except ValueError as error:
        yield f"grpo.old_weights.decay: {error}"
    if when.weight != default.weight:
        yield (
            f"grpo.timesteps.weight is {when.weight}, which is made of the sampler's steps, of which objective "
            f"{grpo.objective} trains none: use none"
        )
    if when.levels == "sampler":
        for key in of_drawn:
            yield f"grpo.timesteps.{key} is {getattr(when, key):g}, which is of drawn levels, not of sampler's: leave it out"
    elif when.strategy not in ("random", "all"):
        yield (
            f"grpo.timesteps.strategy is {when.strategy}, but levels={when.levels} draws them: use random (fraction x "
            "sample.steps levels a sample) or all"
        )
    if objective.pairs and when.levels != "sampler" and when.per == "sample":
        yield (
            f"grpo.timesteps.per is 'sample', but the two samples of a pair of objective {grpo.objective} are compared at the "
            "same levels: set grpo.timesteps.per=group"
        )
    if when.levels == "uniform":
        for key in ("level_mean", "level_std"):
            if key in of_drawn:
                yield f"grpo.timesteps.{key} is {getattr(when, key):g}, which is of levels=logit_normal: leave it out"


def _check_objective(config: Config, objective: objectives.Objective) -> Iterator[str]:
    """What the objective's needs rule out (whether the rewards have gradients: :mod:`fastvideo_grpo.planning.plan`)."""
    grpo, engine = config.grpo, config.engine
    name, size, best, when = grpo.objective, engine.micro_batch_size, grpo.best_of, grpo.timesteps
    if grpo.kl_weight > 0 and not objectives.takes(name, "kl_weight"):
        yield (
            f"grpo.kl_weight is {grpo.kl_weight:g}, but objective {name} has no such term: set it to 0 (those of "
            f"{', '.join(objectives.taking('kl_weight'))} have)"
        )
    default = GRPOConfig()
    for keys, settings in _SETTINGS_OF.items():
        for key in keys:
            if getattr(grpo, key) != getattr(default, key) and not any(objectives.takes(name, one) for one in settings):
                yield f"grpo.{key} is {getattr(grpo, key)}, but objective {name} does not use it: leave it out"
    if grpo.ema_kl_weight > 0 and not objectives.takes(name, "ema_kl_weight"):
        yield (
            f"grpo.ema_kl_weight is {grpo.ema_kl_weight:g}, but objective {name} has no such term: set it to 0 (those of "
            f"{', '.join(objectives.taking('ema_kl_weight'))} have)"
        )
    if "ema" in getattr(objective, "stored", ()) and config.optim.ema_decay is None:
        yield (
            f"grpo.ema_kl_weight is {grpo.ema_kl_weight:g}, but optim.ema_decay=null averages nothing: set it, for example "
            "optim.ema_decay=0.3 optim.ema_ramp=0.001"
        )
    yield from _check_clean(config, objective)
    yield from _check_trust_region(grpo, default)
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
