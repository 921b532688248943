"""Pretraining of the demo's tiny FLUX on pictures of coloured shapes, with captions wrong on purpose.

The autoencoder first, then transformer and text encoders together by flow matching: on the path
x_t = (1 - t) x + t noise the transformer learns the velocity noise - x. The text goes in as the pipelines send it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastvideo_grpo.tiny.fitting import Teller, fit, teller
from fastvideo_grpo.tiny.pretrain_pictures import clip_ids, draw_pictures, encode, train_autoencoder
from fastvideo_grpo.tiny.shapes import PROMPTS
from fastvideo_grpo.tiny.tokenizer_files import write_t5_tokenizer

from . import tiny as flux

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
    x, caption = draw_pictures(pictures, caption_noise=caption_noise, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: dict[str, Any] = flux.build("demo")
        tell = teller(progress)
        train_autoencoder(modules["vae"], x, autoencoder_steps, tell)
        latents = encode(modules["vae"], x)
        shift, scale = latents.mean().item(), 1 / latents.std().item()
        _train_transformer(modules, pack((latents - shift) * scale), caption, transformer_steps, tell)
        # The preset's config.json says what a published one says: here the factors are measured.
        vae_config = {"scaling_factor": round(scale, 4), "shift_factor": round(shift, 4)}
        return flux.write(folder, modules, preset="demo", dtype=torch.float16, vae_config=vae_config,
                          overwrite=overwrite)


def _train_transformer(modules: dict[str, Any], x: torch.Tensor, caption: torch.Tensor, steps: int,
                       tell: Teller) -> None:
    """`x`: packed latents, float32 [N, tokens, channels], of unit size; `caption`: int64 [N], positions in PROMPTS.

    The modules end up with an exponential moving average of the weights.
    """
    clip, t5 = clip_ids(PROMPTS), t5_ids(PROMPTS)
    # CLIP is causal and read at its end token: what comes after cannot matter, and would be most of its cost.
    clip = clip[:, :int(clip.argmax(dim=1).max()) + 1]
    image_ids, text_ids = position_ids(x.shape[1])

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(x), (64, ))
        noise = torch.randn(64, *x.shape[1:])
        t = torch.sigmoid(1.2 * torch.randn(64) + 0.3)
        text = modules["text_encoder_2"](t5).last_hidden_state[caption[chosen]]
        pooled = modules["text_encoder"](clip).pooler_output[caption[chosen]]
        velocity = modules["transformer"](
            hidden_states=torch.lerp(x[chosen], noise, t[:, None, None]), encoder_hidden_states=text,
            pooled_projections=pooled, timestep=t, guidance=torch.empty(64).uniform_(*GUIDANCE), img_ids=image_ids,
            txt_ids=text_ids, return_dict=False)[0]
        return F.mse_loss(velocity, noise - x[chosen])

    trained = [modules[name] for name in ("transformer", "text_encoder", "text_encoder_2")]
    fit("transformer and text encoders", (parameter for module in trained for parameter in module.parameters()), loss,
        steps, tell, weight_decay=1e-3, warm_up=0.1, average=True)


def t5_ids(prompts: Sequence[str]) -> torch.Tensor:
    """Token ids for T5, int64 [prompts, 16], padded as FLUX pipelines do."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_t5_tokenizer(Path(folder, "t5"))
        t5 = AutoTokenizer.from_pretrained(Path(folder, "t5"))
    return t5(list(prompts), max_length=TEXT_LENGTH, padding="max_length", truncation=True, return_tensors="pt").input_ids


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
