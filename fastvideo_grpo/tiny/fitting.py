"""The loop in which all the tiny models are trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

import torch

RATE = 3e-3  # the largest learning rate


class Teller(Protocol):
    """Passes on a line of text with the seconds since it was made."""

    def __call__(self, line: str) -> None: ...


def teller(progress: Callable[[str], None]) -> Teller:
    started = time.monotonic()
    return lambda line: progress(f"[{time.monotonic() - started:5.0f} s] {line}")


def fit(
    what: str,
    parameters: Iterable[torch.Tensor],
    loss: Callable[[], torch.Tensor],
    steps: int,
    tell: Teller,
    *,
    weight_decay: float,
    warm_up: float,
    average: bool,
) -> None:
    """Minimise `loss`, which draws a batch and returns its scalar, over `parameters` by `steps` steps of AdamW.

    warm_up: the fraction of the steps in which the learning rate rises to `RATE`; then it falls to 0 as a cosine.
    average: leave an exponential moving average of the weights behind instead of the last ones.
    """
    parameters = list(parameters)
    smooth = [parameter.detach().clone() for parameter in parameters] if average else []
    optimizer = torch.optim.AdamW(parameters, RATE, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=warm_up)
    recent = 0.0
    for step in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if average:
            decay = min(0.99, (step + 1) / (step + 20))
            with torch.no_grad():
                torch._foreach_lerp_(smooth, parameters, 1 - decay)
        recent += (value.item() - recent) * max(0.05, 1 / (step + 1))
        if step % 100 == 0 or step == steps - 1:
            tell(f"{what} {step + 1}/{steps}: loss {recent:.4f}")
    if average:
        with torch.no_grad():
            torch._foreach_copy_(parameters, smooth)
