"""The model's components: a network of two layers, a decoder of one, and a table of letters."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

CONFIGS = {
    "mixer": {"_class_name": "DotsNetwork", "in_channels": 3, "width": 16, "text_width": 8},
    "vae": {"_class_name": "DotsDecoder", "block_out_channels": [3, 3]},
    "text_encoder": {"_class_name": "Letters", "hidden_size": 8},
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


class DotsNetwork(nn.Module):
    """The velocity at each latent, from the latent, the time and the text."""

    def __init__(self, in_channels, width, text_width):
        super().__init__()
        self.inner = nn.Linear(in_channels + text_width + 1, width)
        self.outer = nn.Linear(width, in_channels)

    def forward(self, sample, time, text):
        """Sample [B, C, H, W], time [B] from 1 to 0, text [B, text_width] -> [B, C, H, W]."""
        sample = sample.movedim(1, -1)
        context = torch.cat([text, time[:, None]], 1)[:, None, None].expand(*sample.shape[:-1], -1)
        return self.outer(torch.tanh(self.inner(torch.cat([sample, context], -1)))).movedim(-1, 1)


class DotsDecoder(nn.Module):
    """A latent -> 2 x 2 pixels."""

    def __init__(self, block_out_channels):
        super().__init__()
        self.proj = nn.Conv2d(block_out_channels[0], 12, 1)

    def forward(self, latents):
        """[B, C, H, W] -> [B, 3, 2 H, 2 W] in 0..1."""
        return torch.sigmoid(nn.functional.pixel_shuffle(self.proj(latents), 2))


class Letters(nn.Module):
    """The mean of a text's letters."""

    def __init__(self, hidden_size):
        super().__init__()
        self.table = nn.Embedding(256, hidden_size)

    def forward(self, text):
        return self.table(torch.tensor(list(text.encode()))).mean(0, keepdim=True)


CLASSES = {"mixer": DotsNetwork, "vae": DotsDecoder, "text_encoder": Letters}


def make(component, config):
    return CLASSES[component](**{key: value for key, value in config.items() if key != "_class_name"})


def load(folder, component):
    module = make(component, json.loads((Path(folder) / component / "config.json").read_text()))
    module.load_state_dict(load_file(Path(folder) / component / WEIGHTS))
    return module.requires_grad_(False).eval()
