"""Stable Diffusion 1 and 2, text to image: diffusers' UNet, VAE and CLIP, which FastVideo does not have.

No FastVideo pipeline stands behind it: what this file says is all that :class:`GRPOTrainer` asks of a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.utils.logging import disable_progress_bar

from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.engines.make import uses_zero3
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.model_files.clean_folder import clean_folder
from fastvideo_grpo.model_files.selection import select
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.precision import DTYPES
from fastvideo_grpo.prompts.embeddings import Conditioning
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.prompts.tokenizers import load_tokenizer
from fastvideo_grpo.sampling.rollout import Walk, rollout
from fastvideo_grpo.sampling.schedules import Level
from fastvideo_grpo.trainers.base import GRPOTrainer
from fastvideo_grpo.trainers.policy import Drawn

disable_progress_bar()  # a few small files are no long work


class StableDiffusionGRPOTrainer(GRPOTrainer):
    """GRPO on Stable Diffusion: latents ``[B, 4, height / 8, width / 8]``, classifier-free guidance.

    (The compression and the channels are read from the checkpoint, as are the noise schedule and what the network predicts,
    noise or v.)
    """

    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)

    def __init__(self, config: Config, world: World, *, with_text_encoders: bool = True) -> None:
        """Load the checkpoint's components on this process's device; CLIP always runs in float32.

        Args:
            with_text_encoders: False leaves them on disk (all embeddings are cached).
        """
        self.config, self.world = config, world  # what loading reads; setup() does the rest
        waits = torch.device("cpu") if config.engine.offload_idle else world.device
        self.components: dict[str, Any] = {"unet": self.load_denoiser()}
        with clean_folder(self.checkpoint, ("vae", "text_encoder", "tokenizer")) as folder:
            self.components["vae"] = _load(AutoencoderKL, folder / "vae", DTYPES[config.model.vae_precision]).to(waits)
            if with_text_encoders:
                encoder = _load(CLIPTextModel, folder / "text_encoder", torch.float32)
                self.components["text_encoder"] = encoder.to(waits)
                self.components["tokenizer"] = load_tokenizer(folder / "tokenizer")
        self.setup(config, world)

    def load_denoiser(self) -> nn.Module:
        """The UNet; with ZeRO-3 in partitions, read tensor by tensor, so that no process holds all of it."""
        config, world = self.config, self.world
        if not uses_zero3(config):
            with clean_folder(self.checkpoint, ("unet",)) as folder:
                return _load(UNet2DConditionModel, folder / "unet", DTYPES[config.model.precision]).to(world.device)
        from fastvideo_grpo.engines.sharded_loading import CheckpointReader, load_partitioned
        from fastvideo_grpo.models.networks import diffusers_denoiser

        module = diffusers_denoiser(model_facts(config).denoiser).requires_grad_(False)
        return load_partitioned(
            module,
            lambda: CheckpointReader(self.checkpoint / "unet"),
            config.optim,
            config.engine,
            precision=config.model.precision,
            world=world,
        )

    def get_module(self, name: str) -> Any:
        return self.components.get(name)

    def release_text_encoders(self) -> None:
        for name in self.text_encoders:
            self.components.pop(name, None)
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def encode(self, prompts: list[Prompt]) -> list[Conditioning]:
        """CLIP's sequence ``[1, text_length, width]`` of each prompt, its padding included."""
        encoder = self.get_module("text_encoder")
        encoded = []
        for prompt in prompts:
            # One prompt at a time: a prompt's embedding must not depend on what it was batched with.
            tokens = self.get_module("tokenizer")(
                prompt.text,
                padding="max_length",
                max_length=self.config.prompts.text_length,
                truncation=True,
                return_tensors="pt",
            )
            encoded.append({"encoder_hidden_states": encoder(tokens.input_ids.to(encoder.device))[0]})
        return encoded

    def network_output(self, sample: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
        """The predicted noise at ``sample`` ``[B, C, H, W]``, float32.

        Of a network that predicts ``v = alpha eps - sigma x`` (Salimans and Ho 2022, arXiv:2202.00512):
        ``eps = alpha v + sigma z``.
        """
        device = sample.device
        text = conditioning["encoder_hidden_states"].to(device, self.dtype)
        output = self.network(sample.to(self.dtype), level.timestep.to(device), text, return_dict=False)[0].float()
        if self.facts.components["scheduler"].get("prediction_type", "epsilon") == "epsilon":
            return output
        alpha, sigma = (part.to(device).view(-1, 1, 1, 1) for part in (level.alpha, level.sigma))
        return alpha * output + sigma * sample.float()

    def generate(self, conditioning: Conditioning, initial: Tensor, walk: Walk) -> Drawn:
        with self.pass_context(conditioning):
            latents, trajectory = rollout(
                lambda sample, level: self.predict(sample, level, conditioning), initial.to(self.world.device), walk
            )
        return self.drawn(latents, trajectory)

    def pixels(self, latents: Tensor) -> Tensor:
        """Of latents ``[B, C, H, W]``, ``[B, 3, 1, H, W]``."""
        vae = self.get_module("vae")
        scaled = (latents.float() / vae.config.scaling_factor).to(vae.dtype)
        return (vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).unsqueeze(2)


def _load(cls: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A frozen component of the checkpoint, on the CPU, in evaluation mode."""
    # Said, since diffusers warns of the ``.bin`` files that it would take anyway. (They are read without running anything.)
    safetensors = select(folder).files[0].suffix == ".safetensors"
    module = cls.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=safetensors)
    return module.requires_grad_(False).eval()
