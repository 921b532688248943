"""Promise 7: what `export` writes is what diffusers loads, equal tensor by tensor, and draws the same samples."""

import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastvideo_grpo import cli
from fastvideo_grpo.checkpoints.export import MergedLoRA, model_names
from fastvideo_grpo.engines.sharded_loading import CheckpointReader
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.models.registry import FAMILIES
from tests.promises.models import cases

WAYS = {
    "model": ("--pipeline", "--weights", "model", "--max-shard-size", "200KB"),
    "ema": ("--pipeline", "--weights", "ema", "--link"),
    "adapters": (),
    "merged": ("--pipeline", "--merge-lora"),
}
LORA = {"model__lora__rank": 4, "model__lora__alpha": 12.0, "optim__lr": 3e-2}


def quick(model, case):
    """SkyReels has HunyuanVideo's network; adapters on fused layers are in tests/trainer/test_export.py, too."""
    adapters = case == "adapters" and model.kind in ("wan", "stable_diffusion")
    return model.kind == "flux" or adapters or (case == "ema" and model.kind != "skyreels_i2v")


def export(model, *arguments):
    """`fastvideo-grpo export`; where names need no mapping importing anything of FastVideo fails."""
    with pytest.MonkeyPatch.context() as patch:
        for name in {"fastvideo", *(name for name in sys.modules if name.split(".")[0] == "fastvideo")}:
            if not model.maps_names:
                patch.setitem(sys.modules, name, None)
        return cli.main(["export", *map(str, arguments)])


def names_of(trainer):
    """FastVideo's names of the network's weights against diffusers'."""
    return model_names(FAMILIES[trainer.config.model.kind], model_facts(trainer.config).denoiser)


def printed_load(text):
    """What the command's last lines load, the code run as it is printed."""
    code = "\n".join(line.strip() for line in text.partition("load them with\n")[2].splitlines())
    found = {}
    exec(code, found)
    return found


def with_adapters(pipeline, network, source):
    """The network's weights after diffusers added the adapters of a folder, a file or a state dict to them."""
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    pipeline.load_lora_weights(source)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    merged = {name: weight.clone() for name, weight in network.state_dict().items()}
    network.load_state_dict(before)
    return merged


def check_adapters_in_every_way(pipeline, network, trainer, folder, kohya):
    """The same for readers that look at the metadata and for those that take alpha as the rank (12 is three times it)."""
    pipeline.unload_lora_weights()
    names = names_of(trainer)
    adapters = names.lora_to_diffusers(trainer.engine.state_dict())
    start = CheckpointReader(trainer.checkpoint / FAMILIES[trainer.config.model.kind].denoiser)
    expected = dict(MergedLoRA(start, adapters, trainer.config.model.lora))
    (file,) = folder.iterdir()
    ways = {"folder": folder, "file": file, "state dict": load_file(file)}
    if trainer.config.model.kind == "stable_diffusion":  # diffusers reads that of FLUX at FLUX.1's sizes alone
        ways |= {"kohya": kohya, "kohya's state dict": load_file(kohya)}
    with safe_open(file, "pt") as opened:
        kinds = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert {value for key, value in kinds.items() if key.endswith((".r", ".lora_alpha"))} == {4}
    for way, source in ways.items():
        merged = with_adapters(pipeline, network, source)
        assert merged.keys() == expected.keys()
        for name, weight in merged.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6, msg=f"{way}: {name}")


@pytest.mark.parametrize("model,case", cases(lambda model: WAYS, quick))
def test_diffusers_loads_what_was_trained_and_draws_the_same_samples(make_trainer, tmp_path, capsys, model, case):
    """Checkpointed blocks, which write themselves into the parameters' names, leave no trace."""
    lora = case in ("adapters", "merged")
    short = {"grpo__prompts_per_iteration": 2, "run__iterations": 2, "run__save_every": 2}
    common = {**short, "optim__lr": 1e-2, "optim__ema_decay": 0.5, "engine__activation_checkpointing": "full"}
    geometry = next(iter(model.geometries.values()))
    trainer, prompt = make_trainer(**model.run(**{**geometry, **common, **(LORA if lora else {})})), model.prompt(tmp_path)
    keys = model.keys(prompt, 1)
    before = trainer.draw_fixed(prompt, keys).media.float() / 255
    trainer.train()
    assert export(model, trainer.run.folder, "--out", tmp_path / "exported", *WAYS[case]) == 0
    pipeline = printed_load(capsys.readouterr().out)["pipeline"]
    assert type(pipeline).__name__ == model.pipeline

    network = getattr(pipeline, FAMILIES[model.kind].denoiser)
    with trainer.engine.averaged_weights("ema") if case == "ema" else torch.no_grad():
        ours = trainer.draw_fixed(prompt, keys).media.float() / 255
        weights = {n.replace("_checkpoint_wrapped_module.", ""): p.detach() for n, p in trainer.denoiser.named_parameters()}
        if not lora:
            expected = names_of(trainer).to_diffusers(weights)
            loaded = network.state_dict()
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(loaded[name], expected[name]) for name in loaded)
    pipeline.set_progress_bar_config(disable=True)
    model.prepare(pipeline)
    with torch.no_grad():
        theirs = model.draw(pipeline, trainer, prompt, model.initial(trainer, prompt, 1), "pt")
    assert (ours - theirs).abs().max() <= 0.5 / 255 + 1e-4
    assert (ours - before).abs().max() > 2 / 255  # training did something
    if case == "adapters":
        written = export(model, trainer.run.folder, "--out", tmp_path / "kohya", "--lora-format", "kohya")
        assert written == (model.kind not in ("flux", "stable_diffusion")), capsys.readouterr().err
        kohya = tmp_path / "kohya" / "kohya_lora.safetensors"
        assert kohya.is_file() == (written == 0)
        check_adapters_in_every_way(pipeline, network, trainer, tmp_path / "exported", kohya)
    if case == "model":
        assert list((tmp_path / "exported").glob("*/diffusion_pytorch_model.safetensors.index.json"))


@pytest.mark.parametrize("model,case", cases(lambda model: ("bf16",), lambda model, case: model.kind == "flux"))
def test_a_bf16_export_is_the_float32_masters_rounded(make_trainer, tmp_path, capsys, model, case):
    trainer = make_trainer(**model.run(optim__lr=1e-3, run__iterations=1, model__precision="bf16"))
    trainer.train()
    assert export(model, trainer.run.folder, "--out", tmp_path / "exported") == 0
    network = printed_load(capsys.readouterr().out)[FAMILIES[model.kind].denoiser]
    masters = names_of(trainer).to_diffusers(trainer.engine.state_dict())
    loaded = network.state_dict()
    assert loaded.keys() == masters.keys()
    assert all(torch.equal(loaded[name].bfloat16(), masters[name].bfloat16()) for name in masters)
