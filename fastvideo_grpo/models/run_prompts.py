"""A run's prompts, with their images where its model starts from one."""

from __future__ import annotations

from pathlib import Path

from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.prompts.files import Prompt, PromptFile, read_prompt_file


def prompts_of(config: Config, path: str | Path) -> list[Prompt]:
    """The prompts of a file; raises what ``read_prompt_file`` does."""
    return prompt_file_of(config, path).prompts


def prompt_file_of(config: Config, path: str | Path) -> PromptFile:
    """Likewise, with what is to be said of the file."""
    reads_images = FAMILIES[config.model.kind].reads_images
    return read_prompt_file(path, images=reads_images, duplicates=config.prompts.duplicates)


def configured_prompts(config: Config) -> list[Prompt]:
    """The training prompts, and those kept out."""
    paths = (config.prompts.path, config.prompts.eval_path)
    return [prompt for path in paths if path is not None for prompt in prompts_of(config, path)]
