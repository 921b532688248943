"""Moving an autoencoder's latents without changing what it makes of a picture."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def shift_latents(vae: Any, mean: torch.Tensor) -> None:
    """Subtract `mean`, float32 [C], from the latents that `vae` encodes to, and add it to those that it decodes.

    For autoencoders with 1x1 convolutions on both sides of the latents, quant_conv and post_quant_conv; of quant_conv's
    outputs the first half is the latents' mean, the second their log variance.
    """
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight.flatten(1) @ mean
