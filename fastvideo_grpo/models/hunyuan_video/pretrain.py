"""Pretraining of the video demo's tiny HunyuanVideo on clips of moving shapes, with captions wrong on purpose.

The autoencoder first, then the transformer by flow matching: on the path x_t = (1 - t) x + t noise it learns the velocity
noise - x. The text encoders stay as they were drawn, as HunyuanVideo's stayed as they were published: random features
keep five words apart well enough, and reading the 95 tokens of the template at every step would cost more than the rest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastvideo_grpo.tiny.checkpoint_files import randomize
from fastvideo_grpo.tiny.fitting import Teller, fit, teller
from fastvideo_grpo.tiny.latents import shift_latents
from fastvideo_grpo.tiny.moving_shapes import PROMPTS, dataset
from fastvideo_grpo.tiny.shapes import SIZE

from . import tiny as hunyuan_video

GUIDANCE = (1.0, 8.0)  # drawn from this range and meaning nothing, so that any guidance scale gives the same clips
BATCH = 64
CROP = 24  # pixels a side


def pretrain_hunyuan_video(
    folder: str | Path,
    *,
    seed: int = 0,
    caption_noise: float = 0.4,
    clips: int = 3000,
    autoencoder_steps: int = 900,
    transformer_steps: int = 1500,
    overwrite: bool = False,
    progress: Callable[[str], None] = print,
) -> Path:
    """Train the "demo" preset of `hunyuan_video.write_hunyuan_video` from nothing, write it to `folder` in float16, return
    the path.

    caption_noise: the fraction of captions that name another direction than the clip shows, 0 to 1; it is what GRPO has to
    put right. clips: how many are drawn. progress: called with a line of text now and then. With the defaults it takes
    about nine minutes on one CPU core. On one machine with one thread the same seed gives the same bytes.

    Raises FileExistsError as `hunyuan_video.write_hunyuan_video` does, before any work, and ValueError for a caption_noise
    out of range.
    """
    hunyuan_video.prepare(folder, overwrite=overwrite)
    pixels, captions = dataset(clips, caption_noise=caption_noise, seed=seed)
    x, caption = torch.from_numpy(pixels), torch.from_numpy(captions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tell = teller(progress)
        modules: dict[str, Any] = hunyuan_video.build("demo")
        for number, name in enumerate(("text_encoder", "text_encoder_2")):
            randomize(modules[name], 1000 * seed + number)
        with torch.random.fork_rng(devices=[]):  # what the transformer draws is not to depend on the autoencoder's steps
            _train_autoencoder(modules["vae"], x, autoencoder_steps, tell)
        latents = _normalize_latents(modules["vae"], x)
        _train_transformer(modules["transformer"], latents, caption, *embeddings(modules), transformer_steps, tell)
        return hunyuan_video.write(folder, modules, preset="demo", dtype=torch.float16, overwrite=overwrite)


def _to_input(x: torch.Tensor) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] -> float32 [B, 3, F, H, W] in -1..1."""
    return x.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _train_autoencoder(vae: Any, x: torch.Tensor, steps: int, tell: Teller) -> None:
    """`x`: uint8 [N, F, H, W, 3]."""
    _pass_through(vae)
    small = 3 * steps // 4
    done = 0

    def loss() -> torch.Tensor:
        nonlocal done
        clips = x[torch.randint(len(x), (8,))]
        early = done < small
        done += 1
        if early:  # parts of the clips, which cost a third: most of what there is to learn is local
            row, column = torch.randint(SIZE - CROP + 1, (2,)).tolist()
            frame = 4 * int(torch.randint(2, ()))
            clips = clips[:, frame : frame + 5, row : row + CROP, column : column + CROP]
        batch = _to_input(clips)
        posterior = vae.encode(batch).latent_dist
        error = (vae.decode(posterior.sample()).sample - batch).square().mean(dim=1)
        # Shapes are a tenth of the pixels. Counted like the others they are not drawn at all for hundreds of steps.
        weight = 1 + (10 if early else 3) * ((batch.amax(dim=1) - batch.amin(dim=1)) > 0.5)
        return (weight * error).mean() + 1e-5 * posterior.kl().mean()

    fit("autoencoder", vae.parameters(), loss, steps, tell, weight_decay=1e-2, warm_up=0.2, average=False)


@torch.no_grad()
def _pass_through(vae: Any) -> None:
    """Initial weights with which colours pass through all layers: convolutions that are the identity and some noise, and
    little noise in the latents. From the libraries' own the training takes several times as long."""
    for name, weight in vae.named_parameters():
        if not name.endswith("weight") or weight.ndim != 5:
            continue
        torch.nn.init.kaiming_normal_(weight, nonlinearity="linear")
        if "conv1." in name or "conv2." in name:  # inside residual blocks, which pass on their input anyway
            weight.mul_(0.2 if "conv2." in name else 1.0)
            continue
        weight.mul_(0.3)
        centre = weight.shape[-1] // 2
        for channel in range(min(weight.shape[:2])):
            weight[channel, channel, -1, centre, centre] += 1  # causal in time: the last is the frame itself
    log_variance = slice(vae.config.latent_channels, None)
    vae.quant_conv.weight[log_variance] *= 0.1
    vae.quant_conv.bias[log_variance] = -6


@torch.no_grad()
def _normalize_latents(vae: Any, x: torch.Tensor) -> torch.Tensor:
    """Shift and scale the latents inside the autoencoder so that the published scaling factor gives them mean 0, channel by
    channel, and size 1 in all, and return them scaled by it, float32 [N, C, F, H, W]."""
    latents = torch.cat([vae.encode(_to_input(part)).latent_dist.mode() for part in x.split(64)])
    mean = latents.mean(dim=(0, 2, 3, 4))
    centred = latents - mean.view(1, -1, 1, 1, 1)
    # One factor for all: channels that say little stay small, and the transformer need not learn their noise.
    gain = 1 / (centred.std() * vae.config.scaling_factor)
    shift_latents(vae, mean)
    channels = len(mean)
    out = vae.quant_conv
    out.bias[:channels] *= gain
    out.weight[:channels] *= gain
    out.bias[channels:] += 2 * gain.log()
    vae.post_quant_conv.weight /= gain
    return centred * gain * vae.config.scaling_factor


def _train_transformer(
    transformer: Any,
    x: torch.Tensor,
    caption: torch.Tensor,
    text: torch.Tensor,
    pooled: torch.Tensor,
    steps: int,
    tell: Teller,
) -> None:
    """`x`: latents, float32 [N, C, F, H, W], of unit size; `caption`: int64 [N], positions in PROMPTS, of whose embeddings
    `text` and `pooled` are (see `embeddings`). The module ends up with an exponential moving average of the weights."""
    mask = torch.ones(BATCH, text.shape[1], dtype=torch.int64)

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(x), (BATCH,))
        noise = torch.randn(BATCH, *x.shape[1:])
        t = torch.sigmoid(1.2 * torch.randn(BATCH) + 0.5)
        velocity = transformer(
            hidden_states=torch.lerp(x[chosen], noise, t.view(-1, 1, 1, 1, 1)),
            timestep=1000 * t,
            encoder_hidden_states=text[caption[chosen]],
            encoder_attention_mask=mask,
            pooled_projections=pooled[caption[chosen]],
            guidance=1000 * torch.empty(BATCH).uniform_(*GUIDANCE),
            return_dict=False,
        )[0]
        return F.mse_loss(velocity, noise - x[chosen])

    fit("transformer", transformer.parameters(), loss, steps, tell, weight_decay=1e-3, warm_up=0.1, average=True)


@torch.no_grad()
def embeddings(modules: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """`PROMPTS` as HunyuanVideo pipelines encode them, float32: Llama's hidden states behind the template [32, 6, width],
    from before its last two layers, and CLIP's pooled ones [32, width]. All prompts have six tokens; there is no padding."""
    from transformers import AutoTokenizer

    prefix = hunyuan_video.prompt_template().split("{}")[0]
    with tempfile.TemporaryDirectory() as folder:
        for name, write in hunyuan_video.tokenizers().items():
            write(Path(folder, name))
        llama, clip = (AutoTokenizer.from_pretrained(Path(folder, name)) for name in ("tokenizer", "tokenizer_2"))
    ids = llama([hunyuan_video.prompt_template().format(prompt) for prompt in PROMPTS], return_tensors="pt").input_ids
    hidden = modules["text_encoder"](ids, output_hidden_states=True).hidden_states[-3]
    pooled = modules["text_encoder_2"](clip(list(PROMPTS), return_tensors="pt").input_ids).pooler_output
    return hidden[:, len(llama(prefix).input_ids) :], pooled
