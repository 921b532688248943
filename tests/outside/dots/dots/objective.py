import torch


class Reinforce:
    """``-A rho``: the policy gradient, unclipped."""

    needs_reference = needs_reward_gradients = pairs = False
    defaults = {"sample": {"init_noise": "per_sample"}, "grpo": {"updates_per_iteration": 2}}  # noqa: RUF012

    def __init__(self, *, strength=1.0):
        self.strength = strength

    def loss(self, replay, samples, i):
        ratio = torch.exp(replay.step(i).log_prob - samples.log_probs[:, i])
        return -self.strength * samples.advantages * ratio, {"ratio": ratio.detach()}
