"""Which files of a component's folder hold its weights: one rule, that of the library the component belongs to.

Of diffusers' components (a ``config.json`` with ``_class_name``) the index of the shards is read, else the one file of the
standard name; of transformers' it is the other way round. ``.bin`` files are read where there is neither. Everything else
(other variants, shards that no index names, EMA weights) is left out. Nothing is chosen by the order of the file system.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastvideo_grpo.errors import UserError
from fastvideo_grpo.model_files.json_files import read_json

DIFFUSERS = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
TRANSFORMERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The names that a library looks for, in its order."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf")
"""How files of weights end."""


class WeightFilesError(UserError, ValueError):
    """Weight files are missing, damaged, or not those of the model."""


@dataclass(frozen=True)
class Selection:
    """The weight files of a folder.

    Attributes:
        folder: the component's.
        index: the file that says which tensor is in which shard; None: there is one file.
        files: what is read, in the order of the names.
        promised: tensor -> its shard, with an index.
        left_out: names of weight files and indexes beside them that nobody reads.
    """

    folder: Path
    index: Path | None
    files: tuple[Path, ...]
    promised: dict[str, Path] | None
    left_out: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """Of all that is read: the files and the index."""
        return {path.name for path in (*self.files, *([] if self.index is None else [self.index]))}


def select(folder: Path) -> Selection:
    """The weight files of a component's folder, by the rule above.

    Raises:
        WeightFilesError: there is none of a name that its library reads, a shard is missing, the index is none, or it cannot
            be told whose files they are.
    """
    standard = _standard_names(folder)
    chosen = next((folder / name for name in standard if (folder / name).is_file()), None)
    if chosen is None:
        raise WeightFilesError(_nothing(folder, standard))
    if not chosen.name.endswith(".index.json"):
        return Selection(folder, None, (chosen,), None, left_out(folder, {chosen.name}))
    promised = promised_by(chosen)
    files = tuple(sorted(set(promised.values())))
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise WeightFilesError(
            f"{chosen} names {len(files)} files, of which {len(missing)} {_are(missing)} not there: "
            f"{', '.join(file.name for file in missing[:3])}; download what is missing"
        )
    return Selection(folder, chosen, files, promised, left_out(folder, {chosen.name, *(file.name for file in files)}))


def left_out(folder: Path, chosen: set[str]) -> tuple[str, ...]:
    """Names of the weight files and indexes of a folder that are not among the `chosen`."""
    return tuple(sorted(path.name for path in folder.iterdir() if path.name not in chosen and _holds_weights(path)))


def unread(folder: Path) -> tuple[str, ...]:
    """The same where it is asked of any folder: one without weights, or whose weights cannot be chosen, has none."""
    try:
        return select(folder).left_out
    except WeightFilesError:
        return ()


def _holds_weights(path: Path) -> bool:
    is_index = path.suffix == ".json" and ".index." in path.name
    return (is_index or path.suffix in WEIGHTS) and not path.is_dir()


def _standard_names(folder: Path) -> tuple[str, ...]:
    config = folder / "config.json"
    if config.is_file():
        try:
            content = read_json(config)
        except (OSError, ValueError) as error:
            raise WeightFilesError(f"{config}: {error}; download it again") from error
        if "_class_name" in content:
            return DIFFUSERS
        if "architectures" in content or "model_type" in content:
            return TRANSFORMERS
    both = [[name for name in names if (folder / name).is_file()] for names in (DIFFUSERS, TRANSFORMERS)]
    if all(both):
        raise WeightFilesError(
            f"{folder} holds {both[0][0]} and {both[1][0]}, and no config.json says whose weights are meant; leave one of the "
            "two, or add the model's config.json"
        )
    return TRANSFORMERS if both[1] else DIFFUSERS


def promised_by(index: Path) -> dict[str, Path]:
    """Tensor -> its shard, by an index, whether the shards are there or not.

    Raises:
        WeightFilesError: it is none, or names files elsewhere.
    """
    try:
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise ValueError("found no 'weight_map' of names and files")
        outside = [file for file in places.values() if file != Path(file).name]
        if outside:
            raise ValueError(f"'weight_map' names {outside[0]!r}, which is no file of this folder")
    except (OSError, ValueError) as error:
        raise WeightFilesError(f"{index} is not an index of weight files: {error}; download it again") from error
    return {name: index.parent / file for name, file in places.items()}


def _nothing(folder: Path, standard: tuple[str, ...]) -> str:
    """Why there is nothing to read, and the way out."""
    if not folder.is_dir():
        return f"there is no folder {folder}; give a component's folder, such as CHECKPOINT/transformer"
    for name in standard:
        if (folder / name).is_symlink():
            return f"{folder / name} is a link to {(folder / name).readlink()}, which is not there; download it again"
    names = [path.name for path in sorted(folder.iterdir()) if _holds_weights(path)]
    variants = {variant for variant in (_variant(name, standard) for name in names) if variant is not None}
    if variants:
        variant, file = min(variants, key=lambda found: (found[1].endswith(".bin"), found))
        plain = next(name for name in standard if _variant(file, (name,)) is not None)
        return (
            f"{folder} holds the weights in the variant {variant!r} only ({file}), which is not read unless asked for; "
            f"download {plain}, or, to start from these numbers, name them so: ln -s {file} {folder / plain}"
        )
    if standard is DIFFUSERS and f"{DIFFUSERS[2]}.index.json" in names:
        return (
            f"{folder} holds its weights as shards of {DIFFUSERS[2]}, which diffusers does not read; download the safetensors"
        )
    found = f"found {', '.join(names[:3])}" if names else "found no weights"
    usual = " or ".join(name for name in standard if ".safetensors" in name)
    return f"{folder} holds no {usual}: {found}; download the model's own files, under their own names"


def _variant(name: str, standard: tuple[str, ...]) -> tuple[str, str] | None:
    """(variant, name) of a file such as ``model.fp16.safetensors`` or ``model.safetensors.index.fp16.json``."""
    for plain in standard:
        stem, _, ending = plain.rpartition(".")
        if name.startswith(f"{stem}.") and name.endswith(f".{ending}") and name != plain:
            variant = name[len(stem) + 1 : -len(ending) - 1]
            if variant and "." not in variant:
                return variant, name
    return None


def _are(names: list[Path]) -> str:
    return "is" if len(names) == 1 else "are"
