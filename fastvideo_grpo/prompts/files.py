"""Prompt files: ``.txt``, ``.jsonl``, ``.json`` and ``.csv`` lists of prompts (docs/prompts.md says what may stand in them)."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastvideo_grpo.characters import unusable
from fastvideo_grpo.prompts.entries import Entry, entries_of, shortened
from fastvideo_grpo.prompts.texts import PromptFileError, read_text, visible

__all__ = ["Prompt", "PromptFile", "PromptFileError", "read_prompt_file", "read_prompts", "text_id"]

MOST_CHARACTERS = 100_000
"""Of one prompt; text encoders read some hundred tokens, and a file without line ends is one line of gigabytes."""

_SIMILAR = {"negative", "negativeprompt", "neg_prompt", "negative_prompts", "prompt_id"}  # to keys that are read


@dataclass(frozen=True)
class Prompt:
    """A prompt: its text, an id that keys its noise and embeddings, and whatever else the file says of it.

    ``image``: the picture a video starts from, read on request only (:func:`read_prompts`).
    """

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)
    image: Path | None = None
    negative_prompt: str | None = None

    def negative_text(self, default: str) -> str:
        """What guidance leads away from: the file's, or ``default`` (``sample.negative_prompt``)."""
        return default if self.negative_prompt is None else self.negative_prompt


@dataclass(frozen=True)
class PromptFile:
    """What was read. ``notes``: what was left out and why, and what is seldom meant, a line each for a person."""

    prompts: list[Prompt]
    notes: list[str]


def text_id(text: str) -> str:
    """The id of a prompt that has none in its file: a hash of the text, so that the order of the file does not matter."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_prompts(path: str | Path, *, images: bool = False, duplicates: str = "drop") -> list[Prompt]:
    """The prompts of a file; see :func:`read_prompt_file`."""
    return read_prompt_file(path, images=images, duplicates=duplicates).prompts


def read_prompt_file(path: str | Path, *, images: bool = False, duplicates: str = "drop") -> PromptFile:
    """Read a prompt file.

    Args:
        images: every prompt must name an image, by a path relative to the file; the image itself is not looked at
            (:func:`fastvideo_grpo.prompts.images.check_images` does that). A prompt without an id then takes one from text
            and image, so that one text with two images is two prompts. Without ``images`` an "image" is metadata.
        duplicates: an entry that says what an earlier one says is left out ("drop"), or kept under an id of its own ("keep").

    Raises:
        FileNotFoundError: no such file.
        PromptFileError: unknown extension, a file that is not UTF-8 or not of its form, no prompts, a bad entry, or an id given
            to two prompts; names the file, the line and what would work.
    """
    path = Path(path)
    if not os.path.exists(path):  # pathlib's own raises where a folder above may not be read
        raise FileNotFoundError(f"no such prompt file: {path}")
    text = read_text(path)
    listed = entries_of(path, text)
    notes = list(listed.notes)
    first_of: dict[str, tuple[Entry, Prompt]] = {}
    times: dict[str, int] = {}
    repeated: list[str] = []
    similar: dict[str, str] = {}
    prompts: list[Prompt] = []
    for entry in listed.entries:
        prompt = _prompt(entry, path.parent if images else None)
        for key in prompt.metadata:
            if key.lower() in _SIMILAR:
                similar.setdefault(key, entry.place)
        if prompt.id in first_of:
            first, before = first_of[prompt.id]
            _check_repetition(entry, prompt, first, before)
            repeated.append(f"{entry.place} repeats {first.place}")
            if duplicates == "drop":
                continue
            times[prompt.id] = times.get(prompt.id, 1) + 1
            prompt = replace(prompt, id=f"{prompt.id}#{times[prompt.id]}")
            if prompt.id in first_of:
                raise PromptFileError(f"{entry.where}: the id {prompt.id!r} is needed for a repeated prompt; rename that one")
        first_of[prompt.id] = entry, prompt
        prompts.append(prompt)
    if not prompts:
        raise PromptFileError(f"{path} holds no prompts{'; ' + notes[0] if notes else ''}")
    if repeated:
        what = "left out (prompts.duplicates=keep keeps them)" if duplicates == "drop" else "kept under ids of their own"
        count = f"{len(repeated)} repeated prompts are" if len(repeated) > 1 else "1 repeated prompt is"
        notes.append(f"{path}: {count} {what}: {repeated[0]}{', ...' if len(repeated) > 1 else ''}")
    for key, place in similar.items():
        notes.append(
            f"{path}: {place} has the key {key!r}, which only rewards are told; what is read besides is id, negative_prompt "
            "and image"
        )
    return PromptFile(prompts, notes)


def _check_repetition(entry: Entry, prompt: Prompt, first: Entry, before: Prompt) -> None:
    """Raise where an entry of an earlier one's id is another prompt."""
    named = [e.values.get("id") for e in (first, entry)]
    differing = [
        what
        for what, a, b in (
            ("prompt", before.text, prompt.text),
            ("image", before.image, prompt.image),
            ("negative_prompt", before.negative_prompt, prompt.negative_prompt),
        )
        if a != b
    ]
    # As written: to Python true is 1, and NaN is not NaN.
    said = [{key: json.dumps(value, sort_keys=True) for key, value in p.metadata.items()} for p in (before, prompt)]
    differing += [key for key in sorted({*said[0], *said[1]}) if said[0].get(key) != said[1].get(key)]
    if not differing:
        return
    if named[1] is None:
        raise PromptFileError(
            f"{entry.where}: this prompt stands in {first.place} already, with another {' and '.join(differing)}: give each "
            'an "id" of its own'
        )
    types = f" ({named[0]!r} and {named[1]!r} are one id)" if repr(named[0]) != repr(named[1]) else ""
    raise PromptFileError(f"{entry.where}: the prompt id {prompt.id!r} stands in {first.place} already{types}; ids must differ")


IMAGES_WANTED = (
    'the model starts from an image: each line of a .jsonl file needs {"prompt": ..., "image": ...} (or .json, .csv with '
    "these names); fastvideo-grpo make-references makes images from prompts"
)


def _prompt(entry: Entry, image_folder: Path | None) -> Prompt:
    """``image_folder``: what paths of images are relative to; None leaves "image" in the metadata."""
    where = entry.where
    values = {key: value for key, value in entry.values.items() if value is not None}  # null says nothing
    text = values.pop("prompt")
    if len(text) > MOST_CHARACTERS:
        raise PromptFileError(
            f"{where}: a prompt of {len(text):,} characters; at most {MOST_CHARACTERS:,} are read: does the file have its line "
            "ends?"
        )
    prompt_id, negative = values.pop("id", None), values.pop("negative_prompt", None)
    if prompt_id is not None:
        prompt_id = _id(prompt_id, where)
    if negative is not None and not isinstance(negative, str):
        raise PromptFileError(f'{where}: "negative_prompt" is {shortened(repr(negative))}; it must be a text, or left out')
    written, image = None, None
    if image_folder is not None:
        written = values.pop("image", None)
        if written is None:
            raise PromptFileError(f'{where}: there is no "image", and {IMAGES_WANTED}')
        if not isinstance(written, str) or not visible(written):
            raise PromptFileError(
                f'{where}: "image" is {shortened(repr(written))}; it must be a path, relative to {image_folder}'
            )
        image = image_folder / written
    for what, value in (("prompt", text), ("id", prompt_id), ("negative_prompt", negative), ("image", written)):
        _check_characters(what, value, where)
    if prompt_id is None:
        prompt_id = text_id(text if written is None else f"{text}\x1f{written}")
    return Prompt(prompt_id, text, values, image, negative)


def _id(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not visible(str(value)):
        raise PromptFileError(
            f'{where}: "id" is {shortened(repr(value))}; it must be a text or a whole number, or left out (then it is made of '
            "the prompt)"
        )
    return str(value).strip()


def _check_characters(what: str, value: str | None, where: str) -> None:
    """JSON can write what no file of text can hold."""
    problem = None if value is None else unusable(value)
    if problem is not None:
        raise PromptFileError(f'{where}: "{what}" holds {problem}; take it out')
