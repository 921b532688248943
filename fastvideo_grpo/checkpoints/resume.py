"""Whether a checkpoint may be gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from fastvideo_grpo.config import saved as config_saved
from fastvideo_grpo.config.keys import Config, guidance_of
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.prompts.images import image_digest
from fastvideo_grpo.sampling import noise


def check_resumable(state: dict[str, Any], config: Config, prompts: Sequence[Prompt], denoiser: str) -> None:
    """Refuse to go on with another run's checkpoint.

    Args:
        state: the checkpoint's trainer.json.
        denoiser: identity of the weights training starts from.

    Raises:
        ConfigError: settings that change what is computed, the prompts, the model to start from or the generator of noise
            differ; names them.
    """
    _check_noise(state, config)
    changed = config_saved.changed_on_resume(state["config"], config)
    if changed:
        raise ConfigError(
            f"run.dir={config.run.dir} holds a run with other values of {', '.join(changed)}; resuming would mix two runs. "
            "Set them back, or choose another run.dir"
        )
    before, now = state["images"], image_digests(prompts)
    changed_images = [prompt for prompt in prompts if before.get(prompt.id, now.get(prompt.id)) != now.get(prompt.id)]
    if changed_images:
        first = changed_images[0]
        raise ConfigError(
            f"{len(changed_images)} images are others than when {config.run.dir} was started, first {first.image} of prompt "
            f"{first.id!r}; restore them, or choose another run.dir"
        )
    if state["prompts"] != prompts_digest(prompts, config):
        if state["prompts_alone"] == prompts_digest(prompts, config, metadata=False):
            raise ConfigError(
                f"prompts.path={config.prompts.path} says something else of its prompts, which rewards are told, than when "
                f"{config.run.dir} was started (the prompts are the same); restore the file, or choose another run.dir"
            )
        raise ConfigError(
            f"prompts.path={config.prompts.path} holds other prompts than when {config.run.dir} was started; restore the "
            "file, or choose another run.dir"
        )
    if state["denoiser"] != denoiser:
        raise ConfigError(
            f"model.path={config.model.path} holds another network than the one {config.run.dir} was started from; set "
            "it back, or choose another run.dir"
        )


def _check_noise(state: dict[str, Any], config: Config) -> None:
    """Runs that say no version were made with the first."""
    if state.get("noise", 1) == noise.VERSION:
        return
    merged = "" if config.model.lora is None else " --merge-lora"
    raise ConfigError(
        f"run.dir={config.run.dir} was saved by another version of this package, which drew its noise otherwise (noise "
        f"{state.get('noise', 1)}, here {noise.VERSION}): gone on with, it would not be one run. To start anew from its "
        f"weights: fastvideo-grpo export {config.run.dir} --out NEW --pipeline{merged}, then train with model.path=NEW and "
        "another run.dir"
    )


def image_digests(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Prompt id -> what tells its image from others; prompts without an image are left out."""
    return {prompt.id: image_digest(prompt.image)[:16] for prompt in prompts if prompt.image is not None}


def prompts_state(prompts: Sequence[Prompt], config: Config) -> dict[str, Any]:
    """What :func:`check_resumable` wants to know of the prompts later, as a part of trainer.json."""
    return {
        "prompts": prompts_digest(prompts, config),
        "prompts_alone": prompts_digest(prompts, config, metadata=False),
    }


def prompts_digest(prompts: Sequence[Prompt], config: Config, *, metadata: bool = True) -> str:
    """Changes when a prompt, its id or the order of the file does, a negative prompt where there is guidance, or (``metadata``)
    what the file says of a prompt besides, which rewards are told; in which order it says so does not matter."""
    lines = []
    for prompt in prompts:
        parts = [prompt.id, prompt.text]
        if prompt.negative_prompt is not None and max(guidance_of(config)) > 1:
            parts += ["negative prompt", prompt.negative_prompt]
        if metadata and prompt.metadata:
            parts += ["metadata", json.dumps(prompt.metadata, sort_keys=True)]
        lines.append("\x1f".join(parts))
    return hashlib.sha256("\x1e".join(lines).encode()).hexdigest()
