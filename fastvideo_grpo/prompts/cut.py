"""Prompts that are longer than a text encoder reads: it is shown their beginning only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo_grpo.prompts.entries import shortened
from fastvideo_grpo.prompts.tokenizers import check_vocabulary, load_tokenizer

_BATCH = 4096


@dataclass(frozen=True)
class TextReader:
    """How a text encoder reads a prompt.

    Attributes:
        name: of the encoder, for a person.
        encoder, tokenizer: the components.
        longest: tokens that are read, special ones included.
        key: what sets ``longest``; None: the encoder does.
        before, after: what the trainer puts around the prompt; ``before`` is read besides. (Of a longer template the end will
            do, from its last special token on: a text falls apart there.)
        prepare: what the trainer makes of a text before.
        from_json: its tokenizer is read from tokenizer.json alone.
    """

    name: str
    encoder: str
    tokenizer: str
    longest: int
    key: str | None = None
    before: str = ""
    after: str = ""
    prepare: Callable[[str], str] | None = None
    from_json: bool = False

    def load_tokenizer(self, checkpoint: Path) -> Any:
        """Its tokenizer; raises :class:`~fastvideo_grpo.prompts.tokenizers.TokenizerError`."""
        folder = checkpoint / self.tokenizer
        tokenizer = load_tokenizer(folder, from_json=self.from_json)
        check_vocabulary(tokenizer, folder, checkpoint / self.encoder)
        return tokenizer


def cut_texts(
    texts: Sequence[str],
    reader: TextReader,
    tokenizer: Any,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[int, int]]:
    """Which of the texts the encoder does not read to their end: (index, tokens of the whole, as ``longest`` counts them).

    Args:
        tokenizer: from :meth:`TextReader.load_tokenizer`.
        progress: is told (done, total) of the texts that have to be cut into tokens to know.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    template = len(backend.encode(reader.before).ids) if reader.before else 0
    around = 1 + tokenizer.num_special_tokens_to_add() + len(reader.after)
    # No tokenizer makes more tokens of ASCII than it has characters, and one for the space before the first. Of other texts one
    # that is in bytes does, and what is normalised may grow.
    long = [n for n, text in enumerate(texts) if len(text) + around > reader.longest or not text.isascii() or "&" in text]
    found = []
    for start in range(0, len(long), _BATCH):
        batch = long[start : start + _BATCH]
        prepared = [texts[n] if reader.prepare is None else reader.prepare(texts[n]) for n in batch]
        whole = backend.encode_batch_fast([f"{reader.before}{text}{reader.after}" for text in prepared])
        lengths = [len(encoding.ids) - template for encoding in whole]
        found += [(n, length) for n, length in zip(batch, lengths, strict=True) if length > reader.longest]
        progress(start + len(batch), len(long))
    return found


def describe_cut(texts: Sequence[str], cut: Sequence[tuple[int, int]], reader: TextReader, what: str = "prompts") -> str:
    """A line for a person; ``cut``, not empty, is from :func:`cut_texts`."""
    number, tokens = cut[0]
    first = shortened(texts[number], 60)
    way_out = f"raise {reader.key}, or shorten them" if reader.key is not None else "it reads no more: shorten them"
    return (
        f"{len(cut)} of {len(texts)} {what} are longer than the {reader.longest} tokens that {reader.name} ({reader.encoder}) "
        f"reads, and cut there (rewards are told all of the text): {way_out}. The first has {tokens}: {first!r}"
    )
