"""What an update asks of weights that are not the trained ones: computed once, before an iteration's first update.

The old weights (that drew the samples) and the moving average are put into the network once an iteration for it, never for a
micro-batch; an output is as large as a sample's latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastvideo_grpo.grpo.objectives import SampleBatch
from fastvideo_grpo.trainers.policy import Policy
from fastvideo_grpo.trainers.replay import AnyReplay

Outputs: TypeAlias = dict[tuple[int, int], dict[tuple[str, int], Tensor]]
"""``(update, micro-batch)`` -> ``(weights, i)`` -> the output at its rows' ``i``-th timesteps, on the CPU."""


def store_outputs(
    policy: Policy, updates: Sequence[int], replays: Callable[[int], Iterable[tuple[AnyReplay, SampleBatch]]]
) -> tuple[Outputs, float | None]:
    """The outputs of all micro-batches of an iteration that this process trains on, under each of ``policy.steps.stored``.

    Args:
        updates: their numbers.
        replays: of the micro-batches of an update; all ranks make as many.

    Returns:
        The outputs, and how far a fresh pass of the last micro-batch is from what was stored of it under the weights that drew
        its samples, exactly 0 where all is right; None where nothing is stored of them.
    """
    outputs: Outputs = {}
    deviation: float | None = None
    for weights in policy.steps.stored:
        last: tuple[AnyReplay, dict[tuple[str, int], Tensor]] | None = None
        with torch.no_grad(), policy.weights_of(weights):
            for update in updates:
                for k, (replay, _) in enumerate(replays(update)):
                    stored = outputs.setdefault((update, k), {})
                    for i in range(policy.steps.trained):
                        stored[weights, i] = _output(policy, replay, i)
                    last = replay, stored
            if weights == "old" and last is not None:
                replay, stored = last
                i = policy.steps.trained - 1
                deviation = float((_output(policy, replay, i) - stored[weights, i]).abs().max())
    return outputs, deviation


def stored_deviation(policy: Policy, deviation: float | None) -> dict[str, float]:
    """The metric ``train/stored_output_max_dev`` of all processes, where outputs are stored of the weights that drew; all ranks
    call it."""
    if "old" not in policy.steps.stored:
        return {}
    known = [value for value in policy.world.all_gather_object(deviation) if value is not None]
    return {"train/stored_output_max_dev": math.nan if any(map(math.isnan, known)) else max(known, default=0.0)}


def _output(policy: Policy, replay: AnyReplay, i: int) -> Tensor:
    with policy.pass_context(replay.conditioning):
        return replay.output(i).cpu()
