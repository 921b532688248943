"""The models that keep the promises: how a short run of each is set up, and how diffusers draws the same samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.sampling import noise
from tests import tiny_checkpoints
from tests.trainer import runs

Settings = dict[str, Any]

# At 5, which recipes take, latents of random weights reach 16, whose last digits are the bar of 1e-5.
GUIDANCE: dict[str, Settings] = {
    "no guidance": {"sample__cfg_scale": 1.0},
    "guidance in two passes": {"sample__cfg_scale": 3.0, "model__cfg_batched": False},
    "guidance in one pass": {"sample__cfg_scale": 3.0, "model__cfg_batched": True},
}


class Model:
    """A row of the table. ``kind`` is ``model.kind``; its tiny checkpoint is written by what its family's ``tiny`` names.

    Attributes:
        pipeline: diffusers' class.
        settings: of a short run (:func:`tests.trainer.runs.settings`), at sizes whose tokens two processes cannot share evenly
            and whose elements are no multiple of 32 somewhere in the network, if they can be.
        geometries: sizes and lengths of text at which samples are compared with diffusers'; the first one is exported, too.
        lora_layers: linear layers that get an adapter, where ``model.lora.targets`` is left out.
        blocks: of each kind of block that activation checkpointing recomputes the names of all, as a regular expression.
        shares_tokens: processes can share a sample's tokens (``engine.sequence_parallel``).
        unpadded: the network reads a text's own tokens only, so that both texts of guidance differ in length.
        maps_names: FastVideo calls its weights otherwise than diffusers does, and its mapping is read to export them.
        flavours: settings under which ratios are 1, too, besides those that every model is asked.
    """

    kind: ClassVar[str]
    pipeline: ClassVar[str]
    settings: ClassVar[Settings]
    geometries: ClassVar[dict[str, Settings]]
    lora_layers: ClassVar[int]
    blocks: ClassVar[tuple[str, ...]]
    shares_tokens: ClassVar[bool] = True
    unpadded: ClassVar[bool] = False
    maps_names: ClassVar[bool] = False
    flavours: ClassVar[dict[str, Settings]] = {}

    def draw(self, pipeline: Any, trainer: Any, prompt: Prompt, initial: Tensor, output: str) -> Tensor:
        """What diffusers' pipeline makes of initial noise ``[B, *latent_shape]`` under the run's settings.

        ``output`` "latent": the final states. "pt": float ``[B, F, H, W, 3]`` in [0, 1].
        """
        raise NotImplementedError

    def embed(self, pipeline: Any, text: str, text_length: int) -> dict[str, Tensor]:
        """What diffusers' pipeline gives the network of a text, under the names of our conditioning, ``[1, ...]``."""
        raise NotImplementedError

    def prepare(self, pipeline: Any) -> None:
        """Put a loaded pipeline on the levels that this project samples on."""

    # --- the same for all

    @property
    def guided(self) -> bool:
        """Whether it is sampled with classifier-free guidance where a run does not say otherwise."""
        return FAMILIES[self.kind].defaults.get("sample", {}).get("cfg_scale", 1.0) > 1

    def run(self, **overrides: Any) -> Settings:
        """Overrides of a short run of this model, these among them."""
        return {"model__kind": self.kind, **self.settings, **overrides}

    def load(self, folder: Path) -> Any:
        """diffusers' pipeline of a checkpoint, in float32."""
        import diffusers

        pipeline = tiny_checkpoints.load(getattr(diffusers, self.pipeline), folder)
        self.prepare(pipeline)
        return pipeline

    def prompt(self, folder: Path) -> Prompt:
        """One with a negative prompt of another length, what a tokenizer may be wrong at, and an image where one is read."""
        image = None
        if FAMILIES[self.kind].reads_images:
            image = folder / "start.png"
            pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(pixels).save(image)
        text = "a red circle &amp; a cat  walk over the grass, realistic style"
        return Prompt("parity", text, image=image, negative_prompt="blurry, a dog")

    def keys(self, prompt: Prompt, count: int) -> list[noise.SampleKey]:
        return [noise.SampleKey(0, 0, 0, prompt.id, member) for member in range(count)]

    def initial(self, trainer: Any, prompt: Prompt, count: int) -> Tensor:
        """The initial noise of these samples, which is each one's own."""
        return noise.initial_noise(self.keys(prompt, count), trainer.latent_shape(), shared=False)

    def common(self, trainer: Any, prompt: Prompt, initial: Tensor, output: str) -> dict[str, Any]:
        """Arguments that all of diffusers' pipelines take."""
        sample = trainer.config.sample
        return {
            "prompt": prompt.text,
            "negative_prompt": prompt.negative_prompt,
            "height": sample.height,
            "width": sample.width,
            "num_inference_steps": sample.steps,
            "latents": initial,
            "output_type": output,
        }


class Flux(Model):
    kind = "flux"
    pipeline = "FluxPipeline"
    settings: ClassVar = {"sample__height": 48, "sample__width": 48}  # 9 tokens
    lora_layers = 2 * 8 + 2 * 3  # of two double and two single blocks
    blocks = (r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+")

    geometries: ClassVar = {
        "square": {"sample__height": 64, "sample__width": 64},
        "wide": {"sample__height": 32, "sample__width": 96},
    }

    def draw(self, pipeline: Any, trainer: Any, prompt: Prompt, initial: Tensor, output: str) -> Tensor:
        """With the run's shift instead of one from the number of tokens (tests/trainer/test_flux.py has that)."""
        fixed = {"use_dynamic_shifting": False, "shift": trainer.config.sample.shift}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **fixed)
        images = pipeline(
            **self.common(trainer, prompt, trainer.pack(initial), output),
            true_cfg_scale=trainer.config.sample.cfg_scale,
            guidance_scale=trainer.config.sample.guidance_scale,
            num_images_per_prompt=len(initial),
            max_sequence_length=trainer.config.prompts.text_length,
        ).images
        return images if output == "latent" else images.permute(0, 2, 3, 1)[:, None]

    def embed(self, pipeline: Any, text: str, text_length: int) -> dict[str, Tensor]:
        sequence, pooled, _ = pipeline.encode_prompt(text, text, max_sequence_length=text_length)
        return {"encoder_hidden_states": sequence, "pooled_projections": pooled}


class VideoModel(Model):
    def clips(self, pipeline: Any, trainer: Any, prompt: Prompt, initial: Tensor, output: str, **guidance: Any) -> Tensor:
        """:meth:`draw`, of a pipeline that makes clips."""
        frames = pipeline(
            **self.common(trainer, prompt, initial, output),
            num_frames=trainer.config.sample.frames,
            num_videos_per_prompt=len(initial),
            max_sequence_length=trainer.config.prompts.text_length,
            **guidance,
        ).frames
        return frames if output == "latent" else frames.permute(0, 1, 3, 4, 2)


class HunyuanVideo(VideoModel):
    kind = "hunyuan_video"
    pipeline = "HunyuanVideoPipeline"
    settings: ClassVar = runs.HUNYUAN_T2V
    geometries: ClassVar = {
        "video": {"sample__shift": 7.0},  # of the published scheduler
        "image": {"sample__shift": 7.0, "sample__frames": 1, "sample__height": 32, "sample__width": 64},
        "a prompt longer than the text": {"sample__shift": 7.0, "sample__frames": 5, "prompts__text_length": 6},
    }
    lora_layers = 2 * 4 + 2 * 2  # of two double and two single blocks
    blocks = (r"double_blocks\.\d+", r"single_blocks\.\d+", r"txt_in\.refiner_blocks\.\d+")
    unpadded = True
    maps_names = True
    flavours: ClassVar = {"image": {"sample__frames": 1}}

    def draw(self, pipeline: Any, trainer: Any, prompt: Prompt, initial: Tensor, output: str) -> Tensor:
        sample = trainer.config.sample
        guidance = {"true_cfg_scale": sample.cfg_scale, "guidance_scale": sample.guidance_scale}
        return self.clips(pipeline, trainer, prompt, initial, output, **guidance)

    def embed(self, pipeline: Any, text: str, text_length: int) -> dict[str, Tensor]:
        """diffusers pads the text and masks the padding; here there is none: both read the same tokens."""
        sequence, pooled, mask = pipeline.encode_prompt(text, max_sequence_length=text_length)
        return {"encoder_hidden_states": sequence[:, : int(mask.sum())], "pooled_projections": pooled}


def _image_noise(prompt: Prompt, shape: tuple[int, ...], **_: Any) -> Tensor:
    """Stands for diffusers' ``randn_tensor`` where it draws the latents of a prompt's image."""
    return noise.normal(noise.generator("image", prompt.id), shape)


class SkyReelsI2V(HunyuanVideo):
    kind = "skyreels_i2v"
    pipeline = "HunyuanSkyreelsImageToVideoPipeline"
    settings: ClassVar = runs.SKYREELS_I2V
    geometries: ClassVar = {"video": {}}
    flavours: ClassVar = {}

    def draw(self, pipeline: Any, trainer: Any, prompt: Prompt, initial: Tensor, output: str) -> Tensor:
        guidance = {"true_cfg_scale": trainer.config.sample.cfg_scale, "guidance_scale": 1.0}
        clips = []
        for latents in initial.split(1):  # it draws the image's latents anew for each clip of a batch
            given = partial(_image_noise, prompt)
            with mock.patch("diffusers.models.autoencoders.vae.randn_tensor", given):
                image = Image.open(prompt.image)
                clips.append(self.clips(pipeline, trainer, prompt, latents, output, **guidance, image=image))
        return torch.cat(clips)


class Wan(VideoModel):
    kind = "wan"
    pipeline = "WanPipeline"
    settings: ClassVar = runs.WAN_T2V
    geometries: ClassVar = {
        "video": {},
        "image": {"sample__frames": 1, "sample__height": 32, "sample__width": 64},
        "a prompt longer than the text": {"sample__frames": 5, "prompts__text_length": 6},
    }
    lora_layers = 2 * 8  # of both attentions of two blocks
    blocks = (r"blocks\.\d+",)
    maps_names = True
    flavours: ClassVar = {"image": {"sample__frames": 1}}

    def prepare(self, pipeline: Any) -> None:
        """With an Euler scheduler in place of UniPC, on our levels."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        given = scheduler.set_timesteps
        scheduler.set_timesteps = lambda steps, device: given(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1], device=device)
        pipeline.scheduler = scheduler

    def draw(self, pipeline: Any, trainer: Any, prompt: Prompt, initial: Tensor, output: str) -> Tensor:
        return self.clips(pipeline, trainer, prompt, initial, output, guidance_scale=trainer.config.sample.cfg_scale)

    def embed(self, pipeline: Any, text: str, text_length: int) -> dict[str, Tensor]:
        sequence, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=text_length)
        return {"encoder_hidden_states": sequence}


class StableDiffusion(Model):
    kind = "stable_diffusion"
    pipeline = "StableDiffusionPipeline"
    settings: ClassVar = {**runs.STABLE_DIFFUSION, "sample__height": 48, "sample__width": 48}  # 3 x 3 at the lowest level
    geometries: ClassVar = {
        "square": {"sample__steps": 6, "sample__height": 64, "sample__width": 64},
        "wide": {"sample__height": 32, "sample__width": 96},
    }
    lora_layers = 4 * 8  # of both attentions of four transformers
    blocks = (r".+\.resnets\.\d+", r".+\.attentions\.\d+")
    shares_tokens = False
    flavours: ClassVar = {
        "reverse SDE, decaying noise": {"sample__transition": "diffusion_sde", "sample__noise_decay": 1.0},
    }

    def prepare(self, pipeline: Any) -> None:
        from diffusers import DDIMScheduler

        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.safety_checker = None  # it may blacken pictures

    def draw(self, pipeline: Any, trainer: Any, prompt: Prompt, initial: Tensor, output: str, **arguments: Any) -> Tensor:
        images = pipeline(
            **self.common(trainer, prompt, initial, output),
            guidance_scale=trainer.config.sample.cfg_scale,
            num_images_per_prompt=len(initial),
            **arguments,
        ).images
        return images if output == "latent" else images.permute(0, 2, 3, 1)[:, None]

    def embed(self, pipeline: Any, text: str, text_length: int) -> dict[str, Tensor]:
        sequence, _ = pipeline.encode_prompt(text, torch.device("cpu"), 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": sequence}


MODELS: dict[str, Model] = {model.kind: model for model in (Flux(), HunyuanVideo(), SkyReelsI2V(), Wan(), StableDiffusion())}


def cases(
    of: Callable[[Model], Iterable[str]], quick: Callable[[Model, str], bool], models: Iterable[Model] = MODELS.values()
) -> list[Any]:
    """For ``parametrize("model,case", ...)``: each model with each of its cases; those that are not ``quick`` are slow."""
    return [
        pytest.param(model, case, id=f"{model.kind}, {case}", marks=[] if quick(model, case) else [pytest.mark.slow])
        for model in models
        for case in of(model)
    ]
