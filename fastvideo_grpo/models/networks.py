"""Networks at their real size without weights: on the meta device, as diffusers and as FastVideo build them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from fastvideo_grpo.errors import UserError
from fastvideo_grpo.patching import require_patched


def diffusers_denoiser(config: dict[str, Any]) -> Any:
    """diffusers' network of a ``transformer/config.json`` or ``unet/config.json``, on the meta device.

    Raises:
        UserError: diffusers has no such class.
    """
    import diffusers

    cls = getattr(diffusers, config["_class_name"], None)
    if cls is None:
        raise UserError(
            f"diffusers has no {config['_class_name']}: it cannot be exported, and its family has to make it in a method "
            "`network` (docs/extending.md)"
        )
    with torch.device("meta"):
        return cls.from_config({key: value for key, value in config.items() if key != "_name_or_path"})


def fastvideo_transformer(
    pipeline_config: str, transformer_config: dict[str, Any], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """FastVideo's transformer of a ``transformer/config.json``, on the meta device.

    Args:
        pipeline_config: FastVideo's, as "module:class" (:attr:`~fastvideo_grpo.models.family.Family.fastvideo_config`).
        dtype: of its parameters.
    """
    require_patched()
    from fastvideo.models.registry import ModelRegistry

    dit_config = resolve_name(pipeline_config)().dit_config
    settings = {key: value for key, value in transformer_config.items() if key not in ("_class_name", "_name_or_path")}
    dit_config.update_model_arch(settings)
    cls, _ = ModelRegistry.resolve_model_cls(transformer_config["_class_name"])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), one_process():
            return cls(config=dit_config, hf_config=dict(transformer_config))
    finally:
        torch.set_default_dtype(before)


@contextmanager
def one_process() -> Iterator[None]:
    """Entered around the making of a transformer and its passes: FastVideo looks up how many processes share a sample, where
    there may be no process groups yet, or those of a run. (Whether that many divide its heads is checked by
    ``plan.check_run``.)"""
    from fastvideo.distributed import parallel_state

    # With one process in it a group hands back what it is given, and needs nothing but its sizes for that.
    group = parallel_state.GroupCoordinator.__new__(parallel_state.GroupCoordinator)
    group.world_size, group.rank_in_group = 1, 0
    before, parallel_state._SP = parallel_state._SP, group
    try:
        yield
    finally:
        parallel_state._SP = before


@contextmanager
def own_tables() -> Iterator[None]:
    """Entered around passes of tensors without storage: FastVideo keeps tables of positions from pass to pass, and these would
    be of no use to others."""
    from fastvideo.layers import rotary_embedding

    kept = rotary_embedding._ROTARY_POS_EMBED_CACHE
    before = dict(kept)
    kept.clear()
    try:
        yield
    finally:
        kept.clear()
        kept.update(before)
