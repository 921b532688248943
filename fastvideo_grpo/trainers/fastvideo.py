"""What all trainers that are FastVideo pipelines share: loading on plain modules, and the swapped denoising stage."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

from fastvideo_grpo.patching import require_patched

require_patched()  # before FastVideo is imported: the message names the command that repairs it

os.environ.setdefault("FASTVIDEO_LOGGING_LEVEL", "WARNING")  # FastVideo narrates every component it loads

import fastvideo.logger  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from fastvideo.attention import DistributedAttention  # noqa: E402
from fastvideo.attention.selector import _component_attention_backend_scope  # noqa: E402
from fastvideo.configs.models.encoders import CLIPTextConfig  # noqa: E402
from fastvideo.configs.pipelines.base import PipelineConfig  # noqa: E402
from fastvideo.fastvideo_args import FastVideoArgs  # noqa: E402
from fastvideo.forward_context import set_forward_context  # noqa: E402
from fastvideo.models.loader import weight_utils  # noqa: E402
from fastvideo.pipelines.composed_pipeline_base import ComposedPipelineBase  # noqa: E402
from fastvideo.pipelines.pipeline_batch_info import ForwardBatch  # noqa: E402
from fastvideo.pipelines.stages import PipelineStage, TextEncodingStage  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from fastvideo_grpo.config.keys import Config  # noqa: E402
from fastvideo_grpo.engines.make import uses_zero3  # noqa: E402
from fastvideo_grpo.engines.parallel import World, make_group_of_one  # noqa: E402
from fastvideo_grpo.errors import ConfigError  # noqa: E402
from fastvideo_grpo.model_files.clean_folder import clean_folder  # noqa: E402
from fastvideo_grpo.model_files.headers import read_entries  # noqa: E402
from fastvideo_grpo.model_files.json_files import read_json  # noqa: E402
from fastvideo_grpo.model_files.selection import WeightFilesError, select  # noqa: E402
from fastvideo_grpo.models.diffusers_names import denoiser_names  # noqa: E402
from fastvideo_grpo.models.networks import fastvideo_transformer  # noqa: E402
from fastvideo_grpo.models.registry import FAMILIES  # noqa: E402
from fastvideo_grpo.precision import DTYPES  # noqa: E402
from fastvideo_grpo.prompts.embeddings import Conditioning  # noqa: E402
from fastvideo_grpo.prompts.files import Prompt  # noqa: E402
from fastvideo_grpo.prompts.tokenizers import load_tokenizer  # noqa: E402
from fastvideo_grpo.sampling.rollout import Walk  # noqa: E402
from fastvideo_grpo.trainers.base import GRPOTrainer  # noqa: E402
from fastvideo_grpo.trainers.policy import Drawn  # noqa: E402
from fastvideo_grpo.trainers.stages import LeaderDecodingStage, RolloutRequest, RolloutStage  # noqa: E402

logging.getLogger("fastvideo").setLevel(logging.WARNING)
# In a run of several processes it tells once, as warnings, which of them log.
fastvideo.logger._warned_local_main_process = fastvideo.logger._warned_main_process = True

ATTENTION_BACKENDS = {"sdpa": "TORCH_SDPA", "flash": "FLASH_ATTN"}


class FastVideoGRPOTrainer(GRPOTrainer, ComposedPipelineBase):
    """First base of a trainer whose second base is a FastVideo pipeline: ``class X(FastVideoGRPOTrainer, XPipeline)``.

    A subclass gives ``pipeline_config_class``, ``text_encoders`` and ``tokenizers`` (component names), ``text_settings`` and
    what :class:`GRPOTrainer` asks of every model.
    """

    text_encoders: ClassVar[tuple[str, ...]]
    tokenizers: ClassVar[tuple[str, ...]]
    pipeline_config_class: ClassVar[type[PipelineConfig]]
    _required_config_modules: list[str]

    def __init__(self, config: Config, world: World, *, with_text_encoders: bool = True) -> None:
        """Load the checkpoint's components as plain modules on this process's device.

        Args:
            with_text_encoders: False leaves them on disk (all embeddings are cached).
        """
        self.config, self.world = config, world  # the stages are made while FastVideo loads
        if not dist.is_initialized():
            # FastVideo wants process groups even for one process.
            make_group_of_one(world.device, timedelta(minutes=config.run.timeout_minutes))
        args = FastVideoArgs(
            model_path=config.model.path,
            pipeline_config=self.pipeline_config(config),
            num_gpus=world.size,
            tp_size=1,
            sp_size=config.engine.sequence_parallel,
            attention_backend=ATTENTION_BACKENDS[config.model.attention],
            use_fsdp_inference=False,
            dit_cpu_offload=False,
            dit_layerwise_offload=False,
            text_encoder_cpu_offload=False,
            image_encoder_cpu_offload=False,
            vae_cpu_offload=False,
            pin_cpu_memory=False,
            disable_autocast=True,  # the VAE computes in the dtype it was loaded in
        )
        loaded: dict[str, Any] = {"transformer": self._load_partitioned(config, world)} if uses_zero3(config) else {}
        components = list(type(self)._required_config_modules)  # a copy: loading edits the list
        if not with_text_encoders:
            components = [name for name in components if name not in (*self.text_encoders, *self.tokenizers)]
        with clean_folder(self.checkpoint, FAMILIES[config.model.kind].folders) as folder:
            if with_text_encoders:
                loaded |= self.read_tokenizers(folder)
            with _no_bars():
                ComposedPipelineBase.__init__(self, str(folder), args, components, loaded or None)
            self.post_init()
        _check_vae(self.get_module("vae"), self.checkpoint / "vae")
        self.prepare_transformer(self.get_module("transformer"))
        # The transformer is loaded in its own precision; from here on the stages hand over float32, so that initial noise is
        # not rounded on its way, and network_output() casts to what the network computes in.
        args.pipeline_config.dit_precision = "fp32"
        self._check_attention(config.model.attention)
        self.get_module("vae").requires_grad_(False)
        for name in self.text_encoders if with_text_encoders else ():
            encoder = self.get_module(name).requires_grad_(False)
            encoder.to(next(encoder.parameters()).dtype)  # on CPUs FastVideo keeps norms in float32, beside bf16 weights
        if config.engine.offload_idle:
            for name in ("vae", *(self.text_encoders if with_text_encoders else ())):
                self.get_module(name).to("cpu")
        self.setup(config, world)

    @staticmethod
    def _load_partitioned(config: Config, world: World) -> nn.Module:
        """The transformer in ZeRO-3 partitions, read shard by shard; FastVideo's loader would put all of it in each process."""
        from fastvideo_grpo.engines.sharded_loading import CheckpointReader, FusedWeights, WeightSource, load_partitioned

        folder = Path(config.model.path) / "transformer"
        facts, family = read_json(folder / "config.json"), FAMILIES[config.model.kind]
        assert family.fastvideo_config is not None
        # What FastVideo's loader enters: in it the layers take the backend asked for, outside the fastest that they find.
        with _component_attention_backend_scope(ATTENTION_BACKENDS[config.model.attention], component="transformer"):
            module = fastvideo_transformer(family.fastvideo_config, facts, DTYPES[config.model.precision])

        def weights() -> WeightSource:
            reader = CheckpointReader(folder)
            return FusedWeights(reader, denoiser_names(family, facts["_class_name"], reader.shapes).parts)

        module.requires_grad_(False)  # as FastVideo's loader leaves it
        return load_partitioned(module, weights, config.optim, config.engine, precision=config.model.precision, world=world)

    def get_module(self, name: str, default: Any = None) -> Any:
        return ComposedPipelineBase.get_module(self, name, default)  # GRPOTrainer, which has none, comes first

    @classmethod
    def read_tokenizers(cls, checkpoint: Path) -> dict[str, Any]:
        """Component name -> tokenizer, with the tokens that its files say (FastVideo's loader takes what transformers makes of
        its class)."""
        return {name: load_tokenizer(checkpoint / name) for name in cls.tokenizers}

    def prepare_transformer(self, transformer: nn.Module) -> None:
        """Called with every transformer that is loaded, the reference included; a model that changes its own overrides it."""

    def load_denoiser(self) -> nn.Module:
        module = self._load_partitioned(self.config, self.world)
        self.prepare_transformer(module)
        return module

    def _check_attention(self, wanted: str) -> None:
        """FastVideo falls back to another kernel in silence, for instance where the head size is not supported."""
        found = {m.backend.name for m in self.denoiser.modules() if isinstance(m, DistributedAttention)}
        if found != {ATTENTION_BACKENDS[wanted]}:
            raise ConfigError(
                f"model.attention is {wanted}, but FastVideo chose {', '.join(sorted(found))} here; set the other"
            )

    @classmethod
    def pipeline_config(cls, config: Config) -> PipelineConfig:
        """FastVideo's configuration of this model with our precisions; CLIP always runs in float32."""
        pipeline = cls.pipeline_config_class()
        pipeline.dit_precision = config.model.precision
        pipeline.vae_precision = pipeline.vae_decode_precision = config.model.vae_precision
        encoders = pipeline.text_encoder_configs
        pipeline.text_encoder_precisions = tuple(
            "fp32" if isinstance(encoder, CLIPTextConfig) else config.model.precision for encoder in encoders
        )
        return pipeline

    @abstractmethod
    def text_settings(self) -> dict[str, dict[str, Any]]:
        """Of each text encoder, in order: how its tensor is called in the conditioning -> ``max_length`` and ``padding`` of its
        tokens."""

    def encode(self, prompts: list[Prompt]) -> list[Conditioning]:
        """What each text encoder makes of each prompt, under the names of :meth:`text_settings`."""
        encoded: list[Conditioning] = [{} for _ in prompts]
        for i, (name, settings) in enumerate(self.text_settings().items()):
            for prompt, conditioning in zip(prompts, encoded, strict=True):
                # One at a time: a prompt's embedding must not depend on what it was batched with.
                (conditioning[name],) = self.text_stage.encode_text(
                    prompt.text, self.fastvideo_args, encoder_index=i, truncation=True, **settings
                )
        return encoded

    def forward_batch(self, conditioning: Conditioning, initial: Tensor) -> ForwardBatch:
        """A batch of given embeddings (each ``[B, ...]``) and initial noise, ready for FastVideo's stages."""
        sample = self.config.sample
        return ForwardBatch(
            data_type="video",
            prompt="",  # not read, since embeddings are given
            num_videos_per_prompt=len(initial),
            prompt_embeds=[conditioning[name] for name in self.text_settings()],
            latents=initial,
            num_frames=sample.frames,
            height=sample.height,
            width=sample.width,
            num_inference_steps=sample.steps,
            # A higher one would ask for a negative prompt: guidance is in predict(), embedded guidance in network_output().
            guidance_scale=1.0,
            seed=0,  # the stages draw nothing: the noise is given
        )

    def create_pipeline_stages(self, fastvideo_args: FastVideoArgs) -> None:
        """FastVideo's stages, with those that denoise and decode replaced."""
        super().create_pipeline_stages(fastvideo_args)
        self._replace_stage("denoising_stage", RolloutStage(self))
        self._replace_stage("decoding_stage", LeaderDecodingStage(self))

    def _replace_stage(self, name: str, stage: PipelineStage) -> None:
        position = self._stages.index(self._stage_name_mapping[name])
        stage._pipeline_stage_name = name
        self._stages[position] = stage
        self._stage_name_mapping[name] = stage
        setattr(self, name, stage)

    @property
    def text_stage(self) -> TextEncodingStage:
        """FastVideo's stage that runs the text encoders."""
        return next(stage for stage in self._stages if isinstance(stage, TextEncodingStage))

    def release_text_encoders(self) -> None:
        for name in self.text_encoders:
            self.modules.pop(name, None)
        self.text_stage.text_encoders = [None] * len(self.text_encoders)
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def forward_context(self, conditioning: Conditioning | None = None) -> AbstractContextManager[Any]:
        # FastVideo's attention reads it, and activation checkpointing runs attention once more inside backward.
        return set_forward_context(current_timestep=0, attn_metadata=None)

    def generate(self, conditioning: Conditioning, initial: Tensor, walk: Walk) -> Drawn:
        """One pass through all of FastVideo's stages, ours in the middle; see :meth:`GRPOTrainer.generate`."""
        batch = self.forward_batch(conditioning, initial)
        request = RolloutRequest(walk, conditioning, decode=self.world.leads)
        batch.extra["rollout"] = request
        with self.pass_context(conditioning):
            ComposedPipelineBase.forward(self, batch, self.fastvideo_args)
        assert request.latents is not None and request.finite is not None
        return Drawn(request.latents, request.media, request.finite, request.decoded, request.trajectory)


def _check_vae(vae: nn.Module, folder: Path) -> None:
    """FastVideo loads the VAEs of video models without strictness.

    Raises:
        WeightFilesError: a tensor of the VAE is in no file, and has random numbers or none.
    """
    missing = sorted(vae.state_dict().keys() - read_entries(select(folder)).keys())
    if missing:
        raise WeightFilesError(f"{folder}: {len(missing)} tensors of FastVideo's VAE are in no file, {missing[0]} is the first")


@contextmanager
def _no_bars() -> Iterator[None]:
    """Entered while FastVideo loads: for each component it leaves a bar of its files on the error stream. What was loaded is
    said in one line (:func:`~fastvideo_grpo.trainers.load.load_trainer`)."""
    before = weight_utils.tqdm
    weight_utils.tqdm = lambda files, **_: files
    try:
        yield
    finally:
        weight_utils.tqdm = before
