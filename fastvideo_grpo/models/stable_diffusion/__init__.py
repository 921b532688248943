"""Stable Diffusion."""
