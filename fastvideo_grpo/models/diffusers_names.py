"""A network's weights under FastVideo's names and under diffusers'.

FastVideo fuses projections that read the same input: one of its parameters may be several of diffusers' tensors, stacked
along the first axis. How it does so is written in its models as regular expressions (``param_names_mapping``), which say
the way from diffusers to FastVideo; the way back needs the tensors' own row counts, since the parts differ in size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastvideo_grpo.engines.sharded_loading import WeightFilesError, fused_parts
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models.family import Family
from fastvideo_grpo.patching import require_patched

# diffusers name -> FastVideo name, position among the parts that are stacked to it (None: it is one tensor), their number.
NamesMapping = Callable[[str], tuple[str, int | None, int | None]]


class DiffusersNames:
    """Which of diffusers' tensors make up each parameter of a FastVideo transformer.

    Args:
        shapes: name -> shape of diffusers' tensors (the attribute of a ``CheckpointReader``, or :func:`tensor_shapes` of
            a module on the meta device).
        mapping: diffusers name -> FastVideo name, position, number of parts.

    Attributes:
        parts: FastVideo name -> names of the diffusers tensors that are stacked to it, in order; what ``FusedWeights`` takes.
        shapes: FastVideo name -> shape.
        diffusers_shapes: diffusers name -> shape, in the order given.

    Raises:
        WeightFilesError: parts are missing, claim the same place, or do not stack.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], mapping: NamesMapping) -> None:
        self.diffusers_shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.parts: dict[str, list[str]] = fused_parts(self.diffusers_shapes, mapping)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, sources in self.parts.items():
            first, *others = [self.diffusers_shapes[source] for source in sources]
            if any(not shape or shape[1:] != first[1:] for shape in others):
                listed = ", ".join(f"{source} {self.diffusers_shapes[source]}" for source in sources)
                raise WeightFilesError(f"{name} cannot be stacked along the first axis from {listed}")
            self.shapes[name] = (first[0] + sum(shape[0] for shape in others), *first[1:]) if others else first

    def sources(self, name: str) -> list[str]:
        """The diffusers tensors that are stacked to the parameter ``name``, in order.

        Raises:
            UserError: the model has no such parameter.
        """
        if name not in self.parts:
            known = ", ".join(list(self.parts)[:3])
            raise UserError(f"the network has no parameter {name}; it has, for example, {known}")
        return list(self.parts[name])

    def rows(self, name: str) -> list[int]:
        """Rows of the parameter ``name`` (at least one axis) that each of its sources gives."""
        return [self.diffusers_shapes[source][0] for source in self.sources(name)]

    def to_diffusers(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """FastVideo's weights under diffusers' names, in the order of ``diffusers_shapes``; the tensors are views.

        Raises:
            UserError: names or shapes are not those of the model.
        """
        check_shapes(tensor_shapes(weights), self.shapes)
        split: dict[str, Tensor] = {}
        for name, sources in self.parts.items():
            pieces = [weights[name]] if len(sources) == 1 else weights[name].split(self.rows(name))
            split.update(zip(sources, pieces, strict=True))
        return {name: split[name] for name in self.diffusers_shapes}

    def to_fastvideo(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """diffusers' weights under FastVideo's names; fused ones are copies, the others the tensors given.

        Raises:
            UserError: names or shapes are not those of the model.
        """
        check_shapes(tensor_shapes(weights), self.diffusers_shapes)
        return {
            name: weights[sources[0]] if len(sources) == 1 else torch.cat([weights[source] for source in sources])
            for name, sources in self.parts.items()
        }

    def lora_to_diffusers(self, adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adapters on FastVideo's layers as adapters on diffusers': the same function, of the same rank.

        A layer whose weight W is stacked from W_1, W_2, ... has W + B A = (W_1 + B_1 A, W_2 + B_2 A, ...): every part gets
        the same A, and the rows of B that are its own.

        Args:
            adapters: LAYER.lora_A ``[rank, in]`` and LAYER.lora_B ``[out, rank]`` of each adapted layer.

        Returns:
            the same with diffusers' layers; a fused layer's A appears under several names, as one tensor.

        Raises:
            UserError: the model has no such layer, or one of another size; an adapter is not whole.
        """
        pairs = _pairs(adapters)
        out: dict[str, Tensor] = {}
        for layer, (down, up) in pairs.items():
            weight = f"{layer}.weight"
            sources, rows, expected = self.sources(weight), self.rows(weight), self.shapes[weight]
            found = (up.shape[0], down.shape[1])
            if found != expected or up.shape[1] != down.shape[0]:
                raise UserError(
                    f"the adapter of {layer} has lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}, but {weight} is "
                    f"{expected}; use the checkpoint that it was trained on"
                )
            for source, piece in zip(sources, up.split(rows), strict=True):
                target = source.removesuffix(".weight")
                out[f"{target}.lora_A"], out[f"{target}.lora_B"] = down, piece
        return out


def denoiser_names(family: Family, class_name: str, shapes: Mapping[str, tuple[int, ...]]) -> DiffusersNames:
    """The names of a family's network.

    Args:
        class_name: diffusers', ``_class_name`` in its ``config.json``.
        shapes: see :class:`DiffusersNames`.

    Raises:
        WeightFilesError: these tensors do not make up a model of that class.
        UserError: FastVideo has to be imported for it, and its patches are missing.
    """
    if family.fastvideo_config is None or family.diffusers_names:
        return DiffusersNames(shapes, lambda name: (name, None, None))
    return DiffusersNames(shapes, fastvideo_mapping(class_name))


def fastvideo_mapping(class_name: str) -> NamesMapping:
    """The mapping by which FastVideo's own loader turns the tensors of this diffusers class into its parameters."""
    require_patched()
    from fastvideo.models.loader.utils import get_param_names_mapping
    from fastvideo.models.registry import ModelRegistry

    model, _ = ModelRegistry.resolve_model_cls(class_name)
    return get_param_names_mapping(model.param_names_mapping)


def tensor_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """name -> shape, for instance of a ``state_dict`` on the meta device."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _pairs(adapters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> its lora_A and lora_B."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in adapters)
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("lora_A", "lora_B")}
    if expected != set(adapters):
        wrong = sorted(expected.symmetric_difference(adapters))[0]
        raise UserError(f"these weights are not those of LoRA adapters, pairs of LAYER.lora_A and LAYER.lora_B: see {wrong}")
    return {layer: (adapters[f"{layer}.lora_A"], adapters[f"{layer}.lora_B"]) for layer in layers}


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError, naming the first that is wrong, unless both have the same names and shapes."""
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if not wrong:
        return
    first = wrong[0]
    if first not in found:
        what = "is missing"
    elif first not in expected:
        what = "is not in the model"
    else:
        what = f"has shape {found[first]} instead of {expected[first]}"
    raise UserError(
        f"these weights are not those of the network: {len(wrong)} names or shapes differ, first {first}: it {what}; "
        "use the checkpoint that training started from"
    )
