"""How fast an iteration was: samples a second, operations of the network a second, and what share of the card's that is."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from fastvideo_grpo.planning.cards import Card, find_card
from fastvideo_grpo.planning.operations import Operations, count_operations
from fastvideo_grpo.tracking.statistics import FORWARD, TRAINED, Clock
from fastvideo_grpo.trainers.policy import Policy

logger = logging.getLogger(__name__)

_PHASES = ("rollout", "update")


@dataclass(frozen=True)
class Throughput:
    """Of rank 0's process, whose clock is logged.

    Attributes:
        samples: that an iteration draws, on all processes; ``processes``: how many there are.
        operations: of one pass of the network; None: they could not be counted.
        card, precision: what they run on, and in; None: not a card whose datasheet is known.
    """

    samples: int
    processes: int
    operations: Operations | None
    card: Card | None
    precision: str

    def metrics(self, clock: Clock) -> dict[str, float]:
        """``perf/*`` of an iteration whose phases ``clock`` has; evaluations and pictures are not of it."""
        seconds = sum(spent for phase, spent in clock.seconds.items() if phase != "evaluation")
        metrics = {
            "perf/seconds_per_sample": seconds / self.samples,
            "perf/samples_per_gpu_second": self.samples / self.processes / seconds,
        }
        if self.operations is None:
            return metrics
        for phase in _PHASES:
            once, made, spent = self.operations, clock.passes[phase], clock.seconds[phase]
            count = once.forward * (made[FORWARD] + made[TRAINED]) + once.backward * made[TRAINED]
            metrics[f"perf/{phase}_tflop"] = count / 1e12
            if phase == "update":
                metrics["perf/recomputed_tflop"] = once.recomputed * made[TRAINED] / 1e12
            if not spent:
                continue  # no sample counted
            metrics[f"perf/{phase}_tflop_per_second"] = count / 1e12 / spent
            if self.card is not None:
                metrics[f"perf/{phase}_mfu"] = count / spent / self.card.peak[self.precision]
                if self.precision in self.card.ceiling:
                    metrics[f"perf/{phase}_of_ceiling"] = count / spent / self.card.ceiling[self.precision]
        return metrics


def throughput(policy: Policy) -> Throughput:
    """Count the operations of a policy's network, on rank 0, whose metrics are logged: seconds, whatever its size.

    A model of another package whose pass cannot be made without weights has no ``perf/*_tflop``, and a warning says why.
    """
    config, world = policy.config, policy.world
    operations = None
    if world.rank == 0:
        try:
            operations = count_operations(type(policy), config, policy.facts)
        except Exception as error:
            logger.warning(
                "operations of %s cannot be counted (%s: %s): metrics have no perf/*_tflop",
                config.model.kind,
                type(error).__name__,
                str(error).partition("\n")[0],
            )
    card = find_card(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    samples = config.grpo.prompts_per_iteration * config.grpo.group_size
    return Throughput(samples, world.size, operations, card, config.model.precision)
