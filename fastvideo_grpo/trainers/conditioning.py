"""What the network is told of a prompt: its embeddings and, with guidance, those of its negative prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvideo_grpo.config.keys import Config, guidance_of
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.precision import DTYPES
from fastvideo_grpo.prompts.embeddings import Conditioning, EmbeddingCache, encoder_identity
from fastvideo_grpo.prompts.files import Prompt, text_id
from fastvideo_grpo.sampling import noise

NEGATIVE = "negative/"
"""How the names of a negative prompt's tensors begin in a micro-batch's conditioning."""


def split_guidance(conditioning: Conditioning) -> tuple[Conditioning, Conditioning | None]:
    """What the two passes of classifier-free guidance are given: for the prompt, and for the negative prompt, which differs in
    what a negative prompt has (the text, not a reference image); None without guidance."""
    positive = {name: tensor for name, tensor in conditioning.items() if not name.startswith(NEGATIVE)}
    negative = {n.removeprefix(NEGATIVE): tensor for n, tensor in conditioning.items() if n.startswith(NEGATIVE)}
    return positive, {**positive, **negative} if negative else None


def negative_of(prompt: Prompt, config: Config) -> Prompt:
    """The negative prompt, as a prompt of its own (most prompts share one): the file's, or ``sample.negative_prompt``."""
    text = prompt.negative_text(config.sample.negative_prompt)
    return Prompt(text_id(f"{NEGATIVE}{text}"), text)


def to_encode(prompts: Sequence[Prompt], config: Config) -> list[Prompt]:
    """The prompts whose embeddings a run needs: these, and their negative prompts where anything is guided."""
    if max(guidance_of(config)) <= 1:
        return list(prompts)
    return [*prompts, *dict.fromkeys(negative_of(prompt, config) for prompt in prompts)]


def embedding_cache(
    config: Config, checkpoint: Path, encoders: Sequence[str], encoding: dict[str, Any], world: World
) -> EmbeddingCache:
    """The configured cache, for the text encoders of this checkpoint.

    Args:
        encoders: names of the components that encode a text, tokenizers included.
        encoding: see :class:`~fastvideo_grpo.trainers.policy.Policy`.
    """
    settings: dict[str, Any] = {
        "text_length": config.prompts.text_length,
        "dtype": config.prompts.embedding_dtype,
        "precision": config.model.precision,
        **encoding,
    }
    components = [*encoders]
    if FAMILIES[config.model.kind].reads_images:
        components.append("vae")
        settings |= {
            "size": [config.sample.height, config.sample.width],
            "vae_precision": config.model.vae_precision,
            "noise": noise.VERSION,  # an image's latents are drawn
        }
    identity = encoder_identity(checkpoint, components, settings)
    return EmbeddingCache(config.prompts.embeddings, identity, DTYPES[config.prompts.embedding_dtype], world)
