"""HunyuanVideo, text to video and to image: what is known of it before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.model_files.downloads import Source
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.family import Activations
from fastvideo_grpo.models.text_readers import pooled_clip
from fastvideo_grpo.models.video import VideoFamily
from fastvideo_grpo.prompts.cut import TextReader
from fastvideo_grpo.tiny.offer import TinyOffer

PUBLISHED: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "attention_head_dim": 128,
        "guidance_embeds": True,
        "in_channels": 16,
        "mlp_ratio": 4.0,
        "num_attention_heads": 24,
        "num_layers": 20,
        "num_refiner_layers": 2,
        "num_single_layers": 40,
        "out_channels": 16,
        "patch_size": 2,
        "patch_size_t": 1,
        "pooled_projection_dim": 768,
        "qk_norm": "rms_norm",
        "rope_axes_dim": [16, 56, 56],
        "rope_theta": 256.0,
        "text_embed_dim": 4096,
    },
    "vae": {
        "_class_name": "AutoencoderKLHunyuanVideo",
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 16,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "scaling_factor": 0.476986,
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 4,
    },
    "text_encoder": {"hidden_size": 4096, "num_hidden_layers": 32},
}
"""hunyuanvideo-community/HunyuanVideo: the keys this project reads."""

REPOSITORY = "hunyuanvideo-community/HunyuanVideo"
GIGABYTES = 41.9
SOURCE = Source.of(REPOSITORY, "checkpoints/HunyuanVideo", GIGABYTES)

# What is HunyuanVideo's, whatever its transformer reads.
SHARED: dict[str, Any] = {
    "folders": ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
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
    "decode": 11.6,
    "decode_kept": 100,
    "clip_decode": 9.1,
    "clip_decode_kept": 70,
    "parameters": {"vae": 246.5e6, "text_encoder": 7.505e9, "text_encoder_2": 123e6},
    "decodes_singly": True,
    "texts_differ_in_length": True,
}


class HunyuanVideo(VideoFamily):
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
        return llama, pooled_clip("text_encoder_2", "tokenizer_2")

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


FAMILY = HunyuanVideo(
    kind="hunyuan_video",
    name="HunyuanVideo",
    pipeline="HunyuanVideoPipeline",
    trainer=f"{__package__}.trainer:HunyuanVideoGRPOTrainer",
    tiny=TinyOffer(
        f"{__package__}.tiny:write_hunyuan_video",
        "tiny-hunyuan",
        pretraining=f"{__package__}.pretrain:pretrain_hunyuan_video",
        pretrained_folder="tiny-hunyuan-shapes",
        pretrained_on="9-frame clips of moving shapes, 40 % of the captions' directions wrong on purpose (about 9 minutes)",
    ),
    fastvideo_config="fastvideo.configs.pipelines.hunyuan:HunyuanConfig",
    configs=PUBLISHED,
    source=SOURCE,
    reference_images={"sample": {"steps": 30, "shift": 5.0, "guidance_scale": 6.0}, "prompts": {"text_length": 256}},
    **SHARED,
)
