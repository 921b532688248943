"""A package of somebody else's, which adds a model, a reward, a transition and an objective to fastvideo_grpo."""
