from setuptools import setup

setup(
    name="dots",
    version="0.3",
    packages=["dots", "dots.model"],
    entry_points={
        "fastvideo_grpo.models": ["dots = dots.model.family:FAMILY"],
        "fastvideo_grpo.rewards": ["contrast = dots.reward:Contrast"],
        "fastvideo_grpo.transitions": ["fading_sde = dots.transition:FadingSDE"],
        "fastvideo_grpo.objectives": ["reinforce = dots.objective:Reinforce"],
    },
)
