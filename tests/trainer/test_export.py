"""`export` and `sample` beside promise 7 (tests/promises): what they refuse, and adapters on fused layers."""

import json

import torch

from fastvideo_grpo import cli
from fastvideo_grpo.checkpoints.export import model_names
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.sampling.noise import SampleKey, initial_noise
from fastvideo_grpo.tracking.pictures import save_samples
from tests.trainer import runs


def _printed_load(text):
    """What the command's last lines load, the code run as it is printed."""
    code = "\n".join(line.strip() for line in text.partition("load them with\n")[2].splitlines())
    found = {}
    exec(code, found)
    return found


def test_sample_draws_from_run_and_configuration(make_trainer, tmp_path, capsys):
    trainer = make_trainer(
        optim__lr=1e-2,
        optim__ema_decay=0.8,
        run__iterations=2,
        grpo__objective="nft",
        grpo__old_weights__decay=0.5,
        grpo__old_weights__ramp=None,
    )
    trainer.train()
    grids = {}
    for which in ("start", "model", "ema", "old"):
        out = tmp_path / which
        command = ["sample", str(trainer.run.folder), "--prompt", "a red circle", "--samples", "2", "--weights", which]
        assert cli.main([*command, "--out", str(out)]) == 0
        assert len(list(out.glob("0*.png"))) == 2 and (out / "index.json").is_file()
        grids[which] = (out / "grid.png").read_bytes()
    assert len(set(grids.values())) == 4
    assert cli.main(["sample", str(trainer.run.folder), "--prompt", "a red circle", "--out", str(tmp_path / "ema")]) == 1
    assert "holds 0000.png already; choose another folder, or add --overwrite" in capsys.readouterr().err
    assert (tmp_path / "ema" / "grid.png").read_bytes() == grids["ema"]
    assert cli.main(["sample", str(trainer.run.folder / "config.yaml"), "--prompt", "a red circle", "--weights", "ema"]) == 1
    assert "need a run folder" in capsys.readouterr().err


def test_samples_of_two_models_never_share_a_folder(make_trainer, tmp_path, capsys, monkeypatch):
    """By default they lie in the run's folder, by checkpoint, and beside those that are there."""
    from fastvideo_grpo.commands import sample

    def draw(config, checkpoint, which, prompts, samples, out):
        made = {"checkpoint": None if checkpoint is None else checkpoint.iteration, "weights": which}
        save_samples(
            out, torch.zeros(samples, 1, 32, 32, 3, dtype=torch.uint8), ["a"] * samples, [{}] * samples, made_from=made
        )
        return [None] * samples, out / "grid.png"

    trainer = make_trainer(optim__ema_decay=0.8, run__iterations=2)
    trainer.train()
    monkeypatch.setattr(sample, "draw", draw)
    monkeypatch.chdir(tmp_path)
    run = str(trainer.run.folder)
    ways = {
        "000002-model": [run],
        "000002-ema": [run, "--weights", "ema"],
        "000001-model": [run, "--iteration", "1"],
        "start": [run, "--weights", "start"],
        "000002-model-2": [run, "--samples", "3"],
    }
    for name, arguments in ways.items():
        assert cli.main(["sample", *arguments, "--prompt", "a red circle"]) == 0
        out = trainer.run.folder / "sampled" / name
        assert str(out) in capsys.readouterr().out and json.loads((out / "index.json").read_text())[0]["weights"] in name
    (tmp_path / "mine.yaml").write_text((trainer.run.folder / "config.yaml").read_text())
    for name in ("mine", "mine-2"):
        assert cli.main(["sample", "mine.yaml", "--prompt", "a red circle", "--samples", "2"]) == 0
        assert len(list((tmp_path / "samples" / name).glob("0*.png"))) == 2
    out = tmp_path / "samples" / "mine"
    command = ["sample", run, "--prompt", "a red circle", "--out", str(out)]
    assert cli.main([*command, "--overwrite"]) == 0
    assert [entry["checkpoint"] for entry in json.loads((out / "index.json").read_text())] == [2]
    assert sorted(path.name for path in out.iterdir()) == ["0000.png", "grid.png", "index.json"]
    (out / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for arguments, message in [
        ([*command, "--overwrite"], "holds notes.txt, which is no sample: nothing is overwritten"),
        ([*command[:-1], str(tmp_path / "file")], "a file, not a folder"),
        ([*command[:-2], "--overwrite"], "--overwrite is about the folder of --out"),
    ]:
        assert cli.main(arguments) == 1
        assert message in capsys.readouterr().err


def test_export_says_what_is_wrong(make_trainer, tmp_path, capsys):
    trainer = make_trainer(run__iterations=1)
    trainer.train()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("something")
    for arguments, message in [
        ([str(trainer.run.folder), "--out", str(tmp_path / "full")], "is not empty"),
        ([str(tmp_path), "--out", str(tmp_path / "x")], "no config.yaml"),
        ([str(trainer.run.folder), "--out", str(tmp_path / "x"), "--iteration", "7"], "there are: 1"),
        ([str(trainer.run.folder), "--out", str(tmp_path / "y"), "--weights", "ema"], "no EMA weights"),
        ([str(trainer.run.folder), "--out", str(tmp_path / "z"), "--merge-lora"], "model.lora is null"),
        ([str(trainer.run.folder), "--out", str(tmp_path / "z"), "--lora-format", "kohya"], "these are full weights; leave"),
        ([str(trainer.run.folder), "--out", str(tmp_path / "z"), "--link"], "add --pipeline"),
        ([str(trainer.run.folder), "--out", str(tmp_path / "full" / "file" / "z")], "a file, not a folder"),
        ([str(trainer.run.folder), "--out", str(tmp_path / "z"), "--max-shard-size", "big"], "--max-shard-size big is no size"),
        ([str(tmp_path), "--out", str(tmp_path / "z"), "--max-shard-size=-5GB"], "--max-shard-size -5GB is no size"),
        ([str(tmp_path), "--out", str(tmp_path / "z"), "--max-shard-size", "infGB"], "--max-shard-size infGB is no size"),
        ([str(tmp_path), "--out", str(tmp_path / "z"), "--max-shard-size", "0.0MB"], "--max-shard-size 0.0MB is no size"),
    ]:
        assert cli.main(["export", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not any((tmp_path / name).exists() for name in "xyz")


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
    return model_names(FAMILIES[trainer.config.model.kind], model_facts(trainer.config).denoiser)


def _initial(trainer):
    prompt = trainer.run.prompts[0]
    return prompt, initial_noise([SampleKey(0, 0, 0, prompt.id, 0)], trainer.latent_shape(), shared=False)


def _our_clip(trainer):
    """Float ``[F, H, W, 3]`` in [0, 1]."""
    prompt, _ = _initial(trainer)
    return trainer.draw_fixed(prompt, [SampleKey(0, 0, 0, prompt.id, 0)]).media[0].float() / 255


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


def test_hunyuan_video_adapters_are_split_for_diffusers(make_trainer, tiny_hunyuan_video, tmp_path, capsys):
    """On fused layers, the refiner's among them, and on others; in the file and merged."""
    from diffusers import HunyuanVideoPipeline

    targets = "[img_attn_qkv,txt_attn_qkv,txt_attn_proj,linear1,linear2,self_attn_qkv,img_mlp.fc_in]"
    lora = {"model__lora__rank": 4, "model__lora__alpha": 12.0, "model__lora__targets": targets}
    trainer = make_trainer(**VIDEO, **lora, model__path=tiny_hunyuan_video, optim__lr=3e-2)
    trainer.train()
    out, merged = tmp_path / "adapters", tmp_path / "merged"
    assert cli.main(["export", str(trainer.run.folder), "--out", str(out)]) == 0
    pipeline = _printed_load(capsys.readouterr().out)["pipeline"]
    assert cli.main(["export", str(trainer.run.folder), "--out", str(merged), "--merge-lora"]) == 0
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
