"""Numbers of bytes in what is printed."""

from __future__ import annotations


def gib(size: float) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
