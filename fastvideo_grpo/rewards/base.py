"""What a reward is asked and what it answers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch

MediaKind = Literal["image", "video", "any"]


@dataclass
class RewardRequest:
    """Samples to be scored.

    What a reward is given is its own, a copy for each attempt: it may work in place on the media and change the lists and the
    metadata, and it may keep them. Neither other rewards, nor a second attempt, nor the saved pictures see what it did to them.

    Args:
        prompts: B strings, the prompt each sample was drawn for.
        media: uint8 ``[B, F, H, W, 3]``, RGB in 0..255; an image has F = 1.
        fps: frames per second of a video, None for images or where it is not known.
        metadata: B dicts, what else the prompt file says about each prompt; empty dicts when left out.

    Raises:
        ValueError: the shapes, the dtype or the lengths disagree.
    """

    prompts: list[str]
    media: torch.Tensor
    fps: float | None = None
    metadata: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        media = self.media
        if media.dtype != torch.uint8 or media.ndim != 5 or media.shape[-1] != 3:
            raise ValueError(
                f"RewardRequest.media is {media.dtype} {list(media.shape)}; it must be uint8 [batch, frames, height, width, 3]"
            )
        if len(self.prompts) != len(media):
            raise ValueError(
                f"RewardRequest has {len(self.prompts)} prompts for {len(media)} samples; "
                "give one prompt a sample, repeated within a group"
            )
        if not self.metadata:
            self.metadata = [{} for _ in self.prompts]
        if len(self.metadata) != len(self.prompts):
            raise ValueError(
                f"RewardRequest has {len(self.metadata)} metadata entries for {len(self.prompts)} "
                "samples; give one dict a sample, or none at all"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def copy(self) -> RewardRequest:
        """The same request, of which nothing is shared; samples of one prompt, whose metadata may be one dict, get one each."""
        media = self.media.detach().clone(memory_format=torch.contiguous_format)
        return RewardRequest(list(self.prompts), media, self.fps, [copy.deepcopy(entry) for entry in self.metadata])


@dataclass
class RewardResult:
    """Scores of one reward.

    Args:
        scores: for each of the reward's outputs float32 ``[B]``; larger is better.
        valid: bool ``[B]``; False where the reward could not judge the sample. The score there is not used, so a reward
            never has to make one up.
        invalid_because: why samples are marked invalid, for the log; the same words each time, so that they can be counted.
    """

    scores: dict[str, torch.Tensor]
    valid: torch.Tensor
    invalid_because: str = "marked invalid by the reward"


@runtime_checkable
class Reward(Protocol):
    """A reward model. It may raise what it likes, SystemExit too: ``RewardSet`` then masks its samples and says which reward
    failed and why.

    Attributes:
        outputs: names of its scores.
        media_kind: what it can look at, images (one frame), videos, or any of the two.
    """

    outputs: tuple[str, ...]
    media_kind: MediaKind

    def score(self, request: RewardRequest) -> RewardResult:
        """Score the samples of ``request``; every output has float32 ``[B]``, in the order of the request."""
        ...

    def to(self, device: torch.device | str) -> Reward:
        """Move the weights, if there are any, and return self."""
        ...

    def close(self) -> None:
        """Let go of weights, processes and connections."""
        ...


@runtime_checkable
class DifferentiableReward(Protocol):
    """What a reward has beside ``Reward`` if an objective may follow its gradient back to the pixels (ReFL, Xu et al.,
    arXiv 2304.05977)."""

    def score_differentiably(
        self, pixels: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """Score media that are no bytes yet; on media rounded to bytes, what ``score`` gives, to about the rounding.

        A sample's score depends on its own pixels alone. The reward's weights take no gradients. An autocast, no_grad or
        inference_mode of its ``score`` may not be around this.

        Args:
            pixels: float ``[B, F, H, W, 3]``, RGB in 0..1, with gradients; on the device that the reward was moved to.
            prompts, metadata: B each, as in :class:`RewardRequest`. All three are the reward's own.

        Returns:
            for each of the reward's outputs floating ``[B]``, differentiable in ``pixels``; NaN where a sample cannot be
            judged, as a constant, since a gradient of NaN would spoil the whole batch.
        """
        ...
