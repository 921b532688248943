"""Tiny checkpoints in the published form: what those of several models share, and those of reward models."""
