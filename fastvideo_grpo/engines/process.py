"""What is set once in a process, before a model is loaded: threads and determinism."""

from __future__ import annotations

import os

import torch

from fastvideo_grpo.config.keys import Config


def prepare_process(config: Config) -> None:
    """Set ``run.threads`` and ``run.deterministic``, before the model is loaded."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
