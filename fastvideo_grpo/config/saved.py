"""A configuration as a run keeps it, and what of it may differ when the run is resumed."""

from __future__ import annotations

import fnmatch
from typing import Any

from fastvideo_grpo.config import files, values
from fastvideo_grpo.config.files import Given
from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.config.loading import filled
from fastvideo_grpo.config.paths import as_typed
from fastvideo_grpo.config.values import known_keys
from fastvideo_grpo.rewards import registry

# Keys that may differ when a run is resumed: they change where things lie, what is kept and shown and how the work is
# spread, not what is computed. (The checkpoint, the prompts and the embeddings' dtype are compared by content.)
FREE_ON_RESUME = [
    "model.path",
    "prompts.path",
    "prompts.eval_path",
    "prompts.duplicates",
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


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain containers."""
    return values.plain(config)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load` reads back."""
    nested = values.typed(config)
    for name, reward in config.rewards.models.items():
        params = nested["rewards"]["models"][name]["params"]
        for parameter in registry.paths(reward.kind) & params.keys():
            if isinstance(params[parameter], str):
                params[parameter] = as_typed(params[parameter])
    return files.dump(nested)


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
    before = _flat(to_dict(filled(Given.of({k: v for k, v in old.items() if k in known}))))
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
