from fastvideo_grpo.sampling.transitions import FlowSDE


class FadingSDE(FlowSDE):
    """The flow's SDE with noise that fades with sigma."""

    def noise_at(self, level, next_level):
        return self.noise_level * level.sigma.sqrt()
