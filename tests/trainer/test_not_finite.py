"""What a run says of samples that are not finite: what spoiled them, since when, and where to go back to."""

import json
import logging
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastvideo_grpo import cli
from fastvideo_grpo.checkpoints.store import CheckpointError
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.models.stable_diffusion.tiny import write_stable_diffusion
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.trainers.decoding import decode_checked
from fastvideo_grpo.trainers.fixed_set import sample_fixed
from fastvideo_grpo.trainers.invalid_samples import TooManyInvalidRewards, newest_sound, since
from fastvideo_grpo.trainers.not_finite import DECODING, SAMPLING
from fastvideo_grpo.trainers.scoring import Scoring
from tests.promises.models import MODELS
from tests.trainer import runs

SD = {**runs.STABLE_DIFFUSION, "sample__cfg_scale": 1.0, "sample__height": 32, "sample__width": 32}


def change(checkpoint, part, name, by):
    """Write a component's weights anew with one tensor changed."""
    file = checkpoint / part / "diffusion_pytorch_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name] = by(tensors[name])
    save_file(tensors, file)


def overflowing_vae(trainer, hit):
    """Decoded samples are infinite in one pixel where ``hit(row)`` says so, rows counted from 0."""
    layer, seen = trainer.get_module("vae").decoder.conv_out, [0]

    def hook(module, inputs, output):
        output = output.clone()
        for row in range(len(output)):
            if hit(seen[0] + row):
                output[row, 0, 0, 0] = torch.inf
        seen[0] += len(output)
        return output

    return layer.register_forward_hook(hook)


def test_what_the_vae_spoils_is_masked_counted_and_named_in_a_run(make_trainer, caplog):
    """Two of 16 samples; the update is made with the others, and evaluation and pictures leave out one of theirs."""
    settings = {**SD, "rewards__max_invalid_fraction": 0.5, "run__iterations": 1, "run__eval_every": 1, "run__sample_every": 1}
    trainer = make_trainer(**settings, run__sample_prompts=4, run__eval_prompts=4, run__eval_samples=2)
    handle = overflowing_vae(trainer, lambda row: row % 8 == 1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    handle.remove()
    (line,) = trainer.run.log.read()
    assert line["decoding/not_finite"] == 2 and line["sampling/not_finite"] == 0
    assert line["reward/pixels/brightness/invalid"] == 2 and line["train/updates"] == 1
    assert line["train/ratio_first_update_max_dev"] == 0.0
    assert line["eval/train/not_finite"] == 1 and line["eval/train/pixels/brightness/mean"] is not None
    assert caplog.text.count(DECODING) == 1 and trainer.fault_counts[DECODING] > 2

    folder = trainer.run.folder / "samples" / "000000"
    index = json.loads((folder / "index.json").read_text())
    bad = [entry for entry in index if "invalid" in entry]
    assert [(e["file"], e["invalid"], e["rewards"]) for e in bad] == [(None, DECODING, {"pixels/brightness": None})]
    assert sorted(file.name for file in folder.glob("0*")) == [entry["file"] for entry in index if entry["file"]]
    grey = (np.asarray(Image.open(folder / "grid.png")) == 160).all(-1).sum()
    assert grey > 1000  # crossed out, not black


def test_a_decoder_may_be_told_a_number_for_each_sample_or_for_all():
    class Decoder(torch.nn.Module):
        def forward(self, latents, times, scale):
            return latents * scale

    vae = torch.nn.Module()
    vae.decoder, latents = Decoder(), torch.ones(2, 3, 1, 4, 4)
    times = torch.tensor([1.0, torch.inf])
    pixels, finite = decode_checked(lambda part: vae.decoder(part, times, torch.tensor(0.5)), vae, latents)
    assert finite.tolist() == [True, False] and torch.equal(pixels, latents / 2)


def test_refl_leaves_out_what_the_vae_spoils_in_an_update(make_trainer):
    """No NaN comes back through the VAE, whose first layer spoils one row of each decoding with gradients."""
    smooth = {"rewards__models__pixels__kind": "test_smooth_brightness"}
    settings = {"grpo__objective": "refl", "grpo__updates_per_iteration": 1, "run__iterations": 1}
    trainer = make_trainer(**{**SD, **settings, **smooth})
    before = trainer.engine.state_dict()

    def hook(module, inputs, output):
        if not torch.is_grad_enabled():
            return None
        rows = torch.arange(len(output)).view(-1, 1, 1, 1)
        return output * torch.where(rows == 1, torch.nan, 1.0)

    trainer.get_module("vae").decoder.conv_in.register_forward_hook(hook)
    trainer.train()
    (line,) = trainer.run.log.read()
    assert line["train/unjudged"] == 0.5 and line["train/updates"] == 1 and line["train/skipped_updates"] == 0
    assert trainer.fault_counts[DECODING] == 8 and not trainer.run.scoring.rewards.failure_counts
    after = trainer.engine.state_dict()
    assert all(weight.isfinite().all() for weight in after.values()) and not runs.same_bits(before, after)


def test_the_last_message_says_that_the_vae_overflows(make_trainer):
    trainer = make_trainer(**SD, run__iterations=2)
    trainer.config.model.vae_precision = "fp16"
    overflowing_vae(trainer, lambda row: True)
    with pytest.raises(TooManyInvalidRewards) as stopped:
        trainer.train()
    assert "16 of 16 samples of iteration 1 do not count" in str(stopped.value) and f"{DECODING} (16)" in str(stopped.value)
    assert "set model.vae_precision=fp32" in str(stopped.value) and "reward" not in str(stopped.value).split("allows:")[1]


@pytest.mark.parametrize("part,name", [("unet", "conv_in.bias"), ("vae", "decoder.conv_out.bias")])
def test_weights_that_hold_nan_are_refused_by_every_command(tmp_path, capsys, part, name):
    checkpoint = write_stable_diffusion(tmp_path / "nan")
    change(checkpoint, part, name, lambda tensor: tensor * torch.nan)
    file = tmp_path / "run.yaml"
    file.write_text("{}")
    overrides = runs.settings(tmp_path, checkpoint, **SD)
    for command in (["train", str(file)], ["sample", str(file), "--out", str(tmp_path / "out")]):
        assert cli.main([*command, *overrides]) == 1
        said = capsys.readouterr().err
        assert f"{checkpoint}/{part}: the tensor {name}" in said and "Traceback" not in said


def test_starting_weights_that_overflow_are_blamed(make_trainer):
    """They are finite, what the network makes of them is not."""
    trainer = make_trainer(**SD)
    weights = {name: weight * 1e30 for name, weight in trainer.engine.state_dict().items()}
    trainer.engine.load_state_dict(weights)
    with pytest.raises(TooManyInvalidRewards) as stopped:
        trainer.train()
    said = str(stopped.value)
    assert f"{SAMPLING} (16)" in said and "from the first iteration on" in said and f"{trainer.checkpoint}/unet" in said
    assert "no checkpoint of this run is sound" in said and "epair the reward" not in said
    assert trainer.run.store.iterations() == []


def test_a_network_that_diverges_names_iteration_and_sound_checkpoint(make_trainer):
    """It is not saved over the sound one, and a second start says the same."""
    trainer = make_trainer(**SD, run__iterations=5, run__keep=1)
    step = trainer.engine.step

    def diverging():
        norm = step()
        if trainer.engine.step_calls == 2:
            weights = {name: weight * 1e30 for name, weight in trainer.engine.state_dict().items()}
            trainer.engine.load_state_dict(weights)
        return norm

    trainer.engine.step = diverging
    trainer.config.run.save_every = 100
    trainer.run.save(0)  # the weights before
    with pytest.raises(TooManyInvalidRewards) as stopped:
        trainer.train()
    said = str(stopped.value)
    assert "since iteration 3" in said and "epair the reward" not in said
    assert f"{trainer.run.folder}/checkpoints/000000" in said and "export" in said and "--iteration 0" in said
    assert trainer.run.store.iterations() == [0]


def test_a_learning_rate_that_destroys_the_weights(make_trainer):
    trainer = make_trainer(**SD, run__iterations=3, run__save_every=1, optim__lr=1e18)
    wanted = r"since iteration 2.*No checkpoint is left.*start anew.*lower optim\.lr \(it is 1e\+18\) and another run\.dir$"
    with pytest.raises(TooManyInvalidRewards, match=wanted):
        trainer.train()
    assert trainer.run.store.iterations() == [1]  # which is not called a comfort


def test_weights_that_are_not_finite_are_not_saved(make_trainer, caplog):
    trainer = make_trainer(**SD, run__iterations=1)
    name = trainer.engine.trainable_names[0]
    weights = trainer.engine.state_dict()
    trainer.run.save(1)
    weights[name].view(-1)[0] = torch.inf
    trainer.engine.load_state_dict(weights)
    with caplog.at_level(logging.ERROR):
        trainer.run.save(2)
    assert trainer.run.store.iterations() == [1] and "iteration 2 was not saved: its weights are not finite" in caplog.text


def test_since_and_the_sound_checkpoint_by_the_lines_of_earlier_starts(tmp_path):
    lines = [{"iteration": i, "sampling/not_finite": n} for i, n in enumerate([0, 1, 0, 0, 2, 3])]
    assert since(lines, 6) == 4 and since(lines, 5) == 4 and since(lines, 2) == 1 and since(lines[:4], 4) == 4
    assert since([], 0) == 0 and since([{"iteration": 0}], 1) == 1  # of a run from before this was counted

    class Store:
        def __init__(self, there):
            self.there, self.world = there, self

        def iterations(self):
            return self.there

        def broadcast_object(self, value):
            return value

        def at(self, number):
            if number == 3:
                raise CheckpointError("damaged")

    assert newest_sound(Store([1, 2, 3, 5]), lines, 4) == 2  # 3 is damaged, 5 too young, and what 1 drew was not finite
    assert newest_sound(Store([1, 5]), lines, 4) is None


def test_the_sample_command_says_which_are_invalid(tmp_path, capsys):
    """Its VAE gives infinity in fp32, where its weights are finite. Files of an earlier time are not left there."""
    checkpoint = write_stable_diffusion(tmp_path / "vae")
    change(checkpoint, "vae", "decoder.conv_out.weight", lambda tensor: tensor / tensor.abs().max() * 3e38)
    file, out = tmp_path / "run.yaml", tmp_path / "pictures"
    file.write_text("{}")
    out.mkdir()
    (out / "0000.png").write_bytes(b"of an earlier time")
    command = ["sample", str(file), "--prompt", "a cat", "--samples", "2", "--no-rewards", "--overwrite", "--out", str(out)]
    assert cli.main([*command, *runs.settings(tmp_path, checkpoint, **SD)]) == 1
    assert f"2 of 2 are invalid and have no file: {DECODING}" in capsys.readouterr().out
    assert [entry["file"] for entry in json.loads((out / "index.json").read_text())] == [None, None]
    assert not (out / "0000.png").exists()


def test_an_image_that_the_vae_cannot_encode_is_named(make_trainer, tmp_path):
    model = MODELS["skyreels_i2v"]
    trainer, prompt = make_trainer(train=False, **model.run()), model.prompt(tmp_path)
    next(trainer.get_module("vae").encoder.parameters()).data.fill_(torch.inf)
    with pytest.raises(UserError, match=rf"{prompt.image} of prompt 'parity'"):
        trainer.conditioning(prompt, 1)


def test_pictures_drawn_for_a_figure_know_what_is_not_finite(make_trainer):
    trainer = make_trainer(train=False, **SD)
    prompts = [Prompt(text, text) for text in ("a", "b")]
    handle = overflowing_vae(trainer, lambda row: row == 1)
    with closing(Scoring(trainer.config, trainer.world, trainer.fps)) as scoring:
        drawn = sample_fixed(trainer, scoring, prompts, 2, "pictures")
    handle.remove()
    assert drawn.faults == [None, DECODING, None, None] and not drawn.media[1].any()
    assert drawn.by_sample()[1] == {"pixels/brightness": None} and drawn.summary()["not_finite"] == 1


@pytest.mark.parametrize("recipe,overflows", [("flux_t2i_paper", True), ("hunyuan_t2i_paper", False)])
def test_a_vae_that_overflows_in_fp16_is_warned_of(capsys, recipe, overflows):
    """In the dry run as at start, by the checkpoint's own force_upcast: HunyuanVideo is published to run in fp16."""
    for precision in ("fp16", "bf16"):
        command = ["train", f"train_scripts/configs/{recipe}.yaml", "--dry-run", f"model.vae_precision={precision}"]
        assert cli.main(command) == 0
        assert ("overflows in it" in capsys.readouterr().out) == (overflows and precision == "fp16")
