"""Samples that are not finite: what they are called and counted as, since when a run has them, and how to go back."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fastvideo_grpo.checkpoints.store import CheckpointError, CheckpointStore
from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models.registry import FAMILIES

SAMPLING = "sampling: latents or log-probs are not finite"
DECODING = "decoding: the VAE gave values that are not finite"
FAULTS = (SAMPLING, DECODING)


def metric(fault: str) -> str:
    """``sampling/not_finite``, ``decoding/not_finite``: samples of an iteration."""
    return f"{fault.partition(':')[0]}/not_finite"


def fault_metrics(faults: Mapping[str, Tensor]) -> dict[str, int]:
    """The metrics of each fault's samples (bool ``[P, G]``)."""
    return {metric(fault): int(rows.sum()) for fault, rows in faults.items()}


def since(lines: Sequence[dict[str, Any]], iteration: int) -> int:
    """The first iteration (from 0) of those without a gap before ``iteration``, which has them, in which sampling gave values
    that are not finite, by the lines of metrics.jsonl."""
    counts = {line["iteration"]: line.get(metric(SAMPLING)) for line in lines}
    first = iteration
    while counts.get(first - 1):
        first -= 1
    return first


def newest_sound(store: CheckpointStore, lines: Sequence[dict[str, Any]], before: int) -> int | None:
    """The newest whole checkpoint below ``before`` whose weights drew finite samples only, by the lines of metrics.jsonl; all
    ranks call it with the same lines.

    (The checkpoint after N iterations has the weights that iteration N, counted from 0, was drawn with.)
    """
    clean = {line["iteration"] for line in lines if line.get(metric(SAMPLING)) == 0}
    for number in reversed(store.world.broadcast_object(store.iterations())):
        if number < before and number in clean:
            try:
                store.at(number)
            except CheckpointError:
                continue
            return int(number)
    return None


@dataclass(frozen=True)
class Blame:
    """What spoiled an iteration's samples, and where a run can go back to: what its last message says of it.

    Attributes:
        iteration: the iteration, from 0.
        sampling, decoding: samples that were not finite there.
        rewards: samples that a reward alone had no score for, by its name; ``reasons``: why, as rewards said.
        since: see :func:`since`; ``sound``: see :func:`newest_sound`.
        saved: whether what was trained before is saved.
    """

    iteration: int
    sampling: int
    decoding: int
    rewards: dict[str, int]
    reasons: Sequence[str]
    since: int
    sound: int | None
    saved: bool

    def counts(self) -> str:
        """Samples by what spoiled them."""
        by_reward = {f"reward {name}": count for name, count in self.rewards.items()}
        every = {SAMPLING: self.sampling, DECODING: self.decoding, **by_reward}
        return "; ".join(f"{what} ({count})" for what, count in every.items() if count) or "no reason given"

    def advice(self, config: Config) -> str:
        """What to do, sentence by sentence."""
        sentences = []
        if self.sampling:
            sentences += self._of_sampling(config)
        if self.decoding:
            sentences.append(_of_decoding(config))
        if self.rewards:
            sentences.append(f"The rewards said: {'; '.join(self.reasons) or 'no reason'}. Repair the reward")
        if self.saved and (self.decoding or self.rewards):  # of weights that draw NaN it would be no comfort
            again = " and start the same command again" if self.rewards and not self.sampling and not self.decoding else ""
            sentences[-1] += again
            sentences.append("What was trained before is saved")
        return ". ".join(sentences)

    def _of_sampling(self, config: Config) -> list[str]:
        model = config.model
        if self.since == 0:
            where = f"{model.path}/{FAMILIES[model.kind].denoiser}"
            precise = f", or set model.precision=fp32 (it is {model.precision})" if model.precision != "fp32" else ""
            return [
                f"The network has given NaN or infinity from the first iteration on, with the weights of {where}: no "
                f"checkpoint of this run is sound. See that these weights are whole{precise}"
            ]
        told = f"The network gives NaN or infinity since iteration {self.since + 1}"
        lower = f"a lower optim.lr (it is {config.optim.lr:g}) and another run.dir"
        if self.sound is None:
            return [told, f"No checkpoint is left from before: start anew from model.path={model.path} with {lower}"]
        folder = Path(config.run.dir) / "checkpoints" / f"{self.sound:06d}"
        merge = " --merge-lora" if model.lora is not None else ""
        export = (
            f"fastvideo-grpo export {shlex.quote(str(config.run.dir))} --iteration {self.sound} --pipeline{merge} --out DIR"
        )
        return [
            told,
            f"The newest sound checkpoint is {folder}, whose samples were all finite: to go on from it, {export}, and train "
            f"with model.path=DIR, {lower}",
        ]


def _of_decoding(config: Config) -> str:
    precision = config.model.vae_precision
    if precision != "fp32":
        return f"The VAE overflows in model.vae_precision={precision}: set model.vae_precision=fp32, with another run.dir"
    return f"See that the weights in {config.model.path}/vae are whole"


def check_weights(modules: Mapping[str, nn.Module], checkpoint: Path, world: World) -> None:
    """Refuse weights with NaN or infinity (a damaged file, or more than the precision they were loaded in holds). Attention
    kernels may hide it: the forward pass looks sound, and no update is made. All ranks call it.

    Args:
        modules: by the name of their component.

    Raises:
        UserError: naming the first such tensor.
    """
    found = [told for name, module in modules.items() if (told := _first_not_finite(name, module)) is not None]
    everywhere = [told for rank in world.all_gather_object(found) for told in rank]
    if everywhere:
        raise UserError(
            f"{checkpoint}/{everywhere[0]} that are not finite: sampling and decoding would give NaN from the first iteration "
            "on, and there would be no sound checkpoint to go back to. Download or convert it again"
        )


def _first_not_finite(component: str, module: nn.Module) -> str | None:
    for name, parameter in module.named_parameters():
        piece = _held(parameter)
        if not bool(piece.isfinite().all()):
            return f"{component}: the tensor {name} ({str(piece.dtype).removeprefix('torch.')} here) holds values"
    return None


def _held(parameter: nn.Parameter) -> Tensor:
    """What this process has of a parameter: all of it, or with ZeRO-3 its part."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach()
    # The parts are equally long; what the last ones have behind the parameter's end was never written to.
    begin = dist.get_rank(parameter.ds_process_group) * len(part)
    return part.detach()[: max(0, parameter.ds_numel - begin)]
