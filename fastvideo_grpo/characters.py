"""Characters that a text may come with, and that neither tokenizers nor files take."""

from __future__ import annotations


def unusable(text: str) -> str | None:
    """The first such character, for a message; None: there is none."""
    if "\0" in text:
        return "a NUL character (\\u0000)"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how Python passes such a byte of the command line on
            return f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8"
        return f"half a character (\\u{code:04x}, a lone surrogate)"
    return None
