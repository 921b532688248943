"""What goes wrong around a run, and what must not follow from it."""

import errno
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fastvideo_grpo.errors import ConfigError, UserError
from fastvideo_grpo.rewards.base import RewardResult
from fastvideo_grpo.rewards.output_transform import OutputTransform
from tests.trainer import runs


def test_a_full_disk_at_metrics_pictures_or_checkpoints_does_not_end_the_run(make_trainer, monkeypatch):
    """Promise 6: writing stops, training does not; what was saved stays."""
    from fastvideo_grpo.checkpoints import store
    from fastvideo_grpo.disk import durable_files
    from fastvideo_grpo.tracking import metrics, pictures
    from fastvideo_grpo.trainers import monitoring, training_run

    trainer = make_trainer(run__sample_every=1, run__iterations=3, run__keep=3)
    told = []
    for module in (training_run, store, durable_files):
        monkeypatch.setattr(module.logger, "error", lambda text, *args: told.append(text % args))
    full = OSError(errno.ENOSPC, "No space left on device")
    state = {"full": False}

    def guard(function):
        def maybe_full(*args, **kwargs):
            if state["full"]:
                raise full
            return function(*args, **kwargs)

        return maybe_full

    monkeypatch.setattr(metrics.MetricsLog, "append", guard(metrics.MetricsLog.append))
    monkeypatch.setattr(monitoring, "save_samples", guard(pictures.save_samples))
    save = trainer.engine.save
    monkeypatch.setattr(trainer.engine, "save", guard(save))
    rollout = trainer.rollout

    def fill_up(iteration, groups, clock):
        state["full"] = iteration == 1  # full during the second iteration only
        return rollout(iteration, groups, clock)

    monkeypatch.setattr(trainer, "rollout", fill_up)
    trainer.train()
    assert [line["iteration"] for line in trainer.run.log.read()] == [0, 2]
    assert trainer.run.store.iterations() == [1, 3]
    assert any("metrics.jsonl was not written" in line for line in told)
    assert any("000002 was not saved" in line for line in told)


def test_a_run_that_fails_while_it_is_set_up_says_so_and_lets_go_of_its_folder(make_trainer, monkeypatch, tmp_path):
    from fastvideo_grpo.rewards.placement.inline import InlineReward
    from fastvideo_grpo.trainers.policy import Policy

    closed = []
    with monkeypatch.context() as patch:
        patch.setattr(InlineReward, "close", lambda reward: closed.append(reward))
        patch.setattr(Policy, "make_trainable", lambda policy, reference: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_trainer()
        assert len(closed) == 1
    assert json.loads((tmp_path / "run" / "status.json").read_text())["ended"].startswith("failed: ZeroDivisionError")
    assert "failed while setting up" in make_trainer().run.status.before


def test_another_starting_model_is_refused_on_resume_wherever_it_lies(make_trainer, tiny_flux, tmp_path):
    from fastvideo_grpo.models.flux.tiny import write_flux

    trainer = make_trainer(model__lora__rank=4, run__iterations=1)
    trainer.train()
    other = write_flux(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="holds another network"):
        make_trainer(model__lora__rank=4, run__iterations=2, model__path=other)
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_flux)
    make_trainer(model__lora__rank=4, run__iterations=2, model__path=moved).train()


def test_the_folder_of_another_run_is_refused_before_the_model_is_loaded(make_trainer):
    from fastvideo_grpo.planning import plan

    trainer = make_trainer(run__iterations=1)
    trainer.train()
    plan.check_folder(trainer.config)
    trainer.config.optim.lr = 1.0
    with pytest.raises(ConfigError, match=r"other values of optim\.lr"):
        plan.check_folder(trainer.config)


@pytest.mark.parametrize("what", ["read-only run.dir", "a file for run.dir", "no room for checkpoints", "read-only embeddings"])
def test_a_disk_that_will_not_do_is_told_before_the_model_is_loaded(tiny_flux, tmp_path, monkeypatch, capsys, what):
    """In a line, by the dry run as a note; nothing is made."""
    from fastvideo_grpo import cli
    from fastvideo_grpo.checkpoints import folder
    from fastvideo_grpo.disk import room as disk_room
    from fastvideo_grpo.models.flux import trainer as flux

    file, place = tmp_path / "run.yaml", tmp_path / "there"
    file.write_text("{}")
    values, expected = {"run__dir": place / "run"}, f"run.dir={place / 'run'} cannot be written: Read-only file system"
    place.mkdir()
    if what == "a file for run.dir":
        place.rmdir()
        place.write_text("mine")
        expected = f"run.dir={place / 'run'} cannot be written: a file, not a folder ({place}); repair it, or choose another"
    elif what == "no room for checkpoints":
        monkeypatch.setattr(folder, "free_bytes", lambda path: 7 << 20)
        expected = "MiB, and its disk has 7.0 MiB free, where 2 must fit"
    elif what == "read-only embeddings":
        values = {"prompts__embeddings": place / "embeddings"}
        expected = f"prompts.embeddings={place / 'embeddings'} "
    if what.startswith("read-only"):
        tried = tempfile.TemporaryFile

        def refused(dir):
            if Path(dir).is_relative_to(place):
                raise OSError(errno.EROFS, "Read-only file system")
            return tried(dir=dir)

        monkeypatch.setattr(disk_room.tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(flux.FluxGRPOTrainer, "__init__", lambda *arguments, **named: pytest.fail("the model is loaded"))
    command = ["train", str(file), *runs.settings(tmp_path / "prompts", tiny_flux, **values)]
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert cli.main([*command, "--dry-run"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert sum(expected in line for line in notes) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert cli.main(command) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert expected in told[-1] and "Traceback" not in "".join(told)
    if what != "read-only embeddings":
        assert sorted(path.name for path in tmp_path.rglob("*")) == before


class _Watched:
    """An output that always works and one that never does."""

    outputs, media_kind = ("good", "broken"), "any"

    def score(self, request):
        good = request.media.double().mean((1, 2, 3, 4)).float()
        return RewardResult({"good": good, "broken": torch.full_like(good, torch.nan)}, torch.ones(len(good), dtype=torch.bool))

    def to(self, device):
        return self

    def close(self):
        pass


@pytest.mark.parametrize("weight,stops", [(0.0, False), (1.0, True)])
def test_only_rewards_that_count_can_stop_a_run(make_trainer, weight, stops):
    """One dead output among several masks every sample if it counts, and none if it is only watched."""
    trainer = make_trainer(run__iterations=1, rewards__max_invalid_fraction=0.9)
    trainer.run.scoring.rewards.rewards = {"pixels": _Watched()}
    trainer.run.scoring.rewards.weights = {"pixels/good": 1.0, "pixels/broken": weight}
    trainer.run.scoring.rewards.transforms = dict.fromkeys(trainer.run.scoring.rewards.weights, OutputTransform())
    if stops:
        with pytest.raises(UserError, match="16 of 16 samples"):
            trainer.train()
    else:
        trainer.train()
        (line,) = trainer.run.log.read()
        assert line["train/updates"] == 2 and line["reward/pixels/broken/invalid"] == 16


def test_training_needs_no_git(tmp_path):
    code = "from fastvideo_grpo.tracking.provenance import git_commit; print(git_commit())"
    for path, expected in (("", "None"), (None, None)):
        environment = {"PATH": path} if path is not None else None
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert expected is None or done.stdout.strip() == expected


def test_sample_needs_neither_training_prompts_nor_rewards(make_trainer, tmp_path):
    from fastvideo_grpo import cli

    trainer = make_trainer(run__iterations=1)
    trainer.train()
    (tmp_path / "prompts.txt").unlink()
    out = tmp_path / "pictures"
    assert cli.main(["sample", str(trainer.run.folder), "--prompt", "a cat", "--no-rewards", "--out", str(out)]) == 0
    made = {"checkpoint": str(trainer.run.store.path(1)), "weights": "model"}
    assert json.loads((out / "index.json").read_text()) == [{"file": "0000.png", "prompt": "a cat", "rewards": {}, **made}]


def test_a_wrong_lora_target_is_told_before_anything_is_loaded(tiny_flux, tmp_path, capsys):
    from fastvideo_grpo import cli

    file = tmp_path / "run.yaml"
    file.write_text("{}")
    overrides = runs.settings(tmp_path, tiny_flux, model__lora__targets="[to_q,to_x]")
    assert cli.main(["train", str(file), *overrides]) == 1
    assert "no linear layer ends in to_x" in capsys.readouterr().err
