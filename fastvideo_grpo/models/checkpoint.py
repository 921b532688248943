"""The folder of a model's checkpoint: is it there, whose is it, and what do its configuration files say?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.models.facts import ConfigFile, ModelFacts, read_config
from fastvideo_grpo.models.family import Family
from fastvideo_grpo.models.registry import FAMILIES


def model_facts(config: Config, *, published_if_missing: bool = False) -> ModelFacts:
    """Read the checkpoint's configuration files.

    Args:
        published_if_missing: without the folder, take the published model's configuration (``--dry-run`` without weights).

    Raises:
        ConfigError: no such folder, another kind of checkpoint, or a missing component; says what was expected and found.
    """
    family, path = FAMILIES[config.model.kind], Path(config.model.path)
    if not path.exists() and published_if_missing:
        source = f"the published configuration of {family.name} ({path} is not there)"
        return ModelFacts(source, family.configs, family.denoiser)
    advice, index = where_from(family, path), path / "model_index.json"
    if not index.is_file():
        what = "has no model_index.json" if path.exists() else "does not exist"
        raise ConfigError(f"model.path={path} {what}; expected the diffusers folder of {family.name}{advice}")
    _check_pipeline(family, path, read_config(index, advice).get("_class_name"), advice)
    missing = [folder for folder in family.folders if not (path / folder).is_dir()]
    if missing:
        raise ConfigError(f"model.path={path} lacks the folders {', '.join(missing)}{advice}")
    parts: dict[str, dict[str, Any]] = {}
    for component, published in family.configs.items():
        file = path / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
        if not file.is_file():
            raise ConfigError(f"model.path={path} lacks {component}/{file.name}{advice}")
        parts[component] = found = ConfigFile(file, read_config(file, advice))
        found.check_types(published)
    return ModelFacts(str(path), parts, family.denoiser)


def where_from(family: Family, path: Path) -> str:
    """The end of an error about a checkpoint that is not there, or not whole."""
    advice = ""
    if family.source is not None:
        # A folder of another name may be the user's own model, into which nothing is to be downloaded.
        own = path.exists() and path.name != Path(family.source.folder).name
        advice = f"; the published one: {family.source.advice(None if own else path)}"
    if family.tiny is not None and not path.exists():
        tiny = path if path.name.startswith("tiny") else Path("checkpoints") / f"tiny-{family.kind.replace('_', '-')}"
        advice += (
            f"; or try everything with a tiny random one: fastvideo-grpo tiny {family.kind} --out {tiny}, and model.path={tiny}"
        )
    return advice


def _check_pipeline(family: Family, path: Path, found: Any, advice: str) -> None:
    """Raise :class:`ConfigError` if the checkpoint is another family's, by its files or by what model_index.json names."""
    # Other packages' models are not imported for a checkpoint that is none of theirs.
    for other in {**FAMILIES.own(), family.kind: family}.values():
        claim = other.claims(path, advice)
        if claim is not None:
            _check_claimed(family, other, path, found, f"model.path={path} holds {claim}")
    if found == family.pipeline:
        return
    fitting = next((f"; set model.kind={other.kind}" for other in FAMILIES.usable().values() if other.pipeline == found), "")
    raise ConfigError(
        f"model.path={path} holds a {found} (model_index.json), but model.kind={family.kind} needs a {family.pipeline}{fitting}"
    )


def _check_claimed(family: Family, owner: Family, path: Path, found: Any, claim: str) -> None:
    """Of a checkpoint that is ``owner``'s by its files."""
    if found != owner.pipeline:
        edit = f"make it {owner.pipeline}"
        if owner.source is not None and f'"{found}"' in owner.source.edit:
            edit = f"run {owner.source.commands(path)[-1]}"
        set_kind = "" if family.kind == owner.kind else f", and set model.kind={owner.kind}"
        raise ConfigError(f"{claim}, but its model_index.json says {found}: {edit}{set_kind}")
    if family.kind != owner.kind:
        does = ", which makes clips from images" if owner.reads_images else ""
        raise ConfigError(f"{claim}{does}; set model.kind={owner.kind}")
