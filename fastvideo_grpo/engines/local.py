"""One process and torch's AdamW: the reference that the DeepSpeed engine must equal to rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastvideo_grpo.engines.base import MOMENTS, AdamWEngine, adamw
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.grpo.decay import Decay

if TYPE_CHECKING:
    from fastvideo_grpo.config.keys import OptimConfig


class LocalEngine(AdamWEngine):
    """One process. bf16 parameters have float32 masters: gradients of each backward are added to them in float32, and
    after a step they are rounded into the module, so that updates far below bf16's resolution still add up. A trainable
    parameter that no loss reached has gradient 0, as under ZeRO.

    Args:
        module: moved to `device`, its parameters (not its buffers) cast to `precision`. Trainable: those with
            requires_grad.
        optim: lr, betas, weight_decay, max_grad_norm (None or 0: no clipping), warmup_steps (linear), ema_decay (None:
            no EMA), ema_ramp.
        precision: "fp32" or "bf16".
        device: default: the module's.
        old: decay of the weights that follow the trained ones from one iteration to the next; None: there are none.
        average_device: where the averages of the weights lie.

    Raises:
        ValueError: a value is out of range, or nothing is trainable.
    """

    kind = "local"

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        *,
        precision: str = "fp32",
        device: str | torch.device | None = None,
        old: Decay | None = None,
        average_device: str | torch.device = "cpu",
    ) -> None:
        if device is None:
            device = next(module.parameters()).device
        super().__init__(module.to(device), optim, precision=precision, world=World(device=torch.device(device)))
        self.module = module
        self._masters = {
            name: parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in self._parameters.items()
        }
        self._adam = adamw(self._masters.values(), optim)
        self._start_averages(old, average_device)

    def span(self, name: str) -> tuple[int, int] | None:
        return 0, self._shapes[name].numel()

    def _piece(self, name: str, part: str) -> Tensor:
        master = self._masters[name]
        return (master if part == "weight" else self._adam.state[master][part]).detach().view(-1)

    def _adam_states(self) -> list[dict[str, Any]]:
        return [made_state(self._adam, master) for master in self._masters.values()]

    def _refresh_module(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not self._masters[name]:
                parameter.data.copy_(self._masters[name].data)

    def _fill_module(self, whole: Callable[[str], Tensor]) -> Callable[[], None]:
        kept = {name: parameter.detach().cpu().clone() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data.copy_(whole(name))

        def restore() -> None:
            for name, parameter in self._parameters.items():
                parameter.data.copy_(kept[name])

        return restore

    def _backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if parameter is master or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def _update(self) -> float:
        masters = list(self._masters.values())
        for master in masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        norm = clip_gradients(masters, self.optim.max_grad_norm)
        if math.isfinite(norm):
            for group in self._adam.param_groups:
                group["lr"] = self.lr
            self._adam.step()
            self._refresh_module()
        self._adam.zero_grad(set_to_none=True)
        return norm


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None) -> float:
    """Scale all gradients so that their joint L2 norm is at most `max_norm` (None or 0: leave them); returns the norm
    before.

    A norm that is not finite leaves the gradients as they are.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=False)
    value = float(norm)
    if max_norm and math.isfinite(value):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=False)
    return value


def made_state(adam: torch.optim.AdamW, parameter: Tensor) -> dict[str, Any]:
    """AdamW's state of one parameter, as its first step would make it."""
    state = adam.state[parameter]
    if not state:
        state["step"] = torch.tensor(0.0)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter)
    return state
