"""Pretraining of a tiny Stable Diffusion on pictures of coloured shapes, with captions wrong on purpose.

The autoencoder first, then UNet and text encoder together on Stable Diffusion's own noise: from
z_t = alpha_t x + sigma_t noise the UNet predicts the noise, or v = alpha_t noise - sigma_t x.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastvideo_grpo.tiny.fitting import Teller, fit, teller
from fastvideo_grpo.tiny.latents import shift_latents
from fastvideo_grpo.tiny.pretrain_pictures import clip_ids, draw_pictures, encode, train_autoencoder
from fastvideo_grpo.tiny.shapes import PROMPTS

from . import tiny as stable_diffusion
from .tiny import PredictionType

BATCH = 32
EMPTY = 0.15  # of the captions are empty: what classifier-free guidance guides away from


def pretrain_stable_diffusion(
    folder: str | Path,
    *,
    seed: int = 0,
    prediction_type: PredictionType = "epsilon",
    caption_noise: float = 0.55,
    pictures: int = 6000,
    autoencoder_steps: int = 600,
    unet_steps: int = 2000,
    overwrite: bool = False,
    progress: Callable[[str], None] = print,
) -> Path:
    """Train the "demo" preset of `stable_diffusion.write_stable_diffusion` from nothing, write it to `folder` in float16,
    return the path.

    caption_noise: the fraction of captions that name another colour than the picture shows, 0 to 1; it is what GRPO has to
    put right. Guidance makes a large majority of a small one: with the 0.4 of `pretrain_flux` it would leave little to put
    right. pictures: how many are drawn. progress: called with a line of text now and then. With the defaults it takes about
    seven minutes on one CPU core. On one machine with one thread the same seed gives the same bytes.

    Raises ValueError and FileExistsError as `stable_diffusion.write_stable_diffusion` does, before any work, and ValueError
    for a caption_noise out of range.
    """
    stable_diffusion.prepare(folder, prediction_type=prediction_type, overwrite=overwrite)
    x, caption = draw_pictures(pictures, caption_noise=caption_noise, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: dict[str, Any] = stable_diffusion.build("demo")
        tell = teller(progress)
        with torch.random.fork_rng(devices=[]):  # what the UNet draws is not to depend on the autoencoder's steps
            train_autoencoder(modules["vae"], x, autoencoder_steps, tell)
        latents = encode(modules["vae"], x)
        # Stable Diffusion scales its latents but has no shift_factor to write: their mean is taken out here.
        mean = latents.mean(dim=(0, 2, 3))
        shift_latents(modules["vae"], mean)
        latents = latents - mean.view(1, -1, 1, 1)
        scale = 1 / latents.std().item()
        _train_unet(modules, latents * scale, caption, unet_steps, prediction_type, tell)
        return stable_diffusion.write(
            folder,
            modules,
            preset="demo",
            dtype=torch.float16,
            prediction_type=prediction_type,
            vae_config={"scaling_factor": round(scale, 4)},
            overwrite=overwrite,
        )


def _train_unet(
    modules: dict[str, Any],
    x: torch.Tensor,
    caption: torch.Tensor,
    steps: int,
    prediction_type: PredictionType,
    tell: Teller,
) -> None:
    """`x`: latents, float32 [N, C, H, W], of unit size; `caption`: int64 [N], positions in PROMPTS.

    The modules end up with an exponential moving average of the weights.
    """
    from diffusers import DDIMScheduler

    ids = clip_ids([*PROMPTS, ""])
    alphas_cumprod = DDIMScheduler.from_config(stable_diffusion.SCHEDULER).alphas_cumprod

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(x), (BATCH,))
        noise = torch.randn(BATCH, *x.shape[1:])
        t = torch.randint(len(alphas_cumprod), (BATCH,))
        empty = torch.rand(BATCH) < EMPTY
        text = modules["text_encoder"](ids).last_hidden_state[torch.where(empty, len(PROMPTS), caption[chosen])]
        alpha, sigma = (level.sqrt().view(-1, 1, 1, 1) for level in (alphas_cumprod[t], 1 - alphas_cumprod[t]))
        output = modules["unet"](alpha * x[chosen] + sigma * noise, t, text, return_dict=False)[0]
        if prediction_type == "v_prediction":
            return F.mse_loss(output, alpha * noise - sigma * x[chosen])
        # Where there is most noise, alpha is 0.07. The colour is decided there and is next to nothing in the noise's error:
        # without the weight it is not learned from the text at all in this many steps.
        return (F.mse_loss(output, noise, reduction="none") / alpha).mean()

    trained = [modules[name] for name in ("unet", "text_encoder")]
    fit("UNet and text encoder", (parameter for module in trained for parameter in module.parameters()), loss, steps, tell,
        weight_decay=1e-3, warm_up=0.1, average=True)  # fmt: skip
