"""Stable Diffusion 1, text to image: what is known of it before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastvideo_grpo.config.keys import Config, SampleConfig
from fastvideo_grpo.model_files.downloads import Source
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.family import no_embedded_guidance
from fastvideo_grpo.models.image import ImageFamily
from fastvideo_grpo.models.text_readers import text_length_key
from fastvideo_grpo.prompts.cut import TextReader
from fastvideo_grpo.sampling import schedules
from fastvideo_grpo.sampling.schedules import Schedule
from fastvideo_grpo.tiny.offer import TinyOffer

PUBLISHED: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder": {"hidden_size": 768, "max_position_embeddings": 77},
    "scheduler": {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
}
"""CompVis/stable-diffusion-v1-4: the keys this project reads."""

SOURCE = Source.of(
    "CompVis/stable-diffusion-v1-4",
    "checkpoints/stable-diffusion-v1-4",
    4.3,
    24.0,
    include=(
        "*.json",
        "*.txt",
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ),
    exclude=("safety_checker/*",),
)


class StableDiffusion(ImageFamily):
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
        key = text_length_key(config, int(facts.components["text_encoder"]["max_position_embeddings"]))
        return (TextReader("CLIP", "text_encoder", "tokenizer", config.prompts.text_length, key=key),)

    def heads(self, facts: ModelFacts) -> int:
        return 1  # a UNet's convolutions need all of a sample's latents in one process

    def schedule(self, sample: SampleConfig, facts: ModelFacts) -> Schedule:
        """The levels of the checkpoint's ``DDIMScheduler``, whichever scheduler it names itself."""
        return schedules.ddim_of(sample.steps, facts.components["scheduler"])

    def problems(self, config: Config, facts: ModelFacts) -> Iterator[str]:
        yield from super().problems(config, facts)
        sample, defaults = config.sample, SampleConfig()
        if sample.shift != defaults.shift:
            yield f"sample.shift is {sample.shift}, which is of flow schedules; {self.kind} has none: leave it out"
        yield from no_embedded_guidance(config)
        if config.model.attention != "sdpa":
            yield f"model.attention is {config.model.attention}, but {self.kind} runs diffusers' attention, which is sdpa"
        longest = int(facts.components["text_encoder"]["max_position_embeddings"])
        if config.prompts.text_length > longest:
            yield f"prompts.text_length is {config.prompts.text_length}; {self.kind}'s CLIP reads at most {longest} tokens"
        try:
            self.schedule(sample, facts)
        except ValueError as error:
            yield f"model.path={config.model.path}: {error}"


FAMILY = StableDiffusion(
    kind="stable_diffusion",
    name="Stable Diffusion v1.4",
    pipeline="StableDiffusionPipeline",
    trainer=f"{__package__}.trainer:StableDiffusionGRPOTrainer",
    tiny=TinyOffer(
        f"{__package__}.tiny:write_stable_diffusion",
        "tiny-sd",
        pretraining=f"{__package__}.pretrain:pretrain_stable_diffusion",
        pretrained_folder="tiny-sd-shapes",
        pretrained_on="pictures of coloured shapes, 55 % of the captions' colours wrong on purpose (about 7 minutes)",
        layouts={"epsilon": "which version 1 predicts", "v_prediction": "which version 2 predicts"},
        layout_argument="prediction_type",
    ),
    kohya_layer=lambda layer: (layer.replace(".", "_"), [layer]),
    folders=("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    configs=PUBLISHED,
    source=SOURCE,
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
)
