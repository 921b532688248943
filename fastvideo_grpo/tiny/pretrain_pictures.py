"""What the pretrainings on pictures of shapes have in common: the pictures, the autoencoder, CLIP's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fastvideo_grpo.tiny.fitting import Teller, fit
from fastvideo_grpo.tiny.prompt_ids import padded_ids
from fastvideo_grpo.tiny.shapes import dataset
from fastvideo_grpo.tiny.tokenizer_files import CLIP_LENGTH, write_clip_tokenizer


def draw_pictures(count: int, *, caption_noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`shapes.dataset` as tensors: float32 [count, 3, 32, 32] in -1..1, and the captions' positions, int64 [count]."""
    images, captions = dataset(count, caption_noise=caption_noise, seed=seed)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(captions)


def train_autoencoder(vae: Any, x: torch.Tensor, steps: int, tell: Teller) -> None:
    """`x`: float32 [N, 3, H, W] in -1..1."""
    with torch.no_grad():  # weights that keep signals' size, in blocks close to the identity: a third fewer steps
        for name, parameter in vae.named_parameters():
            if name.endswith("weight") and parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter, nonlinearity="linear")
                parameter.mul_(0.2 if name.endswith("conv2.weight") else 1.0)

    def loss() -> torch.Tensor:
        batch = x[torch.randint(len(x), (16, ))]
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        return F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch) + 1e-6 * posterior.kl().mean()

    fit("autoencoder", vae.parameters(), loss, steps, tell, weight_decay=1e-2, warm_up=0.3, average=False)


@torch.no_grad()
def encode(vae: Any, x: torch.Tensor) -> torch.Tensor:
    """Pictures as for `train_autoencoder` -> the most likely latents, float32 [N, C, h, w], neither shifted nor scaled."""
    return torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(256)])


def clip_ids(prompts: Sequence[str]) -> torch.Tensor:
    """Token ids for CLIP, int64 [prompts, 77], padded as pipelines do."""
    return padded_ids(write_clip_tokenizer, prompts, CLIP_LENGTH)
