"""What is not finite: what samples are called and counted as, and weights that are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import UserError

SAMPLING = "sampling: latents or log-probs are not finite"
DECODING = "decoding: the VAE gave values that are not finite"
FAULTS = (SAMPLING, DECODING)


def metric(fault: str) -> str:
    """``sampling/not_finite``, ``decoding/not_finite``: samples of an iteration."""
    return f"{fault.partition(':')[0]}/not_finite"


def fault_metrics(faults: Mapping[str, Tensor]) -> dict[str, int]:
    """The metrics of each fault's samples (bool ``[P, G]``)."""
    return {metric(fault): int(rows.sum()) for fault, rows in faults.items()}


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
