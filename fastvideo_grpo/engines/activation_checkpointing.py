"""Which blocks of a network there are, and recomputing them in the backward pass (``engine.activation_checkpointing``)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from fastvideo_grpo.errors import UserError


def find_blocks(network: nn.Module, blocks: Sequence[str], not_recomputed: Collection[str] = ()) -> dict[str, list[str]]:
    """Class -> names in ``network`` of the blocks of that class, in order; what a block holds is not looked at.

    Args:
        blocks: names of the blocks' classes.
        not_recomputed: names of classes that stand in lists of modules, too, and are no blocks.

    Raises:
        UserError: there is none of them, or a list of modules of another class: fewer blocks would be recomputed than the
            estimate of memory counts.
    """
    found: dict[str, list[str]] = {name: [] for name in blocks}
    unknown: list[str] = []

    def look(module: nn.Module, prefix: str) -> bool:
        """Whether there are blocks in it."""
        any_there = False
        for name, child in module.named_children():
            kind, known = type(child).__name__, len(unknown)
            there = kind in found or look(child, f"{prefix}{name}.")
            if kind in found:
                found[kind].append(prefix + name)
            elif isinstance(module, nn.ModuleList) and not there:
                del unknown[known:]  # lists inside it
                unknown.extend([] if kind in not_recomputed else [f"{prefix.removesuffix('.')} ({kind})"])
            any_there = any_there or there
        return any_there

    if not look(network, ""):
        raise UserError(
            f"engine.activation_checkpointing: a {type(network).__name__} has none of the blocks that its family names "
            f"({', '.join(blocks) or 'none'}); use none"
        )
    if unknown:
        raise UserError(
            f"engine.activation_checkpointing: a {type(network).__name__} has lists of modules that its family does not name: "
            f"{', '.join(dict.fromkeys(unknown))}. Name their class in `blocks`, or in `not_recomputed` (docs/extending.md), "
            "or use none"
        )
    return found


def checkpoint_blocks(network: nn.Module, found: dict[str, list[str]], every: int) -> nn.Module:
    """Let every ``every``-th block of each class (see :func:`find_blocks`) be recomputed in the backward pass; returns
    ``network``."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for names in found.values():
        for name in names[::every]:
            # Nothing is drawn inside, so that there is no state of random generators to keep.
            network.set_submodule(name, checkpoint_wrapper(network.get_submodule(name), preserve_rng_state=False))
    return network
