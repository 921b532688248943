"""What is set once in a process, before a model is loaded: threads, determinism, and what libraries need not say."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def no_news_of_toolkits() -> Iterator[None]:
    """Entered around the first import of ``torch.utils.cpp_extension``: that there is a CUDA toolkit without a GPU is no news,
    where nothing is compiled for one."""
    extension_logger = logging.getLogger("torch.utils.cpp_extension")
    level = extension_logger.level
    extension_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        extension_logger.setLevel(level)
