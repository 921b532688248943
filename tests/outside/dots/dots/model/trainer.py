"""What the loop asks of the model; no FastVideo pipeline stands behind it."""

from fastvideo_grpo.precision import DTYPES
from fastvideo_grpo.sampling.rollout import rollout
from fastvideo_grpo.trainers.base import GRPOTrainer

from .network import load


class DotsGRPOTrainer(GRPOTrainer):
    text_encoders = ("text_encoder",)

    def __init__(self, config, world, *, with_text_encoders=True):
        self.config, self.world = config, world
        names = ["mixer", "vae", *(self.text_encoders if with_text_encoders else ())]
        self.components = {name: load(self.checkpoint, name).to(world.device) for name in names}
        self.components["mixer"].to(DTYPES[config.model.precision])
        self.setup(config, world)

    def get_module(self, name):
        return self.components.get(name)

    def release_text_encoders(self):
        self.components.pop("text_encoder", None)

    def encode(self, prompts):
        return [{"text": self.get_module("text_encoder")(prompt.text)} for prompt in prompts]

    def network_output(self, sample, level, conditioning):
        inputs = sample, level.timestep / 1000, conditioning["text"]
        return self.network(*(part.to(sample.device, self.dtype) for part in inputs)).float()

    def generate(self, conditioning, initial, walk):
        with self.forward_context(conditioning):
            latents, trajectory = rollout(
                lambda z, level: self.predict(z, level, conditioning), initial.to(self.world.device), walk
            )
        return self.drawn(latents, trajectory)

    def pixels(self, latents):
        return self.get_module("vae")(latents.float()).unsqueeze(2)
