"""Every key of a run: ``python docs/configuration.py`` writes docs/configuration.md anew."""

from __future__ import annotations

from pathlib import Path

from fastvideo_grpo.config.reference import HEAD, reference
from fastvideo_grpo.models.registry import FAMILIES

if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(HEAD + reference(FAMILIES), encoding="utf-8")
