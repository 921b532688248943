"""Types of commands' arguments, for argparse: what is wrong is told with the argument's name."""

from __future__ import annotations

import argparse

from fastvideo_grpo.characters import unusable
from fastvideo_grpo.config.paths import expanded
from fastvideo_grpo.config.values import LARGEST_SEED


def path_argument(text: str) -> str:
    """A path, as :func:`~fastvideo_grpo.config.paths.expanded` has it."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def text_argument(text: str) -> str:
    """A text, such as a prompt, as it is."""
    problem = unusable(text)
    if problem is not None:
        raise argparse.ArgumentTypeError(f"{text!r} holds {problem}")
    return text


def seed_argument(text: str) -> int:
    """A seed, from 0 on."""
    if not (text.isascii() and text.isdigit() and len(text) < 30 and int(text) <= LARGEST_SEED):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {LARGEST_SEED}")
    return int(text)
