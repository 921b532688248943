"""Promise 7: what `export` writes loads in diffusers, equal tensor by tensor, and draws the same pictures."""

import sys

import pytest
import torch

from fastvideo_grpo import cli
from fastvideo_grpo.checkpoints.export import model_names
from fastvideo_grpo.engines.sharded_loading import CheckpointReader
from fastvideo_grpo.families import model_facts
from fastvideo_grpo.sampling.noise import SampleKey, initial_noise
from tests.trainer import runs

SETTINGS = {"optim__lr": 1e-3, "optim__ema_decay": 0.8, "run__iterations": 2}


def _diffusers_latents(pipeline, trainer, prompt, initial):
    """Final latents of diffusers' pipeline under our schedule."""
    pipeline.set_progress_bar_config(disable=True)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, use_dynamic_shifting=False, shift=1.0)
    pipeline.scheduler = scheduler
    with torch.no_grad():
        return pipeline(
            prompt=prompt.text,
            height=64,
            width=64,
            sigmas=trainer.schedule.sigma[:-1].tolist(),
            num_inference_steps=trainer.config.sample.steps,
            guidance_scale=trainer.config.sample.guidance_scale,
            latents=trainer.pack(initial),
            max_sequence_length=16,
            output_type="pt",
        ).images.permute(0, 2, 3, 1)


def _our_pixels(trainer, prompt, initial):
    key = [SampleKey(0, 0, 0, prompt.id, 0)]
    return trainer.draw(prompt, key, deterministic=True).media[:, 0].float() / 255


def _export_without_fastvideo(*arguments):
    """`fastvideo-grpo export` where importing anything of FastVideo fails."""
    with pytest.MonkeyPatch.context() as patch:
        for name in {"fastvideo", *(name for name in sys.modules if name.split(".")[0] == "fastvideo")}:
            patch.setitem(sys.modules, name, None)
        return cli.main(["export", *map(str, arguments)])


def _printed_load(text):
    """What the command's last lines load, the code run as it is printed."""
    code = "\n".join(line.strip() for line in text.partition("load them with\n")[2].splitlines())
    found = {}
    exec(code, found)
    return found


@pytest.mark.parametrize("which", ["model", "ema"])
def test_full_weights_come_back_equal_and_draw_the_same_pictures(make_trainer, tmp_path, which, capsys):
    trainer = make_trainer(**SETTINGS)
    trainer.train()
    out = tmp_path / "exported"
    arguments = ["--out", out, "--weights", which, "--pipeline", "--max-shard-size", "1MB"]
    assert _export_without_fastvideo(trainer.folder, *arguments) == 0
    pipeline = _printed_load(capsys.readouterr().out)["pipeline"]
    assert (out / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    loaded = pipeline.transformer.state_dict()
    with trainer.engine.ema_weights() if which == "ema" else torch.no_grad():
        ours = dict(trainer.denoiser.named_parameters())
        assert loaded.keys() == ours.keys() and all(torch.equal(loaded[name], ours[name]) for name in ours)
        prompt = trainer.prompts[0]
        initial = initial_noise([SampleKey(0, 0, 0, prompt.id, 0)], trainer.latent_shape(), shared=False)
        difference = _our_pixels(trainer, prompt, initial) - _diffusers_latents(pipeline, trainer, prompt, initial)
    assert difference.abs().max() <= 0.5 / 255 + 1e-4


def test_lora_weights_load_in_diffusers_and_draw_the_same_pictures(make_trainer, tmp_path, tiny_flux, capsys):
    from diffusers import FluxPipeline
    from safetensors.torch import load_file

    trainer = make_trainer(**{**SETTINGS, "optim__lr": 3e-2}, model__lora__rank=4, model__lora__alpha=12.0)
    trainer.train()
    out, merged = tmp_path / "adapters", tmp_path / "merged"
    assert _export_without_fastvideo(trainer.folder, "--out", out) == 0
    printed = capsys.readouterr().out
    assert _export_without_fastvideo(trainer.folder, "--out", merged, "--merge-lora", "--pipeline") == 0
    saved = load_file(out / "pytorch_lora_weights.safetensors")
    ours = {f"transformer.{n}.weight": p for n, p in trainer.denoiser.named_parameters() if p.requires_grad}
    assert saved.keys() == ours.keys() and all(torch.equal(saved[name], ours[name]) for name in ours)

    prompt = trainer.prompts[0]
    initial = initial_noise([SampleKey(0, 0, 0, prompt.id, 0)], trainer.latent_shape(), shared=False)
    expected = _our_pixels(trainer, prompt, initial)
    pipeline = FluxPipeline.from_pretrained(tiny_flux, torch_dtype=torch.float32)
    without = _diffusers_latents(pipeline, trainer, prompt, initial)
    pipeline = _printed_load(printed)["pipeline"]
    adapted = _diffusers_latents(pipeline, trainer, prompt, initial)
    assert (expected - adapted).abs().max() <= 0.5 / 255 + 1e-4
    assert (without - adapted).abs().max() > 0.05  # the adapters do something
    whole = FluxPipeline.from_pretrained(merged, torch_dtype=torch.float32)
    assert (_diffusers_latents(whole, trainer, prompt, initial) - adapted).abs().max() < 1e-4


def test_bf16_export_is_the_float32_masters_rounded(make_trainer, tmp_path):
    from diffusers import FluxTransformer2DModel

    trainer = make_trainer(**SETTINGS, model__precision="bf16")
    trainer.train()
    out = tmp_path / "exported"
    assert cli.main(["export", str(trainer.folder), "--out", str(out)]) == 0
    loaded = FluxTransformer2DModel.from_pretrained(out, subfolder="transformer", torch_dtype=torch.bfloat16).state_dict()
    masters = trainer.engine.state_dict()
    assert all(torch.equal(loaded[name], masters[name].bfloat16()) for name in masters)


def test_sample_draws_from_run_and_configuration(make_trainer, tmp_path, capsys):
    trainer = make_trainer(**{**SETTINGS, "optim__lr": 1e-2})
    trainer.train()
    grids = {}
    for which in ("start", "model", "ema"):
        out = tmp_path / which
        command = ["sample", str(trainer.folder), "--prompt", "a red circle", "--samples", "2", "--weights", which]
        assert cli.main([*command, "--out", str(out)]) == 0
        assert len(list(out.glob("0*.png"))) == 2 and (out / "index.json").is_file()
        grids[which] = (out / "grid.png").read_bytes()
    assert len(set(grids.values())) == 3
    assert cli.main(["sample", str(trainer.folder / "config.yaml"), "--prompt", "a red circle", "--weights", "ema"]) == 1
    assert "need a run folder" in capsys.readouterr().err


def test_export_says_what_is_wrong(make_trainer, tmp_path, capsys):
    trainer = make_trainer(run__iterations=1)
    trainer.train()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("something")
    for arguments, message in [
        ([str(trainer.folder), "--out", str(tmp_path / "full")], "is not empty"),
        ([str(tmp_path), "--out", str(tmp_path / "x")], "no config.yaml"),
        ([str(trainer.folder), "--out", str(tmp_path / "x"), "--iteration", "7"], "there are: 1"),
        ([str(trainer.folder), "--out", str(tmp_path / "y"), "--weights", "ema"], "no EMA weights"),
        ([str(trainer.folder), "--out", str(tmp_path / "z"), "--merge-lora"], "model.lora is null"),
        ([str(trainer.folder), "--out", str(tmp_path / "z"), "--link"], "add --pipeline"),
        ([str(trainer.folder), "--out", str(tmp_path / "z"), "--max-shard-size", "big"], "--max-shard-size big is no size"),
    ]:
        assert cli.main(["export", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not any((tmp_path / name).exists() for name in "xyz")


# --- HunyuanVideo

VIDEO = {
    **runs.HUNYUAN_T2V,
    "sample__height": 32,
    "sample__width": 32,
    "sample__frames": 5,
    "grpo__prompts_per_iteration": 2,
    "grpo__group_size": 2,
    "grpo__updates_per_iteration": 1,
    "run__iterations": 1,
}


def _names(trainer):
    return model_names(model_facts(trainer.config).denoiser)


def _parameters(trainer):
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in trainer.denoiser.named_parameters()}


def _initial(trainer):
    prompt = trainer.prompts[0]
    return prompt, initial_noise([SampleKey(0, 0, 0, prompt.id, 0)], trainer.latent_shape(), shared=False)


def _our_clip(trainer):
    """Float ``[F, H, W, 3]`` in [0, 1]."""
    prompt, _ = _initial(trainer)
    return trainer.draw(prompt, [SampleKey(0, 0, 0, prompt.id, 0)], deterministic=True).media[0].float() / 255


def _diffusers_clip(pipeline, trainer):
    """The same of diffusers' pipeline, under our schedule."""
    sample, (prompt, initial) = trainer.config.sample, _initial(trainer)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift=1.0)
    with torch.no_grad():
        return (
            pipeline(
                prompt=prompt.text,
                height=sample.height,
                width=sample.width,
                num_frames=sample.frames,
                sigmas=trainer.schedule.sigma[:-1].tolist(),
                num_inference_steps=sample.steps,
                guidance_scale=sample.guidance_scale,
                latents=initial,
                output_type="pt",
            )
            .frames[0]
            .permute(0, 2, 3, 1)
        )


def test_hunyuan_video_comes_back_equal_and_draws_the_same_clip(make_trainer, tiny_hunyuan_video, tmp_path, capsys):
    """Trained with activation checkpointing, which writes itself into the parameters' names."""
    trainer = make_trainer(
        **VIDEO, model__path=tiny_hunyuan_video, optim__lr=1e-2, optim__ema_decay=0.8, engine__activation_checkpointing="full"
    )
    assert any("_checkpoint_wrapped_module" in name for name, _ in trainer.denoiser.named_parameters())
    names, reader = _names(trainer), CheckpointReader(tiny_hunyuan_video / "transformer")
    start = names.to_fastvideo({name: reader.read(name) for name in reader.shapes})
    loaded = _parameters(trainer)
    assert loaded.keys() == start.keys() and all(torch.equal(loaded[name], start[name]) for name in start)
    before = _our_clip(trainer)
    trainer.train()
    clips = {}
    for which, how in (("model", ["--link"]), ("ema", [])):
        out = tmp_path / which
        command = ["export", str(trainer.folder), "--out", str(out), "--weights", which, "--pipeline", *how]
        assert cli.main([*command, "--max-shard-size", "200KB"]) == 0
        assert (out / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
        pipeline = _printed_load(capsys.readouterr().out)["pipeline"]
        assert type(pipeline).__name__ == "HunyuanVideoPipeline"
        theirs = pipeline.transformer.state_dict()
        with trainer.engine.ema_weights() if which == "ema" else torch.no_grad():
            expected = names.to_diffusers({name: p.detach() for name, p in _parameters(trainer).items()})
            assert theirs.keys() == expected.keys() and all(torch.equal(theirs[name], expected[name]) for name in theirs)
            clips[which] = _our_clip(trainer)
        assert (clips[which] - _diffusers_clip(pipeline, trainer)).abs().max() <= 0.5 / 255 + 1e-4
    assert (clips["model"] - clips["ema"]).abs().max() > 2 / 255 and (clips["ema"] - before).abs().max() > 2 / 255


def test_hunyuan_video_adapters_are_split_for_diffusers(make_trainer, tiny_hunyuan_video, tmp_path, capsys):
    """On fused layers, the refiner's among them, and on others; in the file and merged."""
    from diffusers import HunyuanVideoPipeline

    targets = "[img_attn_qkv,txt_attn_qkv,txt_attn_proj,linear1,linear2,self_attn_qkv,img_mlp.fc_in]"
    lora = {"model__lora__rank": 4, "model__lora__alpha": 12.0, "model__lora__targets": targets}
    trainer = make_trainer(**VIDEO, **lora, model__path=tiny_hunyuan_video, optim__lr=3e-2)
    trainer.train()
    out, merged = tmp_path / "adapters", tmp_path / "merged"
    assert cli.main(["export", str(trainer.folder), "--out", str(out)]) == 0
    pipeline = _printed_load(capsys.readouterr().out)["pipeline"]
    assert cli.main(["export", str(trainer.folder), "--out", str(merged), "--merge-lora"]) == 0
    whole = _printed_load(capsys.readouterr().out)["transformer"]

    names, trained = _names(trainer), {n: p.detach() for n, p in trainer.denoiser.named_parameters() if p.requires_grad}
    assert all(weight.abs().max() > 0 for weight in trained.values())
    base = names.to_fastvideo(HunyuanVideoPipeline.from_pretrained(tiny_hunyuan_video).transformer.state_dict())
    for layer in {name.rpartition(".")[0] for name in trained}:
        base[f"{layer}.weight"] = base[f"{layer}.weight"] + 3.0 * trained[f"{layer}.lora_B"] @ trained[f"{layer}.lora_A"]
    torch.testing.assert_close(whole.state_dict(), names.to_diffusers(base), rtol=0, atol=1e-6)
    assert (_our_clip(trainer) - _diffusers_clip(pipeline, trainer)).abs().max() <= 0.5 / 255 + 1e-4
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(pipeline.transformer.state_dict(), whole.state_dict(), rtol=0, atol=1e-6)
