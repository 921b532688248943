"""Whether a checkpoint may be gone on with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from fastvideo_grpo import config as configuration
from fastvideo_grpo.config import Config, ConfigError
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.prompts.images import image_digest


def check_resumable(state: dict[str, Any], config: Config, prompts: Sequence[Prompt], transformer: str) -> None:
    """Refuse to go on with another run's checkpoint.

    Args:
        state: the checkpoint's trainer.json.
        transformer: identity of the weights training starts from.

    Raises:
        ConfigError: settings that change what is computed, the prompts, or the model to start from differ; names them.
    """
    changed = configuration.changed_on_resume(state["config"], config)
    if changed:
        raise ConfigError(
            f"run.dir={config.run.dir} holds a run with other values of {', '.join(changed)}; resuming would mix two runs. "
            "Set them back, or choose another run.dir"
        )
    if state["prompts"] != prompts_digest(prompts):
        raise ConfigError(
            f"prompts.path={config.prompts.path} holds other prompts than when {config.run.dir} was started; restore the "
            "file, or choose another run.dir"
        )
    if state["transformer"] != transformer:
        raise ConfigError(
            f"model.path={config.model.path} holds another transformer than the one {config.run.dir} was started from; set "
            "it back, or choose another run.dir"
        )


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Changes when a prompt, its id, negative prompt or image, or the order of the file does."""
    lines = []
    for prompt in prompts:
        parts = [prompt.id, prompt.text]
        if prompt.image is not None:
            parts += ["image", image_digest(prompt.image)]
        if prompt.negative_prompt is not None:
            parts += ["negative prompt", prompt.negative_prompt]
        lines.append("\x1f".join(parts))
    return hashlib.sha256("\x1e".join(lines).encode()).hexdigest()
