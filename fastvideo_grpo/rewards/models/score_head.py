"""From an embedding to a number: the head that LAION's aesthetic predictor and ImageReward share."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# Between them stands dropout, in training: the head is linear layers and nothing else.
_LAYERS = (0, 2, 4, 6, 7)
_NAMES = [f"layers.{layer}.{part}" for layer in _LAYERS for part in ("weight", "bias")]


def linear_head(weights: Mapping[str, torch.Tensor], width: int) -> torch.nn.Sequential:
    """The frozen head, float32, that takes embeddings of `width` numbers and gives one.

    weights: "layers.0.weight" to "layers.7.bias", five linear layers; or "weight" and "bias", one.
    Raises ValueError when they are anything else, or do not go from `width` to 1.
    """
    if set(weights) == {"weight", "bias"}:
        layers = [(weights["weight"], weights["bias"])]
    elif set(weights) == set(_NAMES):
        layers = [(weights[f"layers.{layer}.weight"], weights[f"layers.{layer}.bias"]) for layer in _LAYERS]
    else:
        found = ", ".join(sorted(weights)[:4]) or "none"
        raise ValueError(
            "expected the head's tensors layers.0, .2, .4, .6 and .7 (weight and bias), or weight and bias alone; "
            f"found {len(weights)}: {found}{', ...' if len(weights) > 4 else ''}"
        )
    head = torch.nn.Sequential()
    for weight, bias in layers:
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"a layer has the weight {list(weight.shape)} and the bias {list(bias.shape)}, but is given {width} numbers"
            )
        with torch.device("meta"):
            linear = torch.nn.Linear(width, len(weight))
        linear.load_state_dict({"weight": weight.float().clone(), "bias": bias.float().clone()}, assign=True)
        head.append(linear)
        width = len(weight)
    if width != 1:
        raise ValueError(f"the last layer gives {width} numbers; it must be one")
    return head.requires_grad_(False).eval()
