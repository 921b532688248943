"""What has to be known of the model before it is loaded."""

import torch

from fastvideo_grpo.models.family import Family, PassBytes
from fastvideo_grpo.tiny.offer import TinyOffer

from .network import CONFIGS, make


class Dots(Family):
    def size_multiple(self, facts):
        return facts.spatial_compression

    def latent_shape(self, facts, sample):
        ratio = facts.spatial_compression
        return facts.denoiser["in_channels"], sample.height // ratio, sample.width // ratio

    def image_tokens(self, facts, sample):
        _, height, width = self.latent_shape(facts, sample)
        return height * width

    def heads(self, facts):
        return 1

    def network(self, denoiser, *, as_trained=False):
        with torch.device("meta"):
            return make("mixer", denoiser)

    def conditioning_shapes(self, facts, sample, text_length):
        return {"text": (facts.denoiser["text_width"],)}

    def pass_bytes(self, config, facts):
        tokens = config.engine.micro_batch_size * self.image_tokens(facts, config.sample)
        hidden = 4 * tokens * facts.denoiser["width"]
        return PassBytes(forward=2 * hidden, kept=2 * hidden, working=hidden, largest_block=500)

    def problems(self, config, facts):
        yield from super().problems(config, facts)
        if config.sample.frames != 1:
            yield f"sample.frames is {config.sample.frames}, but {self.kind} makes images; use 1"


FAMILY = Dots(
    kind="dots",
    name="Dots",
    pipeline="DotsPipeline",
    trainer=f"{__package__}.trainer:DotsGRPOTrainer",
    tiny=TinyOffer(f"{__package__}.tiny:write_dots", "tiny-dots"),
    folders=tuple(CONFIGS),
    configs=CONFIGS,
    sequence_encoder=("text_encoder", "hidden_size"),
    lora_targets=("inner", "outer"),
    activations=None,
    decode=4,
    decode_kept=4,
    parameters={"vae": 48, "text_encoder": 2048},
    denoiser="mixer",
    defaults={"sample": {"height": 8, "width": 8, "steps": 4, "transition": "fading_sde"}, "model": {"precision": "fp32"}},
)
