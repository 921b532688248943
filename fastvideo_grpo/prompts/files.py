"""Prompt files: ``.txt`` (one prompt a line) or ``.jsonl`` (a line is an object with "prompt" and, optionally, "id",
"negative_prompt" and "image")."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvideo_grpo.errors import UserError


class PromptFileError(UserError, ValueError):
    """A prompt file that cannot be read; the message names file and line."""


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


def text_id(text: str) -> str:
    """The id of a prompt that has none in its file: a hash of the text, so that the order of the file does not matter."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_prompts(path: str | Path, *, images: bool = False) -> list[Prompt]:
    """Read a prompt file; empty lines and lines that start with ``#`` are skipped in ``.txt``.

    Args:
        images: every prompt must name an image, by a path relative to the file; the image itself is not looked at
            (:func:`fastvideo_grpo.prompts.images.check_images` does that). A prompt without an id then takes one from text
            and image, so that one text with two images is two prompts. Without ``images`` an "image" is metadata.

    Raises:
        FileNotFoundError: no such file.
        PromptFileError: unknown extension, no prompts, a bad line (file and line are named), or an id given twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such prompt file: {path}")
    if path.suffix not in (".txt", ".jsonl"):
        raise PromptFileError(f"{path}: prompt files end in .txt (one prompt a line) or .jsonl")
    prompts: list[Prompt] = []
    lines_of: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        line = line.strip()
        if not line or (path.suffix == ".txt" and line.startswith("#")):
            continue
        where = f"{path}:{number}"
        if path.suffix == ".txt":
            if images:
                raise PromptFileError(f"{where}: a .txt file names no images, and {_IMAGES_WANTED}")
            prompt = Prompt(text_id(line), line)
        else:
            prompt = _from_json(line, where, path.parent if images else None)
        first = lines_of.setdefault(prompt.id, number)
        if first != number:
            raise PromptFileError(f"{where}: the prompt id {prompt.id!r} stands in line {first} already; ids must differ")
        prompts.append(prompt)
    if not prompts:
        raise PromptFileError(f"{path} holds no prompts")
    return prompts


_IMAGES_WANTED = (
    'the model starts from an image: each line of a .jsonl file needs {"prompt": ..., "image": ...}; '
    "fastvideo-grpo make-references makes images from prompts"
)


def _from_json(line: str, where: str, image_folder: Path | None) -> Prompt:
    """``image_folder``: what paths of images are relative to; None leaves "image" in the metadata."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptFileError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise PromptFileError(f'{where}: each line must be an object with a non-empty "prompt"; got {line[:80]}')
    text = entry.pop("prompt")
    negative = entry.get("negative_prompt", "")
    if not isinstance(negative, str):
        raise PromptFileError(f'{where}: "negative_prompt" is {negative!r}; it must be a text, or left out')
    written, image = None, None
    if image_folder is not None:
        written = entry.pop("image", None)
        if written is None:
            raise PromptFileError(f'{where}: there is no "image", and {_IMAGES_WANTED}')
        if not isinstance(written, str) or not written.strip():
            raise PromptFileError(f'{where}: "image" is {written!r}; it must be a path, relative to {image_folder}')
        image = image_folder / written
    negative_prompt = entry.pop("negative_prompt", None)
    default_id = text_id(text if written is None else f"{text}\x1f{written}")
    prompt_id = str(entry.pop("id", default_id))
    return Prompt(prompt_id, text, entry, image, negative_prompt)
