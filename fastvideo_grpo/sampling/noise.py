"""All randomness of a run, as a function of what it is for.

A draw is keyed by (seed, iteration, group index, prompt id, member, step) and made on the CPU in float32, so no number
depends on the world size, the micro-batch or the device, and resuming needs no generator state.

The generator is Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which takes a key of 128 bits.
torch's own CPU generator keeps 32 bits of a seed: of the two million draws of a real run, hundreds would share theirs with
another.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

VERSION = 2
"""Of the draws. A run that was saved under another one cannot go on: its noise would change midway. 1 was torch's generator,
seeded with 63 bits of a hash."""


def generator(*key: int | str) -> np.random.Generator:
    """A CPU generator keyed by a 128-bit hash of ``key``: equal keys give equal draws, different keys unrelated ones."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def normal(draws: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Float32 standard normal numbers of ``shape``, on the CPU."""
    return torch.from_numpy(draws.standard_normal(shape, dtype=np.float32))


@dataclass(frozen=True)
class SampleKey:
    """Which sample a draw belongs to: the ``member``-th sample of group ``group`` (of prompt ``prompt_id``) in ``iteration``.

    ``stream`` keeps draws for other purposes (evaluation, pictures) apart from those of training.
    """

    seed: int
    iteration: int
    group: int
    prompt_id: str
    member: int
    stream: str = "train"

    def generator(self, purpose: str, *, shared: bool = False) -> np.random.Generator:
        """The generator for one purpose of this sample, or (``shared``) of its whole group."""
        member = "group" if shared else self.member
        return generator(self.stream, self.seed, self.iteration, self.group, self.prompt_id, member, purpose)


def initial_noise(keys: list[SampleKey], shape: tuple[int, ...], *, shared: bool) -> Tensor:
    """Float32 ``[B, *shape]`` on the CPU; ``shared``: one draw per group (Algorithm 1), else one per sample."""
    return torch.stack([normal(key.generator("initial", shared=shared), shape) for key in keys])


def step_noise(keys: list[SampleKey], shape: tuple[int, ...], step: int) -> Tensor:
    """The SDE noise of transition ``step``: float32 ``[B, *shape]`` on the CPU, one draw per sample."""
    return torch.stack([normal(key.generator(f"step {step}"), shape) for key in keys])


def forward_noise(keys: list[SampleKey], shape: tuple[int, ...], i: int, *, shared: bool) -> Tensor:
    """The noise of the ``i``-th noised copy of each clean sample: float32 ``[B, *shape]`` on the CPU; ``shared``: one draw for
    a group, so that its samples are compared under the same noise."""
    return torch.stack([normal(key.generator(f"noised {i}", shared=shared), shape) for key in keys])
