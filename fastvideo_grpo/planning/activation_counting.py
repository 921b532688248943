"""What a model's network and its decoder hold while they run, counted without weights, data or a GPU, and the factors of the
estimate of memory that follow (``fastvideo-grpo measure-family``).

The network is the class that is loaded, at its published widths with one or two blocks of each kind
(:mod:`fastvideo_grpo.planning.weightless`). What it keeps grows with image tokens, text tokens and blocks in straight lines:
differences of two passes give their slopes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvideo_grpo.config.keys import Config, SampleConfig
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.family import Activations, Family
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.planning.memory import held_by_forward, kept_by_forward
from fastvideo_grpo.planning.unet_memory import LiveBytes
from fastvideo_grpo.planning.weightless import LAYERS, weightless_pass, with_sizes
from fastvideo_grpo.precision import DTYPES

RANK = 16
"""Of the adapters that are counted."""
CLIP_FRAMES = 17
"""Of the clip whose decoding is counted: those of one tile of FastVideo's video VAEs."""

_MLP_WIDTH = "ffn_dim"
_CHECKED_LAYERS = 8
_DECODED_SIDE = 256  # pixels, of one tile


@dataclass(frozen=True)
class Checked:
    """A figure of a network at sizes that no factor was measured at.

    Attributes:
        what: which figure, for a person.
        counted: bytes.
        estimated: by the measured factors.
        of_family: by those that the family has; None: it has none.
        tolerance: how far off the measured ones may be, as a share. A forward's peak is where it is for either kind of block,
            and there is one factor for image and text tokens.
    """

    what: str
    counted: int
    estimated: float
    of_family: float | None
    tolerance: float

    @property
    def off(self) -> float:
        """How far the measured factors are off, as a share of what was counted."""
        return self.estimated / self.counted - 1

    @property
    def fits(self) -> bool:
        return abs(self.off) <= self.tolerance


class FamilyCounter:
    """Counts passes of a family's network.

    Args:
        kind: ``model.kind``.
        trainer_class: gives the model's trainer (:func:`fastvideo_grpo.trainers.load.trainer_class`), which calls the network.
        say: told what is being counted, for a person.

    Raises:
        ValueError: no such family.
    """

    def __init__(self, kind: str, trainer_class: Callable[[str], type[Any]], say: Callable[[str], None]) -> None:
        self.family: Family = FAMILIES[kind]
        self.trainer_class, self.say = trainer_class, say
        self.published = ModelFacts(self.family.name, self.family.configs, self.family.denoiser)
        self._kept: dict[tuple[object, ...], int] = {}

    def activations(self, precision: str, *, lora: bool) -> Activations:
        """The factors of the family's blocks in this dtype, all weights trained or adapters on its ``lora_targets``."""
        self.say(f"{precision}, {_trained(lora)}: networks of one and two blocks of a kind")
        denoiser, width = self.published.denoiser, self.published.hidden_width
        config = self.settings(precision, lora=lora)
        ones = {name: 1 for name in LAYERS if denoiser.get(name)}

        def of_block(layers: str, slope: _Slope, config: Config = config, **changed: int) -> float:
            if layers not in ones:
                return 0.0
            return slope(config, {**ones, layers: 2, **changed}) - slope(config, {**ones, **changed})

        image = [of_block(layers, self._image) for layers in LAYERS]
        text = [of_block(layers, self._text) for layers in LAYERS]
        recomputed = self.settings(precision, lora=lora, recomputed="full")
        inputs = [of_block(layers, slope, recomputed) for layers in LAYERS for slope in (self._image, self._text)]
        rest = self._image(recomputed, ones) - sum(inputs[::2]), self._text(recomputed, ones) - sum(inputs[1::2])
        mlp, mlp_width = 0.0, int(denoiser.get(_MLP_WIDTH) or 0)
        if mlp_width:
            wider = of_block(LAYERS[0], self._image, **{_MLP_WIDTH: 2 * mlp_width})
            mlp = (wider - image[0]) * width / mlp_width
        adapters = [0.0, 0.0]
        if lora:
            more = self.settings(precision, lora=True, rank=2 * RANK)
            changes = [of_block(layers, self._image, more) for layers in LAYERS[:2]]
            adapters = [(change - one) * width / RANK for change, one in zip(changes, image, strict=False)]
        double, single = (one - count * RANK / width for one, count in zip(image, adapters, strict=False))
        return Activations(
            double=_rounded(double - mlp * mlp_width / width),
            single=_rounded(single),
            rest=(_rounded(rest[0]), _rounded(rest[1])),
            forward=_rounded(self._forward(config, ones)),
            mlp=_rounded(mlp),
            text=_rounded(text[0]) if abs(text[0] - image[0]) > 0.1 * image[0] else None,  # it is read in another way
            refiner=_rounded(text[2]),
            adapters=(_rounded(adapters[0]), _rounded(adapters[1])),
        )

    def check(self, precision: str, activations: Activations, *, lora: bool) -> list[Checked]:
        """A network of more blocks, at other sizes than those that :meth:`activations` counts at."""
        self.say(f"{precision}, {_trained(lora)}: networks of {_CHECKED_LAYERS} blocks of a kind, at other sizes")
        measured = self.family.lora_activations if lora else self.family.activations
        own = None if measured is None else measured[precision]
        blocks = {name: int(self.published.denoiser.get(name) or 0) for name in LAYERS}
        changed = {name: min(_CHECKED_LAYERS, count) for name, count in blocks.items() if count}
        facts, plain = self._facts(changed), self.settings(precision, lora=lora, check=True)
        recomputed = self.settings(precision, lora=lora, check=True, recomputed="full")
        rows = (
            ("kept, nothing recomputed", plain, self.kept_bytes, kept_by_forward, 0.03),
            ("kept, every block recomputed", recomputed, self.kept_bytes, kept_by_forward, 0.03),
            ("held by a forward", plain, self.forward_bytes, held_by_forward, 0.1),
        )
        return [
            Checked(
                f"{precision}, {_trained(lora)}, {what}",
                count(config, changed),
                estimate(activations, config, facts),
                None if own is None else estimate(own, config, facts),
                tolerance,
            )
            for what, config, count, estimate, tolerance in rows
        ]

    def decoding(self, precision: str, frames: int) -> tuple[float, float]:
        """What diffusers' decoder holds at once per pixel of the frames that are decoded together, and what it keeps for its
        backward pass per pixel, in multiples of (``facts.vae_width`` x bytes of the dtype).

        Raises:
            UserError: diffusers has no such VAE.
        """
        import diffusers

        vae_config = dict(self.published.vae)
        name = vae_config.pop("_class_name")
        cls = getattr(diffusers, name, None)
        if cls is None:
            raise UserError(f"diffusers has no {name}: what the VAE of {self.family.kind} holds has to be counted by hand")
        self.say(f"{precision}: decoding {frames} frame{'s' if frames > 1 else ''}")
        multiple = self.family.size_multiple(self.published)
        side = -(-_DECODED_SIDE // multiple) * multiple
        dtype = DTYPES[precision]
        sample = SampleConfig(height=side, width=side, frames=frames)
        with FakeTensorMode(), torch.device("cpu"), _default_dtype(dtype):
            vae = cls.from_config(vae_config).requires_grad_(False)
            latents = torch.randn(1, *self.family.latent_shape(self.published, sample))
            with torch.no_grad(), LiveBytes([*vae.parameters(), *vae.buffers()]) as live:
                vae.decode(latents)
            latents.requires_grad_(True)
            with LiveBytes([*vae.parameters(), *vae.buffers(), latents]) as kept:
                pixels = vae.decode(latents).sample
                kept_bytes = kept.now - pixels.untyped_storage().nbytes()
        unit = self.published.vae_width * dtype.itemsize
        together = side * side * min(frames, self.family.decodes_frames or frames)
        return _rounded(live.peak / unit / together), _rounded(kept_bytes / unit / (side * side * frames))

    @property
    def counts_blocks(self) -> bool:
        """Whether the estimate is made of factors of its blocks, or can be."""
        return self.family.activations is not None or self.family.fastvideo_config is not None

    @property
    def makes_clips(self) -> bool:
        """Whether its latents have frames."""
        return len(self.family.latent_shape(self.published, SampleConfig())) == 4

    # --- one pass

    def settings(
        self, precision: str, *, lora: bool, rank: int = RANK, recomputed: str = "none", check: bool = False
    ) -> Config:
        """A run's configuration; its sizes are those that factors are checked at, or the smallest that they are measured at."""
        multiple = self.family.size_multiple(self.published)
        side = -(-(320 if check else 256) // multiple) * multiple
        clip = check and self.makes_clips
        return run_config.build(
            {
                "model": {
                    "kind": self.family.kind,
                    "path": "published",
                    "precision": precision,
                    "lora": {"rank": rank, "alpha": float(rank)} if lora else None,
                },
                "prompts": {"path": "none", "text_length": 200 if check else 128},
                "sample": {
                    "height": side,
                    "width": 2 * side if check else side,
                    "frames": 2 * self.published.temporal_compression + 1 if clip else 1,
                    "cfg_scale": 1.0,
                },
                "engine": {"activation_checkpointing": recomputed},
                "rewards": {"models": {"size": {"kind": "jpeg_size"}}},
                "run": {"dir": "none"},
            }
        )

    def _image(self, config: Config, changed: dict[str, int]) -> float:
        """What a network keeps more for each further image token, in hidden vectors of its dtype."""
        return self._per_image_token(self.kept_bytes, config, changed)

    def _forward(self, config: Config, changed: dict[str, int]) -> float:
        """Likewise, what it holds at once without gradients."""
        return self._per_image_token(self.forward_bytes, config, changed)

    def _per_image_token(self, count: _Count, config: Config, changed: dict[str, int]) -> float:
        wide = replace(config, sample=replace(config.sample, width=2 * config.sample.width))
        tokens = [self.family.image_tokens(self.published, each.sample) for each in (config, wide)]
        return (count(wide, changed) - count(config, changed)) / (tokens[1] - tokens[0]) / self._unit(config)

    def _text(self, config: Config, changed: dict[str, int]) -> float:
        """What a network keeps more for each further text token, in hidden vectors of its dtype."""
        length = config.prompts.text_length
        long = replace(config, prompts=replace(config.prompts, text_length=2 * length))
        return (self.kept_bytes(long, changed) - self.kept_bytes(config, changed)) / length / self._unit(config)

    def _unit(self, config: Config) -> int:
        return self.published.hidden_width * DTYPES[config.model.precision].itemsize

    def _facts(self, changed: dict[str, int]) -> ModelFacts:
        return with_sizes(self.published, self.family, changed)

    def kept_bytes(self, config: Config, changed: dict[str, int]) -> int:
        """What a pass of the published network, some sizes of its configuration ``changed``, keeps for its backward pass over a
        sample of ``config``'s size; weights and inputs are not counted."""
        key = (str(config), *changed.items())
        if key not in self._kept:
            with self._pass(config, changed) as (there, once), LiveBytes(there) as live:
                output = once()
                self._kept[key] = live.now - output.untyped_storage().nbytes()
        return self._kept[key]

    def forward_bytes(self, config: Config, changed: dict[str, int]) -> int:
        """Likewise, what it holds at once without gradients."""
        with self._pass(config, changed) as (there, once), torch.no_grad(), LiveBytes(there) as live:
            once()
            return live.peak

    def _pass(
        self, config: Config, changed: dict[str, int]
    ) -> AbstractContextManager[tuple[list[Tensor], Callable[[], Tensor]]]:
        trainer = self.trainer_class(self.family.kind)  # first: it checks FastVideo's patches
        return weightless_pass(trainer, config, self._facts(changed))


_Count = Callable[[Config, dict[str, int]], int]
_Slope = Callable[[Config, dict[str, int]], float]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _trained(lora: bool) -> str:
    return "LoRA" if lora else "all weights"


def _rounded(value: float) -> float:
    """To one digit behind the point, whole where there is none."""
    rounded = round(value, 1)
    return int(rounded) if rounded == int(rounded) else rounded
