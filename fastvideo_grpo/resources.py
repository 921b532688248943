"""Where the files that are not Python lie: beside the package in a checkout, inside it once installed."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    for parent in (_PACKAGE, _PACKAGE.parent):
        if (parent / name).is_dir():
            return parent / name
    raise FileNotFoundError(
        f"{name}/ is neither in {_PACKAGE} nor beside it: this copy of fastvideo_grpo is incomplete. "
        "Install it again, from a checkout or from a wheel."
    )


def patches_dir() -> Path:
    """The folder of the patches to FastVideo and their manifest.

    Raises:
        FileNotFoundError: this copy of the package has none.
    """
    return _folder("patches")


def data_dir() -> Path:
    """The folder of the demo checkpoint and the small prompt lists.

    Raises:
        FileNotFoundError: this copy of the package has none.
    """
    return _folder("data")
