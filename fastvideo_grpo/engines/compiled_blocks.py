"""Compiling the blocks of a network (``model.compile``), so that the ratio before the first optimiser step stays exactly 1.

torch compiles a graph without gradients otherwise than one with them, and the two round differently: the ratio of a rollout by
the first and an update by the second is off by 2e-3 (FLUX.1-dev in bf16 on an H200), twenty times the clip range. So what the
policy draws runs the graph of the update, gradients enabled and its outputs detached
(:meth:`~fastvideo_grpo.trainers.policy.Policy.predict`).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvideo_grpo.engines.process import no_news_of_toolkits
from fastvideo_grpo.errors import ConfigError

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
BACKEND = "inductor"  # torch's own
_GRAPHS_OF_A_FUNCTION = 64
"""Before torch gives up on it and runs it as it is written, which would round otherwise from there on. Its own default is 8;
the blocks of a UNet have more sizes than that."""


def check_compiler(device: torch.device) -> None:
    """Raise :class:`ConfigError` where what torch compiles with is not here."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("model.compile is blocks, but triton is not installed: pip install triton, or set compile=none")
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"model.compile is blocks, but there is no C++ compiler {compiler} here, with which torch compiles for a CPU: "
            "install one (Debian and Ubuntu: apt-get install g++), or set compile=none"
        )


def compile_blocks(network: nn.Module, found: dict[str, list[str]], *, dynamic: bool) -> None:
    """Let torch compile each block when it is first called; blocks of a class share their graphs.

    Args:
        found: class -> names of the blocks (:func:`~fastvideo_grpo.engines.activation_checkpointing.find_blocks`).
        dynamic: a graph is for any number of tokens, where texts differ in length. Else it is for one size, and another is
            compiled for another: which graph a micro-batch runs must not depend on what ran before.
    """
    with no_news_of_toolkits():
        import torch._dynamo
        import torch._inductor.config
        import torch.utils.cpp_extension

    os.environ[CACHE_VARIABLE] = str(cache_folder())
    torch._dynamo.config.recompile_limit = _GRAPHS_OF_A_FUNCTION
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for names in found.values():
        for name in names:
            network.get_submodule(name).compile(backend=BACKEND, dynamic=dynamic)


def cache_folder() -> Path:
    """Where compiled graphs are kept for the next start: what the user chose, or a folder that outlives /tmp, which torch
    writes into the variable when libraries import its compiler."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen and chosen != default_cache_dir():
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvideo_grpo" / "compiled"


@dataclass(frozen=True)
class Compilation:
    """A function that was compiled: its name, the seconds that took, and why, if it had been compiled before."""

    function: str
    seconds: float
    reason: str | None


class Compilations:
    """What torch compiles in this process from now on."""

    def __init__(self) -> None:
        self._seen: set[tuple[Any, ...]] = set()
        self.new()

    def new(self) -> list[Compilation]:
        """What was compiled since this was last asked."""
        from torch._dynamo.utils import get_compilation_metrics

        found = []
        for each in get_compilation_metrics():
            key = (each.compile_id, each.start_time_us)
            if key in self._seen or not each.co_name or each.is_forward is False:
                continue
            self._seen.add(key)
            # What torch goes on with behind something that it cannot compile has a name of its own.
            function = each.co_name.removeprefix("torch_dynamo_resume_in_").partition("_at_")[0]
            place = f"{function} of {Path(each.co_filename).name}" if each.co_filename else function
            found.append(Compilation(place, (each.duration_us or 0) / 1e6, each.recompile_reason))
        return found
