"""GRPO reinforcement learning for image and video generators, on FastVideo."""

__version__ = "0.1.0"
