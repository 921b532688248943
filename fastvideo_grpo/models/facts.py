"""What a checkpoint's configuration files say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.model_files.json_files import read_json


@dataclass(frozen=True)
class ModelFacts:
    """What the checkpoint's configuration files say.

    Attributes:
        source: where they were read, for a person.
        components: component -> its ``config.json`` (of the scheduler: ``scheduler_config.json``).
        trained: the component whose configuration ``denoiser`` is.
    """

    source: str
    components: dict[str, dict[str, Any]]
    trained: str

    @property
    def denoiser(self) -> dict[str, Any]:
        """The configuration of the network that is trained."""
        return self.components[self.trained]

    @property
    def hidden_width(self) -> int:
        """Width of a transformer's hidden states."""
        return int(self.denoiser["num_attention_heads"]) * int(self.denoiser["attention_head_dim"])

    @property
    def vae(self) -> dict[str, Any]:
        return self.components["vae"]

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent, along one side."""
        ratio = self.vae.get("spatial_compression_ratio")
        levels = self.vae["block_out_channels"] if "block_out_channels" in self.vae else self.vae["dim_mult"]
        return int(ratio if ratio is not None else 2 ** (len(levels) - 1))

    @property
    def temporal_compression(self) -> int:
        """Frames per latent frame behind the first, of a video VAE."""
        ratio = self.vae.get("temporal_compression_ratio")
        return int(ratio if ratio is not None else 2 ** sum(self.vae["temperal_downsample"]))

    @property
    def vae_width(self) -> int:
        """Channels of the VAE's widest level, that of whole pixels."""
        return int(self.vae["block_out_channels"][0] if "block_out_channels" in self.vae else self.vae["base_dim"])


class ConfigFile(dict[str, Any]):
    """A component's configuration; a key that is asked for and not there is named with its file."""

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise ConfigError(f"{self.file} has no {key!r}, which is needed; download it again")

    def check_types(self, published_config: Mapping[str, Any]) -> None:
        """Raise :class:`ConfigError` where a value cannot be what the published configuration has there."""
        for key, usual in published_config.items():
            if key in self and usual is not None and not _alike(self[key], usual):
                raise ConfigError(
                    f"{self.file}: {key} is {self[key]!r}, but it must be of the kind of {usual!r}, as in the published model; "
                    "download it again"
                )


def _alike(found: Any, usual: Any) -> bool:
    """Whether a value is of the same kind: a number (or one a level), a truth value, a text, or a list of them."""
    if isinstance(usual, dict):
        return isinstance(found, dict)
    if isinstance(usual, list):
        return isinstance(found, list) and bool(found) and all(_alike(part, usual[0]) for part in found)
    if isinstance(usual, bool) or isinstance(found, bool):
        return isinstance(usual, bool) and isinstance(found, bool)
    if isinstance(usual, str):
        return isinstance(found, str)
    values = found if isinstance(found, list) and found else [found]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def read_config(file: Path, advice: str = "") -> dict[str, Any]:
    """A component's configuration.

    Args:
        advice: the end of an error.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}{advice or '; download it again'}") from error
