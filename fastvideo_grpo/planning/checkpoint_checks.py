"""Whether a checkpoint's folder can be loaded, before anything of it is: its JSON, the headers of its weight files, and whether
names and shapes are those of the networks that its configuration describes. Of weights nothing is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.errors import one_line
from fastvideo_grpo.model_files.headers import read_entries
from fastvideo_grpo.model_files.json_files import read_json
from fastvideo_grpo.model_files.pointers import is_pointer
from fastvideo_grpo.model_files.selection import DIFFUSERS, Selection, WeightFilesError, select, unread
from fastvideo_grpo.models.checkpoint import where_from
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.family import Family
from fastvideo_grpo.models.networks import diffusers_denoiser
from fastvideo_grpo.models.registry import FAMILIES

_WITHOUT_WEIGHTS = ("tokenizer", "scheduler", "feature_extractor", "image_processor")
# What libraries read; people keep other JSON files beside them.
_JSON = (
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "scheduler_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",), ("vocab.txt",))
# Schedulers that FastVideo knows; it makes one of the folder, though sampling here has its own levels.
FASTVIDEO_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowUniPCMultistepScheduler",
    "RCMScheduler",
    "SelfForcingFlowMatchScheduler",
    "UniPCMultistepScheduler",
)
# Of names that libraries leave alone: tables that newer versions compute.
_COMPUTED = ("position_ids", "rotary_emb.inv_freq")


def checkpoint_problems(config: Config, facts: ModelFacts, components: Collection[str] | None = None) -> list[str]:
    """What keeps the checkpoint from being loaded, a line each: the file, what is wrong, what to do.

    Args:
        components: only these; None: all that the model's family reads.
    """
    path, family = Path(config.model.path), FAMILIES[config.model.kind]
    problems = []
    if components is None and family.fastvideo_config is not None and path.is_dir():
        problems += _index_problems(family, path / "model_index.json")
    for component in family.folders if components is None else components:
        if not (path / component).is_dir():
            continue  # a recipe without its checkpoint; else :func:`~fastvideo_grpo.models.checkpoint.model_facts` says so
        try:
            _check_small_files(path / component)
            if component.startswith("scheduler") and family.fastvideo_config is not None:
                _check_scheduler(path / component / "scheduler_config.json")
            if component.startswith("tokenizer"):
                _check_vocabulary(path / component)
            if not component.startswith(_WITHOUT_WEIGHTS):
                _check_weights(family, facts, path / component)
        except WeightFilesError as error:
            problems.append(str(error))
    if problems:
        problems[-1] += where_from(family, path)
    return problems


def unread_files(config: Config) -> str | None:
    """A line that names the weight files that lie beside those that are read; None: there are none."""
    path, family = Path(config.model.path), FAMILIES[config.model.kind]
    names = [f"{part}/{name}" for part in family.folders if (path / part).is_dir() for name in unread(path / part)]
    if not names:
        return None
    rest = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return (
        f"model.path={path}: not read, as by {family.pipeline}.from_pretrained, which takes the index, else the file of the "
        f"standard name: {', '.join(names[:6])}{rest}"
    )


def _check_small_files(folder: Path) -> None:
    left_out = unread(folder)
    for file in sorted(path for path in folder.iterdir() if path.name not in left_out and not path.is_dir()):
        if not file.exists():
            raise WeightFilesError(f"{file} is a link to {file.readlink()}, which is not there; download it again")
        try:
            if file.name in _JSON:
                read_json(file)
            elif is_pointer(file):
                raise ValueError("it is a Git LFS pointer, which stands for the file until it is fetched")
        except OSError as error:
            raise WeightFilesError(f"{file} cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise WeightFilesError(f"{file}: {error}; download it again") from error


def _index_problems(family: Family, file: Path) -> Iterator[str]:
    """What FastVideo would stumble over in model_index.json: it reads from it which library a component is of."""
    index = read_json(file)
    for component in family.folders:
        library = "transformers" if component.startswith(("text_encoder", "tokenizer")) else "diffusers"
        found = index.get(component)
        if not isinstance(found, list) or len(found) != 2 or found[0] != library or not isinstance(found[1], str):
            yield f'{file}: {component} is {found!r}; expected ["{library}", "CLASS"], as in the published one'
    if "_diffusers_version" not in index:
        yield f"{file} has no '_diffusers_version'; add that of the published one"


def _check_scheduler(file: Path) -> None:
    if not file.is_file():
        raise WeightFilesError(f"{file} is not there; download it again")
    found = read_json(file).get("_class_name")
    if found not in FASTVIDEO_SCHEDULERS:
        raise WeightFilesError(
            f"{file}: _class_name is {found!r}; FastVideo knows {', '.join(FASTVIDEO_SCHEDULERS)}; download it again"
        )


def _check_vocabulary(folder: Path) -> None:
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        known = ", ".join(" with ".join(names) for names in _VOCABULARIES)
        raise WeightFilesError(f"{folder} holds no vocabulary; expected one of {known}; download it again")


def _check_weights(family: Family, facts: ModelFacts, folder: Path) -> None:
    """Raise :class:`WeightFilesError` where the weights are not whole, or not those of the component's network."""
    if not (folder / "config.json").is_file():
        raise WeightFilesError(f"{folder / 'config.json'} is not there; download it again")
    config = read_json(folder / "config.json")
    _check_class(family, folder, config)
    selection = select(folder)
    needs_safetensors = family.fastvideo_config is not None and not folder.name.startswith("text_encoder")
    if needs_safetensors and selection.files[0].suffix != ".safetensors":
        cls = config.get("_class_name")
        write = f"from diffusers import {cls}; {cls}.from_pretrained('{folder}').save_pretrained('{folder}')"
        raise WeightFilesError(
            f"{folder} holds its weights as {selection.files[0].name} only, which FastVideo does not read; write "
            f'{DIFFUSERS[1]} beside it: python -c "{write}"'
        )
    _check_places(selection)
    found = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in read_entries(selection).items()
    }
    if folder.name == family.denoiser:
        _check_module(selection, lambda: family.network(facts.denoiser), found)
    elif "_class_name" in config:
        _check_diffusers(selection, config, found)
    else:
        _check_transformers(selection, config, found)
    by_diffusers = family.fastvideo_config is None and "_class_name" in config
    if by_diffusers and selection.index is not None and "metadata" not in read_json(selection.index):
        raise WeightFilesError(f"{selection.index} has no 'metadata', which diffusers asks for; download it again")


def _check_class(family: Family, folder: Path, config: dict[str, Any]) -> None:
    """Raise where a component names another class than the one that loads it, or none that there is."""
    file, found = folder / "config.json", config.get("_class_name")
    usual = family.configs.get(folder.name, {}).get("_class_name")
    if folder.name != family.denoiser and usual is not None and found != usual:
        raise WeightFilesError(f"{file}: _class_name is {found!r}, but {family.kind} reads an {usual}; download it again")
    if family.fastvideo_config is None or "_class_name" in config:
        return
    name = _transformers_class(config)
    if name is None:
        raise WeightFilesError(f"{file} names no class under 'architectures'; download it again")
    import transformers

    if not hasattr(transformers, name):
        raise WeightFilesError(f"{file}: 'architectures' names {name}, which transformers does not have; download it again")


def _transformers_class(config: dict[str, Any]) -> str | None:
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else None


def _check_places(selection: Selection) -> None:
    """Raise where a shard holds a tensor that the index places in another, or nowhere: who reads whole files would take it."""
    if selection.promised is None:
        return
    for file in selection.files:
        for name in read_entries(Selection(selection.folder, None, (file,), None, ())):
            place = selection.promised.get(name)
            if place != file:
                where = "does not name" if place is None else f"places in {place.name}"
                raise WeightFilesError(
                    f"{file} holds {name}, which the index {where}: what is meant cannot be told; download the folder again"
                )


def _check_diffusers(selection: Selection, config: dict[str, Any], found: dict[str, torch.Tensor]) -> None:
    import diffusers

    if hasattr(diffusers, str(config["_class_name"])):  # else of another package, which loads it
        _check_module(selection, lambda: diffusers_denoiser(config), found)


def _check_module(selection: Selection, make: Callable[[], torch.nn.Module], found: dict[str, torch.Tensor]) -> None:
    """The check of a component whose names are those of a module; a diffusers module may know older ones."""
    try:
        module = make()
    except Exception as error:  # whatever a constructor raises for values that it cannot take
        raise WeightFilesError(
            f"{selection.folder / 'config.json'}: no network can be made of it ({one_line(error)}); download it again"
        ) from error
    rename = getattr(module, "_fix_state_dict_keys_on_load", None)
    if selection.index is None and rename is not None:
        rename(found)
    state = module.state_dict()
    for name in state.keys() & found.keys():
        if state[name].is_floating_point() and not found[name].is_floating_point():
            raise WeightFilesError(
                f"{selection.folder}: {name} is {found[name].dtype} in the files: quantised weights, which would be taken for "
                "numbers; download those of the original precision"
            )
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    misfits = [(name, shapes[name], shape) for name, shape in wanted.items() if shapes.get(name, shape) != shape]
    unexpected = [name for name in shapes if name not in wanted and not name.endswith(_COMPUTED)]
    _refuse(selection, sorted(wanted.keys() - shapes.keys()), unexpected, misfits)


def _check_transformers(selection: Selection, config: dict[str, Any], found: dict[str, torch.Tensor]) -> None:
    """transformers itself says what fits, older names included; it is given tensors without storage. What it has no use for it
    leaves alone."""
    import transformers

    name = _transformers_class(config)
    cls: Any = getattr(transformers, str(name), None)
    if cls is None:
        return  # of another package, which loads it
    try:
        with _quiet_transformers():
            _, info = cls.from_pretrained(
                None,
                config=cls.config_class.from_dict(config),
                state_dict=found,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # whatever it raises for values that it cannot take
        raise WeightFilesError(
            f"{selection.folder / 'config.json'}: transformers cannot make a {name} of it ({one_line(error)}); download it "
            "again"
        ) from error
    misfits = [(name, tuple(shape), tuple(wanted)) for name, shape, wanted in info["mismatched_keys"]]
    _refuse(selection, sorted(info["missing_keys"]), [], sorted(misfits))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _refuse(
    selection: Selection,
    missing: list[str],
    unexpected: list[str],
    misfits: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    files = selection.index or selection.files[0]
    parts = []
    if missing:
        parts.append(f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if unexpected:
        parts.append(f"{_some(unexpected)} {'is' if len(unexpected) == 1 else 'are'} not in the model")
    if misfits:
        name, shape, wanted = misfits[0]
        more = f" ({len(misfits)} of this kind)" if len(misfits) > 1 else ""
        parts.append(f"{name} is {list(shape)} instead of {list(wanted)}{more}")
    if parts:
        raise WeightFilesError(
            f"{files}: the tensors are not those of the model that {selection.folder / 'config.json'} describes: "
            f"{'; '.join(parts)}; the two belong together, download both from one place"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
