"""A reward in the training process, with a time limit."""

from __future__ import annotations

import copy
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch

from fastvideo_grpo.residency import resident
from fastvideo_grpo.rewards.base import DifferentiableReward, MediaKind, Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.placement.process_settings import process_settings_kept
from fastvideo_grpo.rewards.placement.threads import SerialThread

T = TypeVar("T")

CLOSE_TIMEOUT_S = 10.0
"""Seconds that ``close()`` of a reward may take, with the request that is under way."""


class InlineReward:
    """``reward`` in a thread of its own, so that a request that hangs costs its time limit and not the run.

    A thread cannot be killed: until the request that hangs comes back, later ones wait for it, up to the limit, and fail.
    A reward that hangs for good belongs into a process.

    The reward gets a copy of each request, and so no pictures that others see. What it raises comes back as an ``Exception``,
    whatever it was (:class:`~fastvideo_grpo.errors.Escape`). The working directory and torch's defaults, which belong to the
    whole process, are put back after it (:mod:`~fastvideo_grpo.rewards.placement.process_settings`).

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
        self.outputs: tuple[str, ...] = tuple(reward.outputs)
        self.media_kind: MediaKind = reward.media_kind
        if not offload_idle:
            reward.to(self.device)
        self._thread = SerialThread("reward", self._begin)
        self._hangs: Future[Any] | None = None

    def score(self, request: RewardRequest) -> RewardResult:
        """Raises TimeoutError, and what the reward raises."""
        return self._wait(self._thread.submit(partial(self._score, request.copy())), self.timeout_s)

    def _wait(self, answer: Future[T], seconds: float) -> T:
        try:
            return answer.result(seconds)
        except FutureTimeout:
            if answer.done():  # in time after all, or the reward's own TimeoutError
                return answer.result()
            if not answer.cancel():  # if it has not begun, it need not
                self._hangs = answer
            raise TimeoutError(f"no answer within {seconds:g} s") from None
        finally:
            del answer  # an error leads to this frame: in a circle with it, its tensors would stay until they are collected

    def _begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread begins with the first one

    def _score(self, request: RewardRequest) -> RewardResult:
        with process_settings_kept(), torch.no_grad(), self._resident():
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
        with process_settings_kept():
            # Copies: what one reward does to them in place is not for the others to see, nor for the next update.
            own = pixels.to(self.device, copy=True), list(prompts), [copy.deepcopy(entry) for entry in metadata]
            scores = reward.score_differentiably(*own)
        # What is no tensor is told of by who asked.
        return {name: score.to(pixels.device) if isinstance(score, torch.Tensor) else score for name, score in scores.items()}

    def to(self, device: torch.device | str) -> InlineReward:
        self.reward.to(device)
        return self

    def close(self) -> None:
        """Close the reward in its thread, after what is asked of it; a second time nothing happens.

        Raises TimeoutError if it hangs (the thread ends with the program), and what the reward raises.
        """
        if self._thread.closed:
            return
        closed = self._thread.submit(self.reward.close)
        self._thread.close()
        hangs = self._hangs is not None and not self._hangs.done()
        self._wait(closed, 0.0 if hangs else CLOSE_TIMEOUT_S)
