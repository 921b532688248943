"""What is said of a run before its model is loaded, and by a dry run: a finished run, wandb without a key, media that a reward
cannot look at."""

from types import SimpleNamespace

import pytest

from fastvideo_grpo import cli
from fastvideo_grpo.checkpoints.store import CheckpointStore
from fastvideo_grpo.config import saved as config_saved
from fastvideo_grpo.errors import ConfigError, UserError
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.models.flux.tiny import write_flux
from fastvideo_grpo.models.hunyuan_video.tiny import write_hunyuan_video
from fastvideo_grpo.planning import plan
from fastvideo_grpo.rewards import registry
from fastvideo_grpo.rewards.placement import entries as placement
from fastvideo_grpo.rewards.rules.jpeg_size import JpegSize
from fastvideo_grpo.tracking import wandb_run
from fastvideo_grpo.trainers import load

KEY = "x" * 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_flux(tmp_path_factory.mktemp("before") / "flux")


@pytest.fixture
def words(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "load_trainer", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "run.yaml").write_text("")
    return [
        str(tmp_path / "run.yaml"),
        f"model.path={checkpoint}",
        f"prompts.path={tmp_path / 'prompts.txt'}",
        "prompts.text_length=16",
        "sample.height=32",
        "sample.width=32",
        "rewards.models.size.kind=jpeg_size",
        f"run.dir={tmp_path / 'run'}",
        "run.iterations=4",
    ]


# --- finished runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(words, tmp_path, monkeypatch):
    """finished(iteration): a checkpoint of that iteration in the run's folder; gives it back."""
    monkeypatch.setattr(plan, "check_folder", lambda config: None)  # whose run it is, is not asked here
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=3)

    def save(iteration):
        store.save(iteration, lambda folder: (folder / "weights").write_text("whole") and {})
        return store.path(iteration)

    return save


@pytest.mark.parametrize("iteration", [4, 6])
def test_a_finished_run_is_told_without_loading_with_the_number_it_has(words, finished, capsys, iteration):
    finished(iteration)
    assert cli.main(["train", *words]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"has its {iteration} iterations (run.iterations=4); raise run.iterations" in said
    assert cli.main(["train", *words, "--dry-run"]) == 0
    assert f"has its {iteration} iterations (run.iterations=4)" in capsys.readouterr().out


def test_a_run_that_is_not_finished_is_loaded(words, finished, capsys):
    finished(3)
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        cli.main(["train", *words])
    assert cli.main(["train", *words, "--dry-run"]) == 0
    assert "has a checkpoint of iteration 3: the run goes on there" in capsys.readouterr().out


def test_a_damaged_last_checkpoint_finishes_no_run(words, finished, capsys):
    finished(3)
    (finished(4) / "weights").write_text("torn")
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        cli.main(["train", *words])


def test_a_run_with_damaged_checkpoints_only_is_told_without_loading(words, tmp_path, capsys):
    (tmp_path / "run" / "checkpoints" / "000003").mkdir(parents=True)
    assert cli.main(["train", *words]) == 1
    assert "checkpoints is damaged; to start over, choose another run.dir" in capsys.readouterr().err


# --- wandb ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home and a working directory in which nobody logged in."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "WANDB_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home" / ".config" / "wandb").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def test_wandb_online_without_a_key_is_told_before_a_model_is_loaded(words, home, capsys):
    assert cli.main(["train", *words, "run.wandb=online"]) == 1
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "no key for https://api.wandb.ai" in said
        and "wandb login`, or set run.wandb=offline" in said
    )
    assert cli.main(["train", *words, "run.wandb=online", "--dry-run"]) == 0
    assert "note         run.wandb is online, but there is no key" in capsys.readouterr().out
    assert wandb_run.missing_key("offline") is None is wandb_run.missing_key("disabled")


def test_a_key_is_found_where_wandb_finds_it(home, monkeypatch):
    def missing():
        return wandb_run.missing_key("online") is not None

    assert missing()
    (home / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    assert not missing()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert missing()
    (home / ".netrc").write_text(f"machine wandb.example.org:8080\n  login user\n  password {KEY}\n")
    assert not missing()
    (home / ".netrc").write_text("machine machine machine")
    assert missing()
    (home / "other").write_text(f"machine wandb.example.org:8080 login user password {KEY}\n")
    monkeypatch.setenv("NETRC", "~/other")
    assert not missing()
    monkeypatch.delenv("NETRC")
    monkeypatch.delenv("WANDB_BASE_URL")
    (home / ".config" / "wandb" / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    (home / ".netrc").write_text(f"machine wandb.example.org login user password {KEY}\n")
    assert not missing()
    (home / ".netrc").unlink()
    assert missing()
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.setenv(variable, "")
        assert missing()
        monkeypatch.setenv(variable, KEY)
        assert not missing()
        monkeypatch.delenv(variable)


def test_what_wandb_refuses_is_told_in_a_line(home, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match=r"run.wandb=online: .*key.*set run.wandb=offline or disabled"):
        wandb_run.WandbRun("online", tmp_path, {})


# --- media ------------------------------------------------------------------------------------------------------------


def test_a_reward_of_clips_is_refused_for_images_before_a_model_is_loaded(words, capsys):
    line = "rewards.models.size scores videos, but the model makes 1 frame(s) (sample.frames); use a reward for images"
    for more in ([], ["--dry-run"]):
        assert cli.main(["train", *words, "rewards.models.size.kind=moving_colour", *more]) == 1
        assert line in capsys.readouterr().err


def test_a_reward_of_images_is_refused_for_clips(tmp_path, monkeypatch):
    class Stills(JpegSize):
        media_kind = "image"

    monkeypatch.setitem(registry.REWARDS._registered, "stills", Stills)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    settings = [
        f"model.path={write_hunyuan_video(tmp_path / 'model')}",
        f"prompts.path={tmp_path / 'prompts.txt'}",
        *("model.kind=hunyuan_video", "prompts.text_length=16", "sample.height=32", "sample.width=32"),
        *("rewards.models.look.kind=stills", "run.dir=x"),
    ]
    config = run_config.build({}, [*settings, "sample.frames=5"])
    with pytest.raises(ConfigError, match=r"rewards.models.look scores images, but the model makes 5 frame.*for videos"):
        plan.check_run(config, model_facts(config), 1)
    plan.check_run(run_config.build({}, settings), model_facts(config), 1)


def test_a_server_is_asked_what_it_looks_at(monkeypatch):
    served = SimpleNamespace(media_kind="video", close=lambda: None)
    monkeypatch.setattr(placement, "_http", lambda entry, timeout_s: served)
    entry = {"kind": "videoalign", "placement": "http", "url": "http://127.0.0.1:1"}
    placement.check_here("far", entry, 5)
    with pytest.raises(ValueError, match=r"rewards.models.far scores videos, but the model makes 1 frame"):
        placement.check_here("far", entry, 1)
    placement.check_kind_of_media("far", entry, 1)  # whatever it is here


def test_the_configuration_that_a_dry_run_prints_reads_back(words, tmp_path, capsys):
    assert cli.main(["train", *words, "sample.cfg_scale=2", "sample.negative_prompt=no", "--dry-run"]) == 0
    printed = capsys.readouterr().out.partition("\n\n")[0] + "\n"
    (tmp_path / "printed.yaml").write_text(printed)
    config = run_config.load(tmp_path / "printed.yaml")
    assert config.sample.negative_prompt == "no" and config_saved.to_yaml(config) == printed
