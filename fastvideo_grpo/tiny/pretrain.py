"""Pretraining of the demo's tiny FLUX on pictures of coloured shapes, with captions wrong on purpose.

The autoencoder first, then transformer and text encoders together by flow matching: on the path
x_t = (1 - t) x + t noise the transformer learns the velocity noise - x. The text goes in as the pipelines send it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastvideo_grpo.tiny import flux
from fastvideo_grpo.tiny.fitting import Teller, fit, teller
from fastvideo_grpo.tiny.shapes import PROMPTS, dataset
from fastvideo_grpo.tiny.tokenizer_files import CLIP_LENGTH, write_clip_tokenizer, write_t5_tokenizer

TEXT_LENGTH = 16  # T5 tokens; 512 in FLUX.1-dev, where text would be most of a tiny picture's cost
GUIDANCE = (1.0, 5.0)  # drawn from this range and meaning nothing, so that any guidance scale gives the same pictures


def pretrain_flux(folder: str | Path, *, seed: int = 0, caption_noise: float = 0.4, pictures: int = 6000,
                  autoencoder_steps: int = 600, transformer_steps: int = 1500, overwrite: bool = False,
                  progress: Callable[[str], None] = print) -> Path:
    """Train the "demo" preset of `flux.write_flux` from nothing, write it to `folder` in float16, return the path.

    caption_noise: the fraction of captions that name another colour than the picture shows, 0 to 1; it is what
    GRPO has to put right. pictures: how many are drawn. progress: called with a line of text now and then.
    With the defaults it takes about five minutes on one CPU core. On one machine with one thread the same seed gives
    the same bytes.

    Raises FileExistsError as `flux.write_flux` does, before any work, and ValueError for a caption_noise out of range.
    """
    flux.prepare(folder, overwrite=overwrite)
    images, captions = dataset(pictures, caption_noise=caption_noise, seed=seed)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    caption = torch.from_numpy(captions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: dict[str, Any] = flux.build("demo")
        tell = teller(progress)
        _train_autoencoder(modules["vae"], x, autoencoder_steps, tell)
        with torch.no_grad():
            latents = torch.cat([modules["vae"].encode(part).latent_dist.mode() for part in x.split(256)])
        shift, scale = latents.mean().item(), 1 / latents.std().item()
        _train_transformer(modules, pack((latents - shift) * scale), caption, transformer_steps, tell)
        # The preset's config.json says what a published one says: here the factors are measured.
        vae_config = {"scaling_factor": round(scale, 4), "shift_factor": round(shift, 4)}
        return flux.write(folder, modules, preset="demo", dtype=torch.float16, vae_config=vae_config,
                          overwrite=overwrite)


def _train_autoencoder(vae: Any, x: torch.Tensor, steps: int, tell: Teller) -> None:
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


def _train_transformer(modules: dict[str, Any], x: torch.Tensor, caption: torch.Tensor, steps: int,
                       tell: Teller) -> None:
    """`x`: packed latents, float32 [N, tokens, channels], of unit size; `caption`: int64 [N], positions in PROMPTS.

    The modules end up with an exponential moving average of the weights.
    """
    clip_ids, t5_ids = prompt_ids()
    # CLIP is causal and read at its end token: what comes after cannot matter, and would be most of its cost.
    clip_ids = clip_ids[:, :int(clip_ids.argmax(dim=1).max()) + 1]
    image_ids, text_ids = position_ids(x.shape[1])

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(x), (64, ))
        noise = torch.randn(64, *x.shape[1:])
        t = torch.sigmoid(1.2 * torch.randn(64) + 0.3)
        text = modules["text_encoder_2"](t5_ids).last_hidden_state[caption[chosen]]
        pooled = modules["text_encoder"](clip_ids).pooler_output[caption[chosen]]
        velocity = modules["transformer"](
            hidden_states=torch.lerp(x[chosen], noise, t[:, None, None]), encoder_hidden_states=text,
            pooled_projections=pooled, timestep=t, guidance=torch.empty(64).uniform_(*GUIDANCE), img_ids=image_ids,
            txt_ids=text_ids, return_dict=False)[0]
        return F.mse_loss(velocity, noise - x[chosen])

    trained = [modules[name] for name in ("transformer", "text_encoder", "text_encoder_2")]
    fit("transformer and text encoders", (parameter for module in trained for parameter in module.parameters()), loss,
        steps, tell, weight_decay=1e-3, warm_up=0.1, average=True)


def prompt_ids() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of `PROMPTS` for CLIP, int64 [18, 77], and for T5, int64 [18, 16], padded as FLUX pipelines do."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_clip_tokenizer(Path(folder, "clip"))
        write_t5_tokenizer(Path(folder, "t5"))
        clip, t5 = (AutoTokenizer.from_pretrained(Path(folder, name)) for name in ("clip", "t5"))
    settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return (clip(list(PROMPTS), max_length=CLIP_LENGTH, **settings).input_ids,
            t5(list(PROMPTS), max_length=TEXT_LENGTH, **settings).input_ids)


def position_ids(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions as FLUX takes them, float32 [tokens, 3] for a square picture (0, row, column) and [16, 3] for text."""
    side = int(tokens**0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return (torch.stack([torch.zeros(tokens), rows.flatten(), columns.flatten()], dim=1).float(),
            torch.zeros(TEXT_LENGTH, 3))


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, H/2 * W/2, 4 C]: each token is a patch of 2x2 latents, as FLUX packs them."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, 4 * channels)
