"""SkyReels-V1-I2V, image to video with classifier-free guidance: what is particular to it beside HunyuanVideo."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models.hunyuan_video.trainer import HunyuanVideoGRPOTrainer
from fastvideo_grpo.prompts.embeddings import Conditioning
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.prompts.images import load_image
from fastvideo_grpo.sampling.noise import generator, normal
from fastvideo_grpo.sampling.schedules import Level

from fastvideo.configs.pipelines.base import PipelineConfig  # isort: skip
from .fastvideo_config import SkyReelsI2VConfig, register  # isort: skip

register()


class SkyReelsI2VGRPOTrainer(HunyuanVideoGRPOTrainer):
    """GRPO on SkyReels-V1-I2V: states ``[B, 16, (frames - 1) / 4 + 1, height / 8, width / 8]``, the noise alone.

    The network reads twice as many channels: the latents of the prompt's image stand beside the noise, in the first latent
    frame, with zeros behind it. They have no noise and no part in the log-probs.
    """

    pipeline_config_class: ClassVar[type[PipelineConfig]] = SkyReelsI2VConfig

    def encode(self, prompts: list[Prompt]) -> list[Conditioning]:
        """HunyuanVideo's two text embeddings, and of a prompt with an image ``image_latents`` ``[1, 16, 1, h, w]``."""
        encoded = super().encode(prompts)
        for prompt, conditioning in zip(prompts, encoded, strict=True):
            if prompt.image is not None:  # a negative prompt has none
                conditioning["image_latents"] = self.encode_image(prompt)
        return encoded

    def encode_image(self, prompt: Prompt) -> Tensor:
        """A draw from the VAE's posterior of the prompt's image, scaled; the same draw whenever the prompt is encoded.

        Raises:
            UserError: the VAE gives no finite latents of it.
        """
        assert prompt.image is not None
        vae = self.get_module("vae")
        pixels = load_image(prompt.image, self.config.sample.height, self.config.sample.width)
        with self.vae_on_device():
            weights = next(vae.parameters())
            frame = (pixels.float() / 255 * 2 - 1).permute(2, 0, 1)[None, :, None].to(weights.device, weights.dtype)
            tiling, vae.use_tiling = vae.use_tiling, False  # one frame needs none, and diffusers takes none
            try:
                posterior = vae.encode(frame)
                drawn = normal(generator("image", prompt.id), tuple(posterior.mean.shape)).to(posterior.mean)
                latents = posterior.mean + posterior.std * drawn
            finally:
                vae.use_tiling = tiling
        latents = latents.float() * vae.scaling_factor
        if not bool(latents.isfinite().all()):
            model = self.config.model
            way = f"set model.vae_precision=fp32 (it is {model.vae_precision})"
            if model.vae_precision == "fp32":
                way = f"see that the image and {model.path}/vae are whole"
            raise UserError(
                f"the VAE gives latents that are not finite of the image {prompt.image} of prompt {prompt.id!r}: {way}"
            )
        return latents

    def network_output(self, sample: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
        """The velocity of the noise channels at ``sample`` ``[B, 16, F, H, W]``."""
        image = conditioning["image_latents"].to(sample)
        behind = sample.shape[2] - image.shape[2]
        image = torch.nn.functional.pad(image, (0, 0, 0, 0, 0, behind))
        return super().network_output(torch.cat([sample, image], dim=1), level, conditioning)
