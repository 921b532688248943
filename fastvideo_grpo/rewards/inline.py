"""A reward in the training process, with a time limit."""

from __future__ import annotations

from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fastvideo_grpo.residency import resident
from fastvideo_grpo.rewards.base import DifferentiableReward, MediaKind, Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.threads import SerialThread


class InlineReward:
    """``reward`` in a thread of its own, so that a request that hangs costs its time limit and not the run.

    A thread cannot be killed: until the request that hangs comes back, later ones wait for it, up to the limit, and fail.
    A reward that hangs for good belongs into a process.

    Args:
        timeout_s: seconds for a request.
        device: where it scores.
        offload_idle: whether it waits in host memory between requests.
    """

    def __init__(
        self, reward: Reward, *, timeout_s: float = 600.0, device: torch.device | str = "cpu", offload_idle: bool = False
    ) -> None:
        self.reward, self.timeout_s = reward, timeout_s
        self.device, self.offload_idle = torch.device(device), offload_idle
        self.outputs: tuple[str, ...] = reward.outputs
        self.media_kind: MediaKind = reward.media_kind
        if not offload_idle:
            reward.to(self.device)
        self._thread = SerialThread("reward", self._begin)

    def score(self, request: RewardRequest) -> RewardResult:
        """Raises TimeoutError, and what the reward raises."""
        answer = self._thread.submit(lambda: self._score(request))
        try:
            return answer.result(self.timeout_s)
        except FutureTimeout:
            if answer.done():  # in time after all, or the reward's own TimeoutError
                return answer.result()
            answer.cancel()  # if it has not begun, it need not
            raise TimeoutError(f"no answer within {self.timeout_s:g} s") from None

    def _begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread begins with the first one

    def _score(self, request: RewardRequest) -> RewardResult:
        with torch.no_grad(), self._resident():
            return self.reward.score(request)

    def _resident(self) -> AbstractContextManager[None]:
        return resident(self.reward, self.device) if self.offload_idle else nullcontext()

    def score_differentiably(
        self, pixels: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """See `DifferentiableReward`; the scores are on the device of `pixels`, wherever the reward is.

        It runs in the calling thread, without a time limit: no request may be under way in the reward's own thread. Raises
        TypeError if the reward has no gradients, ValueError with `offload_idle` (the weights would be gone before the backward
        pass), and what the reward raises.
        """
        reward = self.reward
        if not isinstance(reward, DifferentiableReward):
            raise TypeError(f"{type(reward).__name__} has no score_differentiably")
        if self.offload_idle:
            raise ValueError("engine.offload_idle is true, and a reward that left the device has no backward pass: use false")
        scores = reward.score_differentiably(pixels.to(self.device), prompts, metadata)
        # What is no tensor is told of by who asked.
        return {name: score.to(pixels.device) if isinstance(score, torch.Tensor) else score for name, score in scores.items()}

    def to(self, device: torch.device | str) -> InlineReward:
        self.reward.to(device)
        return self

    def close(self) -> None:
        self._thread.close()
        self.reward.close()
