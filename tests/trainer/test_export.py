"""Promise 7: what `export` writes loads in diffusers, equal tensor by tensor, and draws the same pictures."""

import pytest
import torch

from fastvideo_grpo import cli
from fastvideo_grpo.sampling.noise import SampleKey, initial_noise

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


@pytest.mark.parametrize("which", ["model", "ema"])
def test_full_weights_come_back_equal_and_draw_the_same_pictures(make_trainer, tmp_path, which, capsys):
    from diffusers import FluxPipeline

    trainer = make_trainer(**SETTINGS)
    trainer.train()
    out = tmp_path / "exported"
    command = ["export", str(trainer.folder), "--out", str(out), "--weights", which, "--pipeline", "--max-shard-size", "1MB"]
    assert cli.main(command) == 0
    assert "FluxPipeline.from_pretrained" in capsys.readouterr().out
    assert (out / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    pipeline = FluxPipeline.from_pretrained(out, torch_dtype=torch.float32)
    loaded = pipeline.transformer.state_dict()
    with trainer.engine.ema_weights() if which == "ema" else torch.no_grad():
        ours = dict(trainer.transformer.named_parameters())
        assert loaded.keys() == ours.keys() and all(torch.equal(loaded[name], ours[name]) for name in ours)
        prompt = trainer.prompts[0]
        initial = initial_noise([SampleKey(0, 0, 0, prompt.id, 0)], trainer.latent_shape(), shared=False)
        difference = _our_pixels(trainer, prompt, initial) - _diffusers_latents(pipeline, trainer, prompt, initial)
    assert difference.abs().max() <= 0.5 / 255 + 1e-4


def test_lora_weights_load_in_diffusers_and_draw_the_same_pictures(make_trainer, tmp_path, tiny_flux):
    from diffusers import FluxPipeline
    from safetensors.torch import load_file

    trainer = make_trainer(**{**SETTINGS, "optim__lr": 3e-2}, model__lora__rank=4, model__lora__alpha=12.0)
    trainer.train()
    out, merged = tmp_path / "adapters", tmp_path / "merged"
    assert cli.main(["export", str(trainer.folder), "--out", str(out)]) == 0
    assert cli.main(["export", str(trainer.folder), "--out", str(merged), "--merge-lora", "--pipeline"]) == 0
    saved = load_file(out / "pytorch_lora_weights.safetensors")
    ours = {f"transformer.{n}.weight": p for n, p in trainer.transformer.named_parameters() if p.requires_grad}
    assert saved.keys() == ours.keys() and all(torch.equal(saved[name], ours[name]) for name in ours)

    prompt = trainer.prompts[0]
    initial = initial_noise([SampleKey(0, 0, 0, prompt.id, 0)], trainer.latent_shape(), shared=False)
    expected = _our_pixels(trainer, prompt, initial)
    pipeline = FluxPipeline.from_pretrained(tiny_flux, torch_dtype=torch.float32)
    without = _diffusers_latents(pipeline, trainer, prompt, initial)
    pipeline.load_lora_weights(out)
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
    ]:
        assert cli.main(["export", *arguments]) == 1
        assert message in capsys.readouterr().err
