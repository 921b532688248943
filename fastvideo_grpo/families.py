"""What the rest of the project has to know of a model family before anything of it is loaded: the checkpoint's parts, its
sizes, and what they allow. Trainers (one per family) are in :mod:`fastvideo_grpo.trainers`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from fastvideo_grpo import downloads, published
from fastvideo_grpo.config import Config, ConfigError, LoRAConfig, SampleConfig, checkpointed_blocks
from fastvideo_grpo.downloads import Source
from fastvideo_grpo.extensions import Registry
from fastvideo_grpo.model_files.json_files import read_json
from fastvideo_grpo.precision import DTYPES
from fastvideo_grpo.prompts.cut import TextReader
from fastvideo_grpo.prompts.files import Prompt, PromptFile, read_prompt_file
from fastvideo_grpo.sampling import schedules, transitions
from fastvideo_grpo.sampling.schedules import Schedule

if TYPE_CHECKING:
    from fastvideo_grpo.unet_memory import PassBytes


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


class _ConfigFile(dict[str, Any]):
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


def _read(file: Path, advice: str) -> dict[str, Any]:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}{advice or '; download it again'}") from error


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


@dataclass(frozen=True)
class Family(ABC):
    """A model family.

    Attributes:
        kind: ``model.kind``.
        name: the published model.
        pipeline: ``_class_name`` in model_index.json.
        trainer: its :class:`~fastvideo_grpo.trainers.base.GRPOTrainer`, as "module:class"; imported when it is loaded.
        folders: components a checkpoint must have.
        configs: the published configuration files of those components whose sizes matter here.
        sequence_encoder: the text encoder whose sequence the network reads, and in its config the key of its width.
        lora_targets: the attention projections, as the loaded network names them.
        activations: dtype -> what the blocks hold where all weights are trained; None: see :meth:`pass_bytes`.
        lora_activations: likewise, where adapters on ``lora_targets`` are trained: a frozen layer keeps no input for the
            gradient of its weight. None: as much as where all weights are trained.
        decode: held at once while decoding, per pixel (of all frames of a tile), in multiples of (``facts.vae_width`` x bytes
            of the dtype).
        decode_kept: likewise, what a decoding with gradients keeps for its backward pass (per pixel of the whole; counted in
            diffusers' decoders of the published sizes).
        parameters: of the published VAE and text encoders.
        denoiser: the component that is trained.
        prediction: what its output means to a transition, "velocity" or "noise".
        source: where the published checkpoint is to be had; None: errors do not say.
        fastvideo_config: FastVideo's pipeline configuration, as "module:class"; None: its trainer is no FastVideo pipeline.
        defaults: by section of the configuration, what it has instead of keys' own defaults where a run leaves them out.
        blocks: names of the classes of the loaded network's blocks, which ``engine.activation_checkpointing`` recomputes; none
            where it cannot be asked for.
        not_recomputed: names of the classes of other modules that stand in the network's lists of modules.
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
    lora_activations: dict[str, Activations] | None = None
    denoiser: str = "transformer"
    prediction: Literal["velocity", "noise"] = "velocity"
    source: Source | None = None
    fastvideo_config: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    not_recomputed: tuple[str, ...] = ()
    reads_images: bool = False
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
        """Shapes of the tensors that a prompt is encoded to, without the batch, with which ``fastvideo-grpo measure-family``
        calls the network: the sequence, and a pooled embedding where the network reads one."""
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

    def facts(self, path: Path, *, published_if_missing: bool = False) -> ModelFacts:
        """Read the checkpoint's configuration files; see :func:`model_facts`."""
        if not path.exists() and published_if_missing:
            return ModelFacts(f"the published configuration of {self.name} ({path} is not there)", self.configs, self.denoiser)
        index = path / "model_index.json"
        if not index.is_file():
            what = "has no model_index.json" if path.exists() else "does not exist"
            raise ConfigError(f"model.path={path} {what}; expected the diffusers folder of {self.name}{self.where_from(path)}")
        self._check_pipeline(path, _read(index, self.where_from(path)).get("_class_name"))
        missing = [folder for folder in self.folders if not (path / folder).is_dir()]
        if missing:
            raise ConfigError(f"model.path={path} lacks the folders {', '.join(missing)}{self.where_from(path)}")
        parts: dict[str, dict[str, Any]] = {}
        for component, published_config in self.configs.items():
            file = path / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
            if not file.is_file():
                raise ConfigError(f"model.path={path} lacks {component}/{file.name}{self.where_from(path)}")
            parts[component] = found = _ConfigFile(file, _read(file, self.where_from(path)))
            found.check_types(published_config)
        return ModelFacts(str(path), parts, self.denoiser)

    def _check_pipeline(self, path: Path, found: Any) -> None:
        """Raise :class:`ConfigError` if model_index.json names another pipeline than this family's."""
        if found == self.pipeline:
            return
        fitting = next((f"; set model.kind={f.kind}" for f in FAMILIES.usable().values() if f.pipeline == found), "")
        raise ConfigError(
            f"model.path={path} holds a {found} (model_index.json), but model.kind={self.kind} needs a {self.pipeline}{fitting}"
        )

    def where_from(self, path: Path) -> str:
        """The end of an error about a checkpoint that is not there, or not whole."""
        advice = ""
        if self.source is not None:
            # A folder of another name may be the user's own model, into which nothing is to be downloaded.
            own = path.exists() and path.name != Path(self.source.folder).name
            advice = f"; the published one: {self.source.advice(None if own else path)}"
        if self.kind in _OWN and not path.exists():
            tiny = path if path.name.startswith("tiny") else Path("checkpoints") / f"tiny-{self.kind.replace('_', '-')}"
            advice += (
                f"; or try everything with a tiny random one: fastvideo-grpo tiny {self.kind} --out {tiny}, and "
                f"model.path={tiny}"
            )
        return advice

    def network(self, denoiser: dict[str, Any], *, as_trained: bool = False) -> nn.Module:
        """The network at its real size on the meta device: diffusers' class.

        Args:
            denoiser: its configuration, ``facts.denoiser``.
            as_trained: with the layers that are trained (adapters sit on them), where FastVideo fuses some.
        """
        from fastvideo_grpo.checkpoints.diffusers_names import has_diffusers_names
        from fastvideo_grpo.fastvideo_models import diffusers_denoiser, fastvideo_transformer

        # diffusers' class has the same parameters and is imported in a fraction of the time.
        if self.fastvideo_config is None or not as_trained or has_diffusers_names(denoiser["_class_name"]):
            module: nn.Module = diffusers_denoiser(denoiser)
            return module
        return fastvideo_transformer(self.kind, denoiser)

    def pass_bytes(self, config: Config, facts: ModelFacts) -> PassBytes:
        """What one pass over a micro-batch holds, of a family without ``activations``: counted on diffusers' UNet."""
        from fastvideo_grpo.unet_memory import unet_bytes

        shape = (config.engine.micro_batch_size, *self.latent_shape(facts, config.sample))
        dtype = DTYPES[config.model.precision]
        every = checkpointed_blocks(config.engine.activation_checkpointing)
        return unet_bytes(
            facts.denoiser,
            shape,
            config.prompts.text_length,
            dtype,
            every,
            blocks=self.blocks,
            not_recomputed=self.not_recomputed,
            lora=None if config.model.lora is None else lora_settings(config),
        )

    def text_width(self, facts: ModelFacts) -> int:
        """Width of the text sequence the network reads."""
        component, key = self.sequence_encoder
        return int(facts.components[component][key])


def _no_embedded_guidance(config: Config) -> Iterator[str]:
    """The problem of a model without embedded guidance that is told a scale for it."""
    found = config.sample.guidance_scale
    if found != SampleConfig().guidance_scale:
        yield (
            f"sample.guidance_scale is {found}, the embedded guidance that {config.model.kind} does not have; set "
            "sample.cfg_scale, and leave it out"
        )


_MOST_T5_TOKENS = 512  # that FLUX and Wan were trained with
CLIP_TOKENS = 77
"""That CLIP's text encoders read, the two special ones included."""


def _clip(component: str, tokenizer: str) -> TextReader:
    """CLIP as a second encoder, of which the pooled embedding is read."""
    return TextReader("CLIP", component, tokenizer, CLIP_TOKENS)


def _text_length_key(config: Config, most: int) -> str | None:
    """The key that makes an encoder read more, where it can."""
    return "prompts.text_length" if config.prompts.text_length < most else None


_TWO_ENCODERS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


class _Flux(Family):
    def size_multiple(self, facts: ModelFacts) -> int:
        return max(2 * facts.spatial_compression, 16)  # packing takes 2x2 latents; FastVideo's FLUX asks for multiples of 16

    def latent_shape(self, facts: ModelFacts, sample: SampleConfig) -> tuple[int, ...]:
        ratio = facts.spatial_compression
        return int(facts.denoiser["in_channels"]) // 4, sample.height // ratio, sample.width // ratio

    def image_tokens(self, facts: ModelFacts, sample: SampleConfig) -> int:
        _, height, width = self.latent_shape(facts, sample)
        return height // 2 * (width // 2)

    def text_readers(self, config: Config, facts: ModelFacts) -> tuple[TextReader, ...]:
        length = config.prompts.text_length
        t5 = TextReader("T5", "text_encoder_2", "tokenizer_2", length, key=_text_length_key(config, _MOST_T5_TOKENS))
        return _clip("text_encoder", "tokenizer"), t5

    def problems(self, config: Config, facts: ModelFacts) -> Iterator[str]:
        yield from super().problems(config, facts)
        if config.sample.frames != 1:
            yield f"sample.frames is {config.sample.frames}, but flux makes images; use 1"
        if config.sample.vae_tiling:
            yield "sample.vae_tiling is true, but flux decodes images whole; use false"
        if config.prompts.text_length > _MOST_T5_TOKENS:
            yield f"prompts.text_length is {config.prompts.text_length}; FLUX reads at most {_MOST_T5_TOKENS} tokens"


class _Video(Family):
    """Latents ``(channels, frames, height, width)`` of a causal video VAE, which compresses all frames but the first."""

    @abstractmethod
    def patch(self, facts: ModelFacts) -> tuple[int, int, int]:
        """Latents of a token: frames, height, width."""

    def size_multiple(self, facts: ModelFacts) -> int:
        return facts.spatial_compression * max(self.patch(facts)[1:])

    def latent_shape(self, facts: ModelFacts, sample: SampleConfig) -> tuple[int, ...]:
        ratio = facts.spatial_compression
        frames = (sample.frames - 1) // facts.temporal_compression + 1
        return int(facts.denoiser["in_channels"]), frames, sample.height // ratio, sample.width // ratio

    def image_tokens(self, facts: ModelFacts, sample: SampleConfig) -> int:
        latents = self.latent_shape(facts, sample)[1:]
        return math.prod(size // patch for size, patch in zip(latents, self.patch(facts), strict=True))

    def problems(self, config: Config, facts: ModelFacts) -> Iterator[str]:
        yield from super().problems(config, facts)
        frames, ratio = config.sample.frames, facts.temporal_compression
        if frames % ratio != 1:
            below = max(1, frames - (frames - 1) % ratio)
            yield f"sample.frames is {frames}; it must be {ratio}k + 1 for this model: {below} or {below + ratio}"


def _reads_image_latents(transformer: Mapping[str, Any]) -> bool:
    """Whether it is SkyReels': HunyuanVideo's network, which reads an image's latents beside the noise it answers for."""
    found, answered = transformer.get("in_channels"), transformer.get("out_channels", 16)
    is_hunyuan = transformer.get("_class_name") == "HunyuanVideoTransformer3DModel"
    return is_hunyuan and isinstance(answered, int) and found == 2 * answered


class _HunyuanVideo(_Video):
    def text_readers(self, config: Config, facts: ModelFacts) -> tuple[TextReader, ...]:
        llama = TextReader(
            "Llama",
            "text_encoder",
            "tokenizer",
            config.prompts.text_length,
            key="prompts.text_length",
            before="<|end_header_id|>\n\n",
            after="<|eot_id|>",
            from_json=True,
        )
        return llama, _clip("text_encoder_2", "tokenizer_2")

    def _check_pipeline(self, path: Path, found: Any) -> None:
        """SkyReels' folder is HunyuanVideo's with another transformer in it; people forget to say so in model_index.json."""
        transformer = path / "transformer" / "config.json"
        if transformer.is_file() and _reads_image_latents(_read(transformer, self.where_from(path))):
            kind, pipeline = FAMILIES["skyreels_i2v"].kind, FAMILIES["skyreels_i2v"].pipeline
            read = f"model.path={path} holds the transformer of SkyReels-V1-I2V (it reads twice the channels it answers for)"
            if found != pipeline:
                if found == FAMILIES["hunyuan_video"].pipeline:
                    edit = f"run {downloads.SKYREELS_V1_I2V.commands(path)[-1]}"
                else:
                    edit = f"make it {pipeline}"
                set_kind = "" if self.kind == kind else f", and set model.kind={kind}"
                raise ConfigError(f"{read}, but its model_index.json says {found}: {edit}{set_kind}")
            if self.kind != kind:
                raise ConfigError(f"{read}, which makes clips from images; set model.kind={kind}")
        super()._check_pipeline(path, found)

    def problems(self, config: Config, facts: ModelFacts) -> Iterator[str]:
        yield from super().problems(config, facts)
        found, latents = int(facts.denoiser["in_channels"]), int(facts.vae["latent_channels"])
        if not self.reads_images and found != latents:
            yield (
                f"model.path={config.model.path}: the transformer reads {found} channels, but text to video needs the "
                f"{latents} of the VAE: it is another model"
            )

    def patch(self, facts: ModelFacts) -> tuple[int, int, int]:
        size = int(facts.denoiser["patch_size"])
        return int(facts.denoiser["patch_size_t"]), size, size


class _SkyReelsI2V(_HunyuanVideo):
    def latent_shape(self, facts: ModelFacts, sample: SampleConfig) -> tuple[int, ...]:
        channels, *rest = super().latent_shape(facts, sample)
        return channels // 2, *rest  # the network reads the noise and the image's latents, and answers for the noise

    def conditioning_shapes(self, facts: ModelFacts, sample: SampleConfig, text_length: int) -> dict[str, tuple[int, ...]]:
        channels, _, height, width = self.latent_shape(facts, sample)
        shapes = super().conditioning_shapes(facts, sample, text_length)
        return {**shapes, "image_latents": (channels, 1, height, width)}

    def problems(self, config: Config, facts: ModelFacts) -> Iterator[str]:
        yield from super().problems(config, facts)
        found, latents = int(facts.denoiser["in_channels"]), int(facts.vae["latent_channels"])
        if found != 2 * latents:
            yield (
                f"model.path={config.model.path}: the transformer reads {found} channels, but image to video needs "
                f"{2 * latents}, the noise and the image's latents: is it a text-to-video model?"
            )
        if config.sample.frames == 1:
            yield "sample.frames is 1, but skyreels_i2v makes clips from an image; use 4k + 1 of them, for example 53"


def _clean(text: str) -> str:
    """As Wan's texts are cleaned: mojibake, HTML, spaces."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return str(prompt_clean(text))


class _Wan(_Video):
    def text_readers(self, config: Config, facts: ModelFacts) -> tuple[TextReader, ...]:
        length, key = config.prompts.text_length, _text_length_key(config, _MOST_T5_TOKENS)
        return (TextReader("UMT5", "text_encoder", "tokenizer", length, key=key, prepare=_clean),)

    def patch(self, facts: ModelFacts) -> tuple[int, int, int]:
        frames, height, width = facts.denoiser["patch_size"]
        return frames, height, width

    def block_parameters(self, facts: ModelFacts) -> float:
        # Attention to itself and to the text, 4 D^2 each, and the MLP.
        width = facts.hidden_width
        return 8.0 * width**2 + 2.0 * width * int(facts.denoiser["ffn_dim"])

    def problems(self, config: Config, facts: ModelFacts) -> Iterator[str]:
        yield from super().problems(config, facts)
        yield from _no_embedded_guidance(config)
        if config.sample.vae_tiling:
            yield (
                "sample.vae_tiling is true, but wan's VAE decodes a latent frame after the other, whole: what it holds does "
                "not grow with the clip; leave it out"
            )
        if config.prompts.text_length > _MOST_T5_TOKENS:
            yield f"prompts.text_length is {config.prompts.text_length}; Wan reads at most {_MOST_T5_TOKENS} tokens"
        if (Path(config.model.path) / "transformer_2").is_dir() or facts.vae.get("is_residual"):
            yield f"model.path={config.model.path} is a Wan 2.2; model.kind=wan trains Wan 2.1, whose network is one"


class _StableDiffusion(Family):
    def size_multiple(self, facts: ModelFacts) -> int:
        # Every level of the UNet but the last halves its latents, and the way up has to meet them again.
        return facts.spatial_compression * 2 ** (len(facts.denoiser["block_out_channels"]) - 1)

    def latent_shape(self, facts: ModelFacts, sample: SampleConfig) -> tuple[int, ...]:
        ratio = facts.spatial_compression
        return int(facts.denoiser["in_channels"]), sample.height // ratio, sample.width // ratio

    def image_tokens(self, facts: ModelFacts, sample: SampleConfig) -> int:
        _, height, width = self.latent_shape(facts, sample)
        return height * width

    def text_readers(self, config: Config, facts: ModelFacts) -> tuple[TextReader, ...]:
        key = _text_length_key(config, int(facts.components["text_encoder"]["max_position_embeddings"]))
        return (TextReader("CLIP", "text_encoder", "tokenizer", config.prompts.text_length, key=key),)

    def heads(self, facts: ModelFacts) -> int:
        return 1  # a UNet's convolutions need all of a sample's latents in one process

    def schedule(self, sample: SampleConfig, facts: ModelFacts) -> Schedule:
        """The levels of the checkpoint's ``DDIMScheduler``, whichever scheduler it names itself."""
        return schedules.ddim_of(sample.steps, facts.components["scheduler"])

    def problems(self, config: Config, facts: ModelFacts) -> Iterator[str]:
        yield from super().problems(config, facts)
        sample, defaults = config.sample, SampleConfig()
        if sample.frames != 1:
            yield f"sample.frames is {sample.frames}, but {self.kind} makes images; use 1"
        if sample.vae_tiling:
            yield f"sample.vae_tiling is true, but {self.kind} decodes images whole; use false"
        if sample.shift != defaults.shift:
            yield f"sample.shift is {sample.shift}, which is of flow schedules; {self.kind} has none: leave it out"
        yield from _no_embedded_guidance(config)
        if sample.transition == "ddim" and sample.noise_level > 1:
            yield (
                f"sample.noise_level is {sample.noise_level:g}, which is the eta of ddim and at most 1 (a level has no room "
                "for more noise): use 1, or sample.transition=diffusion_sde"
            )
        if config.model.attention != "sdpa":
            yield f"model.attention is {config.model.attention}, but {self.kind} runs diffusers' attention, which is sdpa"
        longest = int(facts.components["text_encoder"]["max_position_embeddings"])
        if config.prompts.text_length > longest:
            yield f"prompts.text_length is {config.prompts.text_length}; {self.kind}'s CLIP reads at most {longest} tokens"
        try:
            self.schedule(sample, facts)
        except ValueError as error:
            yield f"model.path={config.model.path}: {error}"


# What is HunyuanVideo's, whatever its transformer reads.
_HUNYUAN: dict[str, Any] = {
    "folders": _TWO_ENCODERS,
    "sequence_encoder": ("text_encoder", "hidden_size"),
    # In the single blocks FastVideo fuses the projections with the MLP's: linear1 and linear2 are both.
    "lora_targets": ("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj", "linear1", "linear2"),
    "blocks": ("MMDoubleStreamBlock", "MMSingleStreamBlock", "IndividualTokenRefinerBlock"),
    "activations": {
        "fp32": Activations(26, 22, (4, 1.5), 28, refiner=18),
        "bf16": Activations(27, 26, (4, 1.5), 36, refiner=18),
    },
    "lora_activations": {
        "fp32": Activations(15, 18, (1.1, 1), 28, adapters=(2, 2)),
        "bf16": Activations(16, 22, (1.2, 1), 36, adapters=(2, 2)),
    },
    "decode": 9.1,  # of a clip; of an image 11.6
    "decode_kept": 70,
    "parameters": {"vae": 246.5e6, "text_encoder": 7.505e9, "text_encoder_2": 123e6},
    "decodes_singly": True,
}

_OWN: dict[str, Family] = {
    "flux": _Flux(
        kind="flux",
        name="FLUX.1-dev",
        pipeline="FluxPipeline",
        trainer="fastvideo_grpo.trainers.flux:FluxGRPOTrainer",
        fastvideo_config="fastvideo.configs.pipelines.flux:FluxPipelineConfig",
        folders=_TWO_ENCODERS,
        configs=published.FLUX_1_DEV,
        source=downloads.FLUX_1_DEV,
        sequence_encoder=("text_encoder_2", "d_model"),
        lora_targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        activations={"fp32": Activations(25, 21, (4, 2), 18), "bf16": Activations(29, 25, (4.5, 2.5), 24)},
        lora_activations={
            "fp32": Activations(14, 12, (1.2, 1.2), 18, adapters=(4, 3)),
            "bf16": Activations(16, 14, (1.3, 1.3), 24, adapters=(4, 3)),
        },
        decode=6,
        decode_kept=45,
        parameters={"vae": 83.8e6, "text_encoder": 123e6, "text_encoder_2": 4.762e9},
    ),
    "hunyuan_video": _HunyuanVideo(
        kind="hunyuan_video",
        name="HunyuanVideo",
        pipeline="HunyuanVideoPipeline",
        trainer="fastvideo_grpo.trainers.hunyuan_video:HunyuanVideoGRPOTrainer",
        fastvideo_config="fastvideo.configs.pipelines.hunyuan:HunyuanConfig",
        configs=published.HUNYUAN_VIDEO,
        source=downloads.HUNYUAN_VIDEO,
        **_HUNYUAN,
    ),
    "skyreels_i2v": _SkyReelsI2V(
        kind="skyreels_i2v",
        name="SkyReels-V1-I2V",
        pipeline="HunyuanSkyreelsImageToVideoPipeline",
        trainer="fastvideo_grpo.trainers.skyreels_i2v:SkyReelsI2VGRPOTrainer",
        fastvideo_config="fastvideo_grpo.trainers.skyreels_config:SkyReelsI2VConfig",
        configs=published.SKYREELS_V1_I2V,
        source=downloads.SKYREELS_V1_I2V,
        reads_images=True,
        # With classifier-free guidance the paper makes one update per iteration.
        defaults={"sample": {"guidance_scale": 1.0, "cfg_scale": 5.0}, "grpo": {"updates_per_iteration": 1}},
        **_HUNYUAN,
    ),
    "wan": _Wan(
        kind="wan",
        name="Wan 2.1 T2V 1.3B",
        pipeline="WanPipeline",
        trainer="fastvideo_grpo.trainers.wan:WanGRPOTrainer",
        fastvideo_config="fastvideo.configs.pipelines.wan:WanT2V480PConfig",
        folders=("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
        configs=published.WAN_2_1_1_3B,
        source=downloads.WAN_2_1_1_3B,
        sequence_encoder=("text_encoder", "d_model"),
        lora_targets=("to_q", "to_k", "to_v", "to_out"),  # of the attention to itself and to the text
        blocks=("WanTransformerBlock",),
        activations={
            "fp32": Activations(23, 0, (4, 4), 19, mlp=2, text=4),
            "bf16": Activations(30, 0, (6, 4), 29, mlp=2, text=5),
        },
        lora_activations={
            "fp32": Activations(15, 0, (1.5, 1), 19, mlp=1, text=3, adapters=(6, 0)),
            "bf16": Activations(21, 0, (3, 1), 29, mlp=1, text=4, adapters=(6, 0)),
        },
        decode=18,  # of an image, and of a clip's frames 13: the larger
        decode_kept=70,  # of an image 65 in fp32 and 77 in bf16, of a clip 44 and 55
        parameters={"vae": 126.9e6, "text_encoder": 5.681e9},
        decodes_singly=True,
        decodes_frames=4,
        defaults={"sample": {"cfg_scale": 5.0}, "grpo": {"updates_per_iteration": 1}},
    ),
    "stable_diffusion": _StableDiffusion(
        kind="stable_diffusion",
        name="Stable Diffusion v1.4",
        pipeline="StableDiffusionPipeline",
        trainer="fastvideo_grpo.trainers.stable_diffusion:StableDiffusionGRPOTrainer",
        folders=("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
        configs=published.STABLE_DIFFUSION_V1_4,
        source=downloads.STABLE_DIFFUSION_V1_4,
        sequence_encoder=("text_encoder", "hidden_size"),
        lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
        blocks=("ResnetBlock2D", "Transformer2DModel"),
        not_recomputed=("Downsample2D", "Upsample2D"),
        activations=None,
        decode=6,
        decode_kept=45,
        parameters={"vae": 83.7e6, "text_encoder": 123e6},
        denoiser="unet",
        prediction="noise",
        defaults={
            "prompts": {"text_length": 77},
            "sample": {"height": 512, "width": 512, "steps": 50, "transition": "ddim", "noise_level": 1.0, "cfg_scale": 5.0},
            "grpo": {"updates_per_iteration": 1},
        },
    ),
}


def _problem(name: str, offered: Any) -> str | None:
    if not isinstance(offered, Family):
        found = "class" if isinstance(offered, type) else type(offered).__name__
        return f"which is no object of fastvideo_grpo.families.Family, but a {found}"
    return None if offered.kind == name else f"whose kind is '{offered.kind}'; both must be the same"


FAMILIES: Registry[Family] = Registry("model", "fastvideo_grpo.models", problem=_problem)
for _family in _OWN.values():
    FAMILIES.register(_family.kind, _family)


def model_facts(config: Config, *, published_if_missing: bool = False) -> ModelFacts:
    """Read the checkpoint's configuration files.

    Args:
        published_if_missing: without the folder, take the published model's configuration (``--dry-run`` without weights).

    Raises:
        ConfigError: no such folder, another kind of checkpoint, or a missing component; says what was expected and found.
    """
    return FAMILIES[config.model.kind].facts(Path(config.model.path), published_if_missing=published_if_missing)


def prompts_of(config: Config, path: str | Path) -> list[Prompt]:
    """The prompts of a file, with their images where the model starts from one; raises what ``read_prompt_file`` does."""
    return prompt_file_of(config, path).prompts


def prompt_file_of(config: Config, path: str | Path) -> PromptFile:
    """Likewise, with what is to be said of the file."""
    reads_images = FAMILIES[config.model.kind].reads_images
    return read_prompt_file(path, images=reads_images, duplicates=config.prompts.duplicates)


def configured_prompts(config: Config) -> list[Prompt]:
    """The training prompts, and those kept out."""
    paths = (config.prompts.path, config.prompts.eval_path)
    return [prompt for path in paths if path is not None for prompt in prompts_of(config, path)]


def lora_settings(config: Config) -> LoRAConfig:
    """``model.lora`` with the layers named: the model's attention projections where none are."""
    assert config.model.lora is not None
    targets = config.model.lora.targets
    return replace(config.model.lora, targets=list(FAMILIES[config.model.kind].lora_targets if targets is None else targets))
