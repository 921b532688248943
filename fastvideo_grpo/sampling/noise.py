"""All randomness of a run, as a function of what it is for.

A draw is keyed by (seed, iteration, group index, prompt id, member, step) and made on the CPU in float32, so no number
depends on the world size, the micro-batch or the device, and resuming needs no generator state.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of ``key``: equal keys give equal draws, different keys unrelated ones."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


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

    def generator(self, purpose: str, *, shared: bool = False) -> torch.Generator:
        """The generator for one purpose of this sample, or (``shared``) of its whole group."""
        member = "group" if shared else self.member
        return generator(self.stream, self.seed, self.iteration, self.group, self.prompt_id, member, purpose)


def initial_noise(keys: list[SampleKey], shape: tuple[int, ...], *, shared: bool) -> Tensor:
    """Float32 ``[B, *shape]`` on the CPU; ``shared``: one draw per group (Algorithm 1), else one per sample."""
    return torch.stack([torch.randn(shape, generator=key.generator("initial", shared=shared)) for key in keys])


def step_noise(keys: list[SampleKey], shape: tuple[int, ...], step: int) -> Tensor:
    """The SDE noise of transition ``step``: float32 ``[B, *shape]`` on the CPU, one draw per sample."""
    return torch.stack([torch.randn(shape, generator=key.generator(f"step {step}")) for key in keys])
