"""Dots: a network of two layers, which is no FastVideo pipeline. The folder could as well be fastvideo_grpo/models/dots."""
