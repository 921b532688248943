"""What is measured on the pictures themselves, all in pixel space (no network judges them)."""

from __future__ import annotations

import torch
from torch import Tensor

SATURATION = 70
"""A pixel belongs to the coloured shape when its channels differ by more than this (of 255), as in colour_match."""


def diversity(media: Tensor, samples: int) -> float:
    """Mean pairwise distance of pictures of the same prompt from different noise, the paper's Figure 7 as a number.

    The distance of two pictures is the root mean square difference of their pixels, in [0, 1].

    Args:
        media: uint8 ``[prompts x samples, F, H, W, 3]``, prompt by prompt.
    """
    return _pairwise(media.float() / 255, samples, lambda difference: difference.square().mean(-1).sqrt())


def shape_diversity(media: Tensor, samples: int) -> float:
    """The same of the coloured areas alone: the fraction of pixels that one picture colours and the other does not.

    It does not see which colour: a reward that asks for one colour makes pictures alike in colour by its own nature.
    """
    coloured = media.amax(-1).int() - media.amin(-1).int() > SATURATION
    return _pairwise(coloured.float(), samples, lambda difference: difference.abs().mean(-1))


def _pairwise(pictures: Tensor, samples: int, distance) -> float:
    groups = pictures.flatten(1).view(-1, samples, pictures[0].numel())
    first, second = torch.triu_indices(samples, samples, offset=1)
    return distance(groups[:, first] - groups[:, second]).double().mean().item()


def roughness(media: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, in [0, 1]: what noise in the pictures raises.

    Args:
        media: uint8 ``[B, F, H, W, 3]``.
    """
    pictures = media.float() / 255
    across = (pictures[..., :, 1:, :] - pictures[..., :, :-1, :]).abs().mean()
    down = (pictures[..., 1:, :, :] - pictures[..., :-1, :, :]).abs().mean()
    return ((across + down) / 2).item()
