"""What the rest of the project has to know of a model family before anything of it is loaded: the checkpoint's parts, its
sizes, and what they allow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from fastvideo_grpo.config.keys import Config, SampleConfig
from fastvideo_grpo.model_files.downloads import Source
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.networks import diffusers_denoiser, fastvideo_transformer
from fastvideo_grpo.prompts.cut import TextReader
from fastvideo_grpo.sampling import schedules, transitions
from fastvideo_grpo.sampling.schedules import Schedule
from fastvideo_grpo.tiny.offer import TinyOffer


@dataclass(frozen=True)
class Activations:
    """What FastVideo's blocks hold per token, in multiples of (hidden width x bytes of the dtype); counted, not guessed: by
    ``fastvideo-grpo measure-family``. tests/promises/test_memory.py counts again, ``benchmarks/memory.py`` compares with what a
    process takes.

    Attributes:
        double, single: kept by a double (text and image apart) and a single block for the backward pass.
        rest: kept outside the blocks, per image token and per text token.
        forward: held at once in a forward without gradients.
        mlp: kept by a block besides, per image token, in multiples of the MLP's width (of models in which it is no fixed
            multiple of the hidden width).
        text: kept by a block per text token, where blocks read the text by cross-attention; None: as much as of an image token.
        refiner: kept by a block that refines the text before the others, per text token.
        adapters: kept by the adapters of a double and of a single block, per token (per image token where ``text`` is given),
            in multiples of their rank.
    """

    double: float
    single: float
    rest: tuple[float, float]
    forward: float
    mlp: float = 0
    text: float | None = None
    refiner: float = 0
    adapters: tuple[float, float] = (0, 0)


class PassBytes(NamedTuple):
    """Bytes of one pass over a micro-batch, weights not counted.

    ``forward``: held at once without gradients; ``kept``: for the backward pass; ``working``: at once in the backward pass
    besides; ``largest_block``: parameters of the largest block.
    """

    forward: int
    kept: int
    working: int
    largest_block: int


@dataclass(frozen=True)
class Family(ABC):
    """A model family.

    Attributes:
        kind: ``model.kind``, and the name of its folder.
        name: the published model.
        pipeline: ``_class_name`` in model_index.json.
        trainer: its :class:`~fastvideo_grpo.trainers.base.GRPOTrainer`, as "module:class"; imported when it is loaded.
        tiny: how ``fastvideo-grpo tiny`` writes a tiny checkpoint of it; None: it does not.
        folders: components a checkpoint must have.
        configs: the published configuration files of those components whose sizes matter here.
        sequence_encoder: the text encoder whose sequence the network reads, and in its config the key of its width.
        lora_targets: the attention projections, as the loaded network names them.
        activations: dtype -> what the blocks hold where all weights are trained; None: see :meth:`pass_bytes`.
        lora_activations: likewise, where adapters on ``lora_targets`` are trained: a frozen layer keeps no input for the
            gradient of its weight. None: as much as where all weights are trained.
        decode: held at once while an image is decoded, per pixel, in multiples of (``facts.vae_width`` x bytes of the dtype).
        decode_kept: likewise, what a decoding with gradients keeps for its backward pass (counted in diffusers' decoders of the
            published sizes).
        clip_decode, clip_decode_kept: likewise of a clip, per pixel of all frames (of a tile; what is kept: of the whole);
            None: as of an image.
        parameters: of the published VAE and text encoders.
        denoiser: the component that is trained.
        prediction: what its output means to a transition, "velocity" or "noise".
        source: where the published checkpoint is to be had; None: errors do not say.
        fastvideo_config: FastVideo's pipeline configuration, as "module:class"; None: its trainer is no FastVideo pipeline.
        diffusers_names: FastVideo's network calls its weights as diffusers does, so that FastVideo, half a minute, is imported
            for them only when the model is loaded.
        kohya_layer: of a layer under diffusers' name the layer of kohya's adapters that holds it, and all that this one stacks,
            in order; raises ValueError for one that is in none. None: that format does not know the model.
        defaults: by section of the configuration, what it has instead of keys' own defaults where a run leaves them out.
        blocks: names of the classes of the loaded network's blocks, which ``engine.activation_checkpointing`` recomputes and
            ``model.compile`` compiles; none where neither can be asked for.
        not_recomputed: names of the classes of other modules that stand in the network's lists of modules.
        reference_images: by section of the configuration, how it draws the images that videos of other models start from
            (``fastvideo-grpo make-references``); None: it does not.
        texts_differ_in_length: its network reads a text's own tokens, without padding.
        reads_images: each prompt comes with an image that the clip starts from.
        decodes_singly: its VAE decodes one sample at a time.
        decodes_frames: frames that its VAE decodes at once; None: a whole clip, or a tile of it.
    """

    kind: str
    name: str
    pipeline: str
    trainer: str
    folders: tuple[str, ...]
    configs: dict[str, dict[str, Any]]
    sequence_encoder: tuple[str, str]
    lora_targets: tuple[str, ...]
    activations: dict[str, Activations] | None
    decode: float
    decode_kept: float
    parameters: dict[str, float]
    clip_decode: float | None = None
    clip_decode_kept: float | None = None
    lora_activations: dict[str, Activations] | None = None
    denoiser: str = "transformer"
    prediction: Literal["velocity", "noise"] = "velocity"
    tiny: TinyOffer | None = None
    source: Source | None = None
    fastvideo_config: str | None = None
    diffusers_names: bool = False
    kohya_layer: Callable[[str], tuple[str, list[str]]] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    not_recomputed: tuple[str, ...] = ()
    reference_images: Mapping[str, Any] | None = None
    reads_images: bool = False
    texts_differ_in_length: bool = False
    decodes_singly: bool = False
    decodes_frames: int | None = None

    @abstractmethod
    def size_multiple(self, facts: ModelFacts) -> int:
        """What height and width must be a multiple of, in pixels."""

    @abstractmethod
    def latent_shape(self, facts: ModelFacts, sample: SampleConfig) -> tuple[int, ...]:
        """Shape of one sample's latents, ``(channels, ..., height, width)``."""

    @abstractmethod
    def image_tokens(self, facts: ModelFacts, sample: SampleConfig) -> int:
        """Tokens of one sample, text not counted."""

    def block_parameters(self, facts: ModelFacts) -> float:
        """Parameters of the largest block of a transformer. Of a double block of width D: two streams of attention (4 D^2), MLP
        (8 D^2) and modulation (6 D^2)."""
        return 36.0 * facts.hidden_width**2

    def heads(self, facts: ModelFacts) -> int:
        """Attention heads, which sequence parallelism deals to processes; 1 where a sample's tokens cannot be shared."""
        return int(facts.denoiser["num_attention_heads"])

    def conditioning_shapes(self, facts: ModelFacts, sample: SampleConfig, text_length: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that a prompt is encoded to, without the batch, with which the network is called to count what
        it computes and holds: the sequence, and a pooled embedding where the network reads one."""
        shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (text_length, self.text_width(facts))}
        if facts.denoiser.get("pooled_projection_dim"):
            shapes["pooled_projections"] = (int(facts.denoiser["pooled_projection_dim"]),)
        return shapes

    def problems(self, config: Config, facts: ModelFacts) -> Iterator[str]:
        """What this model rules out in a configuration, each with a way out."""
        found = transitions.prediction(config.sample.transition)
        if found != self.prediction:
            fitting = transitions.predicting(self.prediction)
            yield (
                f"sample.transition is {config.sample.transition!r}, which is for predictions of {found}, but {self.kind} "
                f"predicts {self.prediction}; use {' or '.join(name for name in fitting if name != 'ode')}"
            )
        multiple = self.size_multiple(facts)
        for key in ("height", "width"):
            value = getattr(config.sample, key)
            if value % multiple:
                below, above = value // multiple * multiple, -(-value // multiple) * multiple
                near = f"{below} or {above}" if below else str(above)
                yield f"sample.{key} is {value}; it must be a multiple of {multiple} for this model: {near}"
        if config.model.compile != "none" and not self.blocks:
            yield f"model.compile is {config.model.compile}, but {self.kind} names no blocks to compile; use none"
        if config.engine.activation_checkpointing != "none" and not self.blocks:
            yield (
                f"engine.activation_checkpointing is {config.engine.activation_checkpointing}, but {self.kind} names no blocks "
                "to recompute; use none"
            )

    def schedule(self, sample: SampleConfig, facts: ModelFacts) -> Schedule:
        """The levels that a sample passes: a flow's; a model of another paradigm has others.

        Raises:
            ValueError: these settings have none.
        """
        return schedules.flow(sample.steps, sample.shift)

    def text_readers(self, config: Config, facts: ModelFacts) -> tuple[TextReader, ...]:
        """How each text encoder reads prompts, as its trainer has it: prompts that are cut are counted by them."""
        return ()

    def claims(self, checkpoint: Path, advice: str) -> str | None:
        """What makes a checkpoint this model's, whatever pipeline its model_index.json names; None: nothing but that does.

        Args:
            advice: the end of an error about a file that cannot be read.
        """
        return None

    def network(self, denoiser: dict[str, Any], *, as_trained: bool = False) -> nn.Module:
        """The network at its real size on the meta device: diffusers' class.

        Args:
            denoiser: its configuration, ``facts.denoiser``.
            as_trained: with the layers that are trained (adapters sit on them), where FastVideo fuses some.
        """
        # diffusers' class has the same parameters and is imported in a fraction of the time.
        if self.fastvideo_config is None or self.diffusers_names or not as_trained:
            module: nn.Module = diffusers_denoiser(denoiser)
            return module
        return fastvideo_transformer(self.fastvideo_config, denoiser)

    def pass_bytes(self, config: Config, facts: ModelFacts) -> PassBytes | None:
        """What one pass over a micro-batch holds, of a family without ``activations``; None: it is counted on the network,
        which is a UNet of diffusers then."""
        return None

    def text_width(self, facts: ModelFacts) -> int:
        """Width of the text sequence the network reads."""
        component, key = self.sequence_encoder
        return int(facts.components[component][key])


def no_embedded_guidance(config: Config) -> Iterator[str]:
    """The problem of a model without embedded guidance that is told a scale for it."""
    found = config.sample.guidance_scale
    if found != SampleConfig().guidance_scale:
        yield (
            f"sample.guidance_scale is {found}, the embedded guidance that {config.model.kind} does not have; set "
            "sample.cfg_scale, and leave it out"
        )
