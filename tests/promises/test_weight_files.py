"""What lies beside the weights in a component's folder is not read: training starts from what diffusers loads."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvideo_grpo.engines.sharded_loading import CheckpointReader
from fastvideo_grpo.model_files.json_files import read_json
from fastvideo_grpo.model_files.selection import WeightFilesError
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.planning.checkpoint_checks import FASTVIDEO_SCHEDULERS, unread_files
from fastvideo_grpo.trainers import load
from tests.decoys import add_decoys
from tests.promises.models import MODELS, cases
from tests.tiny_checkpoints import current_name


@pytest.mark.parametrize("model,case", cases(lambda model: ("decoys",), lambda model, case: model.kind == "flux"))
def test_other_variants_beside_the_weights_change_nothing(make_trainer, tiny_checkpoint, tmp_path, monkeypatch, model, case):
    """Every tensor of every component, as FastVideo (or diffusers' own class) loads it and as ZeRO-3 reads it; and diffusers'
    pipeline, which is given the same folder, has the numbers of the right files."""
    clean = tiny_checkpoint(model.kind)
    folder = shutil.copytree(clean, tmp_path / "checkpoint")
    components = sorted({path.parent.name for path in folder.glob("*/*.safetensors")} & set(FAMILIES[model.kind].folders))
    added = {f"{name}/{file}" for name in components for file in add_decoys(folder / name)}
    assert len(added) >= 6 * len(components)
    expected = make_trainer(**model.run(model__path=clean, run__dir=tmp_path / "clean"))
    said = []
    monkeypatch.setattr(load.logger, "warning", lambda text, *values: said.append(text % values))
    trainer = make_trainer(**model.run(model__path=folder, run__dir=tmp_path / "decoys"))
    assert said == [unread_files(trainer.config)] and "not read" in said[0]
    for name in components:
        ours, right = (some.get_module(name).state_dict() for some in (trainer, expected))
        assert ours.keys() == right.keys() and all(torch.equal(ours[key], right[key]) for key in ours), name
        read, of_clean = CheckpointReader(folder / name), CheckpointReader(clean / name)
        assert read.shapes == of_clean.shapes
        assert all(torch.equal(read.read(key), of_clean.read(key)) for key in read.shapes), name
    assert trainer.run._denoiser_identity == expected.run._denoiser_identity

    pipeline = model.load(folder)
    for name in components:
        loaded = {key.removeprefix("text_model."): value for key, value in getattr(pipeline, name).state_dict().items()}
        read = CheckpointReader(folder / name)
        for key in read.shapes:
            assert torch.equal(loaded[current_name(key)], read.read(key).float()), f"{name}: {key}"


def test_a_checkpoint_of_bin_files_alone_is_the_same_model(make_trainer, tiny_checkpoint, tmp_path):
    """As diffusers loads it; of models on FastVideo their text encoders alone may be so (tests/test_checkpoint_files.py)."""
    model = MODELS["stable_diffusion"]
    folder = shutil.copytree(tiny_checkpoint(model.kind), tmp_path / "checkpoint")
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = folder / part / f"{name}.safetensors"
        torch.save(load_file(file), file.with_name("pytorch_model.bin" if name == "model" else f"{name}.bin"))
        file.unlink()
    expected = make_trainer(**model.run(run__dir=tmp_path / "clean"))
    trainer = make_trainer(**model.run(model__path=folder, run__dir=tmp_path / "bin"))
    for name in ("unet", "vae", "text_encoder"):
        ours, right = (some.get_module(name).state_dict() for some in (trainer, expected))
        assert ours.keys() == right.keys() and all(torch.equal(ours[key], right[key]) for key in ours), name


def test_a_text_encoder_of_bin_files_is_read_by_fastvideo_too(make_trainer, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("flux"), tmp_path / "checkpoint")
    file = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    expected, trainer = make_trainer(run__dir=tmp_path / "a"), make_trainer(model__path=folder, run__dir=tmp_path / "b")
    ours, right = (some.get_module("text_encoder").state_dict() for some in (trainer, expected))
    assert all(torch.equal(ours[key], right[key]) for key in right)


@pytest.mark.parametrize("model", [MODELS[name] for name in MODELS if "video" in name or name == "wan"], ids=lambda m: m.kind)
def test_fastvideos_vae_has_the_names_of_the_published_one(tiny_checkpoint, model):
    """Its loader takes what fits and leaves the rest: names that diffusers' class has are those that FastVideo's looks for."""
    import importlib

    from fastvideo.models.registry import ModelRegistry

    from fastvideo_grpo.models.networks import diffusers_denoiser

    config = read_json(tiny_checkpoint(model.kind) / "vae" / "config.json")
    module, name = FAMILIES[model.kind].fastvideo_config.split(":")
    vae_config = getattr(importlib.import_module(module), name)().vae_config
    vae_config.load_encoder = vae_config.load_decoder = True
    vae_config.update_model_arch({key: value for key, value in config.items() if not key.startswith("_")})
    with torch.device("meta"):
        vae = ModelRegistry.resolve_model_cls(config["_class_name"])[0](vae_config)
    shapes = [{key: tuple(t.shape) for key, t in some.state_dict().items()} for some in (vae, diffusers_denoiser(config))]
    assert shapes[0] == shapes[1]


def test_the_schedulers_that_fastvideo_knows_are_those_that_are_let_through():
    from fastvideo.models.registry import _SCHEDULERS

    assert sorted(FASTVIDEO_SCHEDULERS) == sorted(_SCHEDULERS)


def test_a_vae_that_was_not_filled_by_the_files_is_refused(tmp_path):
    from fastvideo_grpo.trainers.fastvideo import _check_vae

    vae = torch.nn.Linear(2, 2)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(vae.state_dict(), file)
    _check_vae(vae, tmp_path)
    save_file({"weight": vae.weight.detach()}, file)
    with pytest.raises(WeightFilesError, match="1 tensors of FastVideo's VAE are in no file, bias is the first"):
        _check_vae(vae, tmp_path)
