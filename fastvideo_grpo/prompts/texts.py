"""Prompt files as texts, as people have them: byte order marks, other encodings, line ends, characters that nobody sees."""

from __future__ import annotations

import codecs
import os
import unicodedata
from pathlib import Path

from fastvideo_grpo.errors import UserError

_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

# Shown as nothing, though they count as letters, marks or signs: fillers, variation selectors, the blank of Braille.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0") | {
    chr(code) for first, last in ((0xFE00, 0xFE0F), (0xE0100, 0xE01EF)) for code in range(first, last + 1)
}
_LEFT_BY_EDITORS = "\ufeff\u200b\u2060\u00ad"


class PromptFileError(UserError, ValueError):
    """A prompt file that cannot be read; the message names file, line and the way out."""


def read_text(path: Path) -> str:
    """The file's text: UTF-8 with or without its byte order mark, UTF-16 or UTF-32 with theirs.

    Line ends are as they are written; see :func:`lines_of`.

    Raises:
        PromptFileError: no file, or one that cannot be read; another encoding; a NUL.
    """
    if not os.path.isfile(path):
        raise PromptFileError(f"{path} is no file")  # a pipe would be waited for
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PromptFileError(f"{path} cannot be read: {error.strerror}") from error
    mark, encoding = next(((m, e) for m, e in _MARKS if content.startswith(m)), (b"", "utf-8"))
    body = content[len(mark) :]
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        raise PromptFileError(_no_unicode(path, body, encoding, error)) from error
    if "\0" in text:
        before = text[: text.index("\0")]
        line = before.count("\n") + 1
        if text.count("\0") > len(text) / 4:
            order = "be" if text.startswith("\0") else "le"
            raise PromptFileError(
                f"{path}:{line}: every other byte is NUL, as in UTF-16 without a byte order mark: "
                f"{_converted(path, f'utf-16{order}')}"
            )
        raise PromptFileError(
            f"{path}:{line}: there is a NUL character, byte {len(before.encode())} of the file: it is damaged or no text; "
            f"tr -d '\\000' < {path} takes them out"
        )
    return text


def _no_unicode(path: Path, body: bytes, encoding: str, error: UnicodeDecodeError) -> str:
    before = body[: error.start]
    if encoding != "utf-8":
        line = before.decode(encoding, "ignore").count("\n") + 1
        return f"{path}:{line}: its byte order mark says {encoding}, but byte {error.start} is not of it: save it as UTF-8"
    line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
    found = body[error.start]
    if found in (0xFF, 0xFE, 0x89, 0x1F) and error.start < 2:
        return f"{path}:{line}: it begins with the byte 0x{body[0]:02x}, so it is no text (an archive, an image?)"
    return (
        f"{path}:{line}: byte 0x{found:02x}, the {column}. of the line, is not UTF-8 ({error.reason}); in Latin-1 or "
        f"Windows-1252, which it may be, it is {bytes([found]).decode('cp1252', 'replace')!r}: {_converted(path, 'cp1252')}"
    )


def _converted(path: Path, encoding: str) -> str:
    return f"iconv -f {encoding} -t utf-8 {path} > {path.with_stem(path.stem + '-utf8')} converts it"


def lines_of(text: str) -> list[str]:
    """The lines, whichever of ``\\r\\n``, ``\\n`` and ``\\r`` ends them; what else could be a line end is a character."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def visible(text: str) -> bool:
    """Whether a person sees anything of it: more than spaces, control and format characters, and what is shown as nothing."""
    return any(character not in _BLANK and unicodedata.category(character)[0] not in "ZC" for character in text)


def stripped(text: str) -> str:
    """Without the spaces at both ends, and what editors leave there: byte order marks, zero-width spaces, word joiners and soft
    hyphens. (Joiners and variation selectors may be the end of an emoji.)"""
    while (shorter := text.strip().strip(_LEFT_BY_EDITORS)) != text:
        text = shorter
    return text
