"""Tokenizers whose tokens are those of the checkpoint's files.

transformers 5 rebuilds some tokenizers from the pieces of their tokenizer.json, by what their class is known to be: for a T5
tokenizer's ``<unk>`` it takes 2, which in UMT5's file is 3, and of what is declared a Llama tokenizer it makes one of Llama 2's
kind. What the file says is what the text encoder was trained with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastvideo_grpo.errors import UserError

PROBES = (
    "a red fox, 3.5 km away; it's 100% REAL (or not?)",
    "Crème brûlée, nai\u0308ve, Straße, Ωμέγα, Привет, שלום, مرحبا, สวัสดี",
    "漢字とかな、한국어。𠀀 \U0001d4b3 𐍈",
    "🦊👩‍👩‍👧❤️🇫🇷 ☃ ★ ½ № ™",
    "ﬁne ① \uff21\uff11 ﷺ \u210c x²",
    "a\u00a0b\u200bc\u00add\u2060e\ufefff \u3000 g",
    "  two  spaces,\ta tab\nand a line ",
    "\ue000 \U000f0000 \ufffd \u0378",
    "&amp; <b>html</b> {} %s \\n",
)
"""Texts with what tokenizers differ in: unknown characters, composed ones, those that are written in two ways, spaces."""


class TokenizerError(UserError, ValueError):
    """A tokenizer that cannot be read, or is not what its files say; the message names the folder and the way out."""


def load_tokenizer(folder: Path, *, from_json: bool = False) -> Any:
    """The tokenizer of a component's folder, as transformers' own class of fast tokenizers.

    Where there is a tokenizer.json its tokens are those of that file; else transformers makes one of the slower files (CLIP's
    vocab.json and merges.txt).

    Args:
        from_json: no other file will do.

    Raises:
        TokenizerError: there is none, it cannot be read, or its files disagree.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not folder.is_dir():
        raise TokenizerError(f"there is no tokenizer in {folder}: download the whole repository")
    if from_json and not file.is_file():
        raise TokenizerError(f"{folder} has no tokenizer.json; that of the model's own repository is needed")
    cls = PreTrainedTokenizerFast if file.is_file() else AutoTokenizer
    try:
        tokenizer = cls.from_pretrained(folder, local_files_only=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        problem = _other_than_its_file(tokenizer, file) if file.is_file() else _unknown_as_another(tokenizer)
    except Exception as error:  # the libraries raise nearly everything at damaged files
        lines = str(error).splitlines() or [type(error).__name__]
        raise TokenizerError(f"the tokenizer in {folder} cannot be read: {lines[0]}; download it again") from error
    if problem is not None:
        raise TokenizerError(f"{folder}: {problem}")
    return tokenizer


def check_vocabulary(tokenizer: Any, folder: Path, encoder: Path) -> None:
    """Raise :class:`TokenizerError` where a tokenizer has tokens that its text encoder does not know."""
    config = encoder / "config.json"
    if not config.is_file():
        return
    known = json.loads(config.read_text(encoding="utf-8")).get("vocab_size")
    largest = max(tokenizer.get_vocab().values())
    if isinstance(known, int) and largest >= known:
        raise TokenizerError(
            f"{folder} has tokens up to {largest}, and {encoder} knows {known}: one of them is another model's; download both"
        )


def _other_than_its_file(tokenizer: Any, file: Path) -> str | None:
    from tokenizers import Tokenizer

    as_written = Tokenizer.from_file(str(file))
    as_written.no_truncation()
    as_written.no_padding()
    for text in (*PROBES, *tokenizer.all_special_tokens):
        ours, theirs = tokenizer(text, verbose=False)["input_ids"], as_written.encode(text).ids
        if ours != theirs:
            return (
                f"{file.name} makes the tokens {_few(theirs)} of {text!r}, and with the files beside it transformers makes "
                f"{_few(ours)}: they are not of one tokenizer; download the folder again"
            )
    return None


def _unknown_as_another(tokenizer: Any) -> str | None:
    """transformers does not read from a spiece.model which of its pieces is the unknown one."""
    if tokenizer.unk_token is None:
        return None
    tokens = set(tokenizer("\U000f0000", add_special_tokens=False)["input_ids"])
    wrong = tokens & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if not wrong:
        return None
    return (
        f"there is no tokenizer.json, and of what transformers makes of the other files an unknown character is "
        f"{tokenizer.convert_ids_to_tokens(min(wrong))!r}, not {tokenizer.unk_token!r}: download tokenizer.json, too"
    )


def _few(tokens: list[int]) -> str:
    return f"{', '.join(map(str, tokens[:12]))}{', ...' if len(tokens) > 12 else ''}"
