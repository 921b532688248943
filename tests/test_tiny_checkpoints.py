"""Tiny checkpoints of all models: published files and names, loaded by diffusers, the same from the same seed.

A row of MODELS for each; what holds of one model alone is in its test_tiny_*.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch

from fastvideo_grpo.models.registry import FAMILIES
from tests import tiny_checkpoints
from tests.tiny_checkpoints import (
    check_every_weight_is_loaded,
    check_files,
    check_index,
    check_same_form,
    check_the_prompt_shows_in_a_clip,
    components_of,
    contents_of,
    keys_of,
    one_thread,  # noqa: F401  (a fixture)
    read,
    tiny_command,
)
from tests.tiny_models import (
    tiny_checkpoint,  # noqa: F401  (a fixture)
    writer,
)

DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class Demo:
    """The checkpoint of a demo, which is committed, and how it is pretrained."""

    folder: str
    megabytes: float  # at most
    kind: str
    trained: str  # what the last line of progress is about
    amount: str  # the argument that says how much is drawn
    steps: str  # and how long that is trained
    measured: tuple[str, ...] = ()  # keys of vae/config.json that are the pretraining's
    without: frozenset[str] = frozenset()  # published files that it has not

    def pretrain(self, folder: Path, **settings: Any) -> Path:
        short = {self.amount: 16, "autoencoder_steps": 2, self.steps: 2}
        return resolve_name(FAMILIES[self.kind].tiny.pretraining)(folder, **short, **settings)


@dataclass(frozen=True)
class Model:
    """What is known of a published checkpoint."""

    name: str
    files: frozenset[str]  # with the number of shards that stands in their names left open
    components: tuple[str, ...]  # with weights
    classes: Mapping[str, Any]  # of model_index.json
    clip: str | None = None  # the component that is CLIP's text encoder
    t5: str | None = None
    clips: Mapping[str, Any] | None = None  # of a video model: arguments of its pipeline
    presets: bool = False
    demo: Demo | None = None

    @property
    def sharded(self) -> list[tuple[str, str]]:
        """Component and stem of its files, where there are several."""
        parts = [name.split("/") for name in sorted(self.files) if "*" in name]
        return [(component, file.split("-*")[0]) for component, file in parts]


CLIP_TOKENIZER = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
T5_TOKENIZER = ("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json")
LLAMA_TOKENIZER = ("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
NETWORK = ("config.json", "diffusion_pytorch_model.safetensors")
NETWORK_SHARDS = (
    "config.json",
    "diffusion_pytorch_model-*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
ENCODER = ("config.json", "model.safetensors")
ENCODER_SHARDS = ("config.json", "model-*.safetensors", "model.safetensors.index.json")


def files(**components: tuple[str, ...]) -> frozenset[str]:
    """The files of a repository whose components hold these."""
    of_components = {f"{component}/{name}" for component, names in components.items() for name in names}
    return frozenset({"model_index.json", "scheduler/scheduler_config.json"} | of_components)


# FLUX.1-dev
FLUX = Model(
    name="FLUX",
    files=files(
        text_encoder=ENCODER,
        text_encoder_2=ENCODER_SHARDS,
        tokenizer=CLIP_TOKENIZER,
        tokenizer_2=T5_TOKENIZER,
        transformer=NETWORK_SHARDS,
        vae=NETWORK,
    ),
    components=("text_encoder", "text_encoder_2", "transformer", "vae"),
    classes={"_class_name": "FluxPipeline", "tokenizer_2": ["transformers", "T5TokenizerFast"]},
    clip="text_encoder",
    t5="text_encoder_2",
    presets=True,
    demo=Demo(
        "tiny-flux-shapes",
        2.0,
        "flux",
        "transformer",
        "pictures",
        "transformer_steps",
        measured=("scaling_factor", "shift_factor"),
    ),
)
# HunyuanVideo
HUNYUAN_VIDEO = Model(
    name="HunyuanVideo",
    files=files(
        text_encoder=ENCODER_SHARDS,
        text_encoder_2=ENCODER,
        tokenizer=LLAMA_TOKENIZER,
        tokenizer_2=CLIP_TOKENIZER,
        transformer=NETWORK_SHARDS,
        vae=NETWORK,
    ),
    components=("text_encoder", "text_encoder_2", "transformer", "vae"),
    classes={"_class_name": "HunyuanVideoPipeline", "text_encoder": ["transformers", "LlamaModel"]},
    clip="text_encoder_2",
    clips={},
    presets=True,
    demo=Demo(
        "tiny-hunyuan-shapes",
        2.0,
        "hunyuan_video",
        "transformer",
        "clips",
        "transformer_steps",
    ),
)
# Wan2.1-T2V-1.3B-Diffusers
WAN = Model(
    name="Wan 2.1",
    files=files(text_encoder=ENCODER_SHARDS, tokenizer=T5_TOKENIZER, transformer=NETWORK_SHARDS, vae=NETWORK),
    components=("text_encoder", "transformer", "vae"),
    classes={"_class_name": "WanPipeline", "text_encoder": ["transformers", "UMT5EncoderModel"]},
    t5="text_encoder",
    clips={"max_sequence_length": 16},
)
# HunyuanVideo's folder with the transformer of SkyReels-V1-Hunyuan-I2V
SKYREELS_I2V = Model(
    name="SkyReels-V1-I2V",
    files=HUNYUAN_VIDEO.files,
    components=HUNYUAN_VIDEO.components,
    classes={"_class_name": "HunyuanSkyreelsImageToVideoPipeline"},
    clip="text_encoder_2",
)
# stable-diffusion-v1-4, as safetensors
STABLE_DIFFUSION = Model(
    name="Stable Diffusion",
    files=files(
        feature_extractor=("preprocessor_config.json",),
        safety_checker=ENCODER,
        text_encoder=ENCODER,
        tokenizer=CLIP_TOKENIZER,
        unet=NETWORK,
        vae=NETWORK,
    ),
    components=("safety_checker", "text_encoder", "unet", "vae"),
    classes={
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    },
    clip="text_encoder",
    presets=True,
    demo=Demo(
        "tiny-sd-shapes",
        2.5,
        "stable_diffusion",
        "UNet",
        "pictures",
        "unet_steps",
        measured=("scaling_factor",),
        without=frozenset({"feature_extractor/preprocessor_config.json", *(f"safety_checker/{name}" for name in ENCODER)}),
    ),
)

MODELS = {
    "flux": FLUX,
    "hunyuan_video": HUNYUAN_VIDEO,
    "wan": WAN,
    "skyreels_i2v": SKYREELS_I2V,
    "stable_diffusion": STABLE_DIFFUSION,
}
with_demo = pytest.mark.parametrize("kind", [kind for kind, model in MODELS.items() if model.demo])


@dataclass(frozen=True)
class Written:
    """A checkpoint, random or a demo's, and what is to be found there."""

    model: Model
    folder: Path
    without: frozenset[str] = field(default_factory=frozenset)

    @property
    def missing(self) -> set[str]:
        """Components that the published folder has and this one has not."""
        return {file.split("/")[0] for file in self.without}

    def load(self) -> Any:
        import diffusers

        return tiny_checkpoints.load(getattr(diffusers, self.model.classes["_class_name"]), self.folder)


EVERY = [(kind, "random") for kind in MODELS] + [(kind, "committed") for kind, model in MODELS.items() if model.demo]


@pytest.fixture(params=EVERY, ids="-".join)
def written(request, tiny_checkpoint):  # noqa: F811
    kind, sort = request.param
    model = MODELS[kind]
    if sort == "random":
        return Written(model, tiny_checkpoint(kind))
    return Written(model, DATA / model.demo.folder, model.demo.without)


# --- the form


def test_the_files_are_those_of_the_published_checkpoint(written):
    check_files(written.folder, written.model.files - written.without)
    assert components_of(written.folder) == [name for name in written.model.components if name not in written.missing]


def test_the_index_names_every_tensor_and_its_shard(written):
    for component, stem in written.model.sharded:
        check_index(written.folder / component, stem)


def test_model_index_names_the_published_classes(written):
    index = read(written.folder / "model_index.json")
    for name, value in written.model.classes.items():
        assert index[name] == ([None, None] if name in written.missing else value), name
    parts = {name for name in index if not name.startswith("_")} - written.missing
    if "safety_checker" in written.missing:
        parts.remove("requires_safety_checker")
    assert parts == {name.split("/")[0] for name in written.model.files - written.without if "/" in name}
    assert all((written.folder / name).is_dir() for name in parts)


def test_text_encoder_keys_are_those_of_transformers_4(written):
    if written.model.clip:
        clip = keys_of(written.folder / written.model.clip)
        assert all(key.startswith("text_model.") for key in clip)
        assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in clip
        assert not any("position_ids" in key for key in clip)
    if written.model.t5:
        t5 = keys_of(written.folder / written.model.t5)
        assert "shared.weight" in t5 and "encoder.embed_tokens.weight" not in t5


def test_every_weight_reaches_diffusers_and_the_prompt_shows_in_a_clip(written):
    pipeline = written.load()
    check_every_weight_is_loaded(pipeline, written.folder)
    if written.model.clips is not None:
        check_the_prompt_shows_in_a_clip(pipeline, **written.model.clips)


# --- writing


@pytest.mark.parametrize("kind", MODELS)
def test_the_command_writes_the_same_bytes_for_the_same_seed_and_refuses_politely(
    tiny_checkpoint,  # noqa: F811
    kind,
    tmp_path,
    capsys,
):
    out, random = tmp_path / "out", contents_of(tiny_checkpoint(kind))
    assert tiny_command(kind, "--out", str(out)) == 0
    assert str(out) in capsys.readouterr().out
    assert contents_of(out) == random
    assert tiny_command(kind, "--out", str(out)) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert tiny_command(kind, "--out", str(out), "--seed", "1", "--overwrite") == 0
    assert contents_of(out).keys() == random.keys() and contents_of(out) != random


@pytest.mark.parametrize("kind", [kind for kind, model in MODELS.items() if model.presets])
def test_unknown_presets_are_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=r"'huge'.*random, demo"):
        writer(kind)(tmp_path / "new", preset="huge")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", MODELS)
def test_only_such_a_checkpoint_is_overwritten_and_only_when_told(kind, tmp_path):
    notes, other, own = (tmp_path / name for name in ("notes", "other", "own"))
    for folder, file, content in (
        (notes, "thesis.txt", "years of work"),
        (other, "model_index.json", '{"_class_name": "AnotherPipeline"}'),
        (own, "model_index.json", json.dumps(dict(MODELS[kind].classes))),
    ):
        folder.mkdir()
        (folder / file).write_text(content)
        with pytest.raises(FileExistsError, match="--overwrite"):
            writer(kind)(folder)
        if folder != own:
            with pytest.raises(FileExistsError, match=f"something else than a {MODELS[kind].name} checkpoint"):
                writer(kind)(folder, overwrite=True)
        assert (folder / file).read_text() == content
    check_files(writer(kind)(own, overwrite=True), MODELS[kind].files)


# --- the demos' checkpoints


@with_demo
def test_pretraining_runs_and_writes_the_demo_preset(kind, tmp_path):
    demo = MODELS[kind].demo
    lines = []
    before = torch.get_rng_state()
    folder = demo.pretrain(tmp_path / "demo", progress=lines.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert any(demo.trained in line and "2/2" in line for line in lines)
    assert set(contents_of(folder)) == set(contents_of(DATA / demo.folder))
    again = demo.pretrain(tmp_path / "again", progress=lines.append)
    assert contents_of(again) == contents_of(folder)
    with pytest.raises(FileExistsError):
        demo.pretrain(folder)


@with_demo
def test_the_committed_checkpoint_is_small_and_what_the_code_writes(kind, tmp_path):
    demo = MODELS[kind].demo
    committed = DATA / demo.folder
    assert sum(path.stat().st_size for path in committed.rglob("*") if path.is_file()) < 1e6 * demo.megabytes
    check_same_form(writer(kind)(tmp_path / "demo", preset="demo"), committed, measured=demo.measured)
