"""How text encoders that several models have read a prompt."""

from __future__ import annotations

from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.prompts.cut import TextReader

MOST_T5_TOKENS = 512
"""That models with a T5 or UMT5 were trained with."""
CLIP_TOKENS = 77
"""That CLIP's text encoders read, the two special ones included."""


def pooled_clip(component: str, tokenizer: str) -> TextReader:
    """CLIP as a second encoder, of which the pooled embedding is read."""
    return TextReader("CLIP", component, tokenizer, CLIP_TOKENS)


def text_length_key(config: Config, most: int) -> str | None:
    """The key that makes an encoder read more, where it can."""
    return "prompts.text_length" if config.prompts.text_length < most else None
