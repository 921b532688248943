"""A package of somebody else's adds a model, a reward, a transition and an objective; no file of this one knows of it."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from fastvideo_grpo import cli, extensions, models
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import ConfigError, UserError
from fastvideo_grpo.grpo.objectives import OBJECTIVES
from fastvideo_grpo.models import registry as model_registry
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.models.wan.tiny import write_wan
from fastvideo_grpo.rewards.registry import REWARDS
from fastvideo_grpo.sampling import transitions
from fastvideo_grpo.sampling.transitions import TRANSITIONS
from fastvideo_grpo.trainers.load import trainer_class

ROOT = Path(__file__).parent.parent
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
OFFERED = {
    "models": "dots = dots.model.family:FAMILY",
    "rewards": "contrast = dots.reward:Contrast",
    "transitions": "fading_sde = dots.transition:FadingSDE",
    "objectives": "reinforce = dots.objective:Reinforce",
}
REGISTRIES = {"models": FAMILIES, "rewards": REWARDS, "transitions": TRANSITIONS, "objectives": OBJECTIVES}
RUN = """
model: {kind: dots, path: model}
prompts: {path: prompts.txt, text_length: 8}
sample: {noise_level: 0.5}
grpo: {prompts_per_iteration: 2, group_size: 4, objective: reinforce, objective_params: {strength: 2.0}}
rewards: {models: {look: {kind: contrast, params: {scale: 0.5}}}}
optim: {lr: 1.0e-2}
engine: {micro_batch_size: 2}
run: {dir: run, iterations: 2, eval_every: 0, sample_every: 0, threads: 1}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The installed packages of an environment that has everything this one has, and in which the package of tests/outside was
    installed by the command that docs/extending.md gives."""
    folder = tmp_path_factory.mktemp("outside")
    shutil.copytree(ROOT / "tests" / "outside" / "dots", folder / "dots", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "environment"], check=True)
    site = folder / "environment" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (site / "all_of_ours.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    command = next(line for line in EXTENDING.splitlines() if "pip install" in line).split()
    assert command[0] == "python"
    # Nothing is fetched: what would be missing, FastVideo's kernels, builds nowhere without a GPU.
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [folder / "environment" / "bin" / "python", *command[1:]], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.fixture
def installed(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "dots"]:
        del sys.modules[name]


@pytest.fixture
def folder(installed, tmp_path, monkeypatch):
    """A working directory with a configuration of all four, prompts and the model's checkpoint."""
    from dots.model.tiny import write_dots

    write_dots(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("many dots\nfew dots\n")
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def offer(monkeypatch):
    """offer(sort, name, value): what an installed package would offer."""
    points = []
    monkeypatch.setattr(extensions, "entry_points", lambda group: [point for point in points if point.group == group])
    return lambda sort, name, value: points.append(importlib.metadata.EntryPoint(name, value, f"fastvideo_grpo.{sort}"))


def test_the_page_shows_the_package_that_is_tested():
    assert textwrap.indent((ROOT / "tests" / "outside" / "dots" / "setup.py").read_text(), "    ") in EXTENDING


def test_a_package_adds_all_four_and_trains(folder, site):
    command = [site.parents[2] / "bin" / "python", "-m", "fastvideo_grpo.cli", "train", "run.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.stderr == ""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1]
    for line in lines:
        assert line["train/ratio_first_update_max_dev"] == 0.0
        assert line["train/grad_norm"] > 0 and line["train/updates"] == 2
        assert line["reward/look/contrast/mean"] > 0
        assert line["perf/update_tflop"] > 0
    assert (folder / "run" / "checkpoints" / "000002").is_dir()


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """The package's model, moved into the folder of this project's own."""
    shutil.copytree(ROOT / "tests" / "outside" / "dots" / "dots" / "model", tmp_path / "models" / "dots")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "models")])
    monkeypatch.setattr(FAMILIES, "_registered", dict(FAMILIES._registered))
    model_registry.import_own.cache_clear()
    yield
    model_registry.import_own.cache_clear()
    for name in [name for name in sys.modules if name.startswith("fastvideo_grpo.models.dots")]:
        del sys.modules[name]


def test_its_model_moved_into_this_project_is_one_of_it(moved, tmp_path, monkeypatch, capsys):
    """A folder is all that a model is: no file has to be edited."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tiny", "dots", "--out", "model"]) == 0
    (tmp_path / "prompts.txt").write_text("many dots\nfew dots\n")
    own = RUN.replace("reinforce, objective_params: {strength: 2.0}", "grpo, updates_per_iteration: 2")
    (tmp_path / "run.yaml").write_text(own.replace("contrast, params: {scale: 0.5}", "jpeg_size"))
    assert cli.main(["train", "run.yaml", "sample.transition=flow_sde", "run.iterations=1"]) == 0
    assert (tmp_path / "run" / "checkpoints" / "000001").is_dir()
    with pytest.raises(ConfigError, match=r"model\.kind is 'dotz' .*allowed: dots, flux"):
        run_config.load("run.yaml", ["model.kind=dotz"])


@pytest.mark.parametrize(
    "family,message",
    [("", "has a FAMILY which is no object of .*Family, but a NoneType"), ("kind = 'dot'", "has a FAMILY whose kind is 'dot'")],
)
def test_a_folder_whose_family_is_none_is_told(moved, tmp_path, family, message):
    file = tmp_path / "models" / "dots" / "family.py"
    text = file.read_text()
    file.write_text(text.replace("FAMILY = ", "_OTHER = ") if not family else text.replace('kind="dots"', 'kind="dot"'))
    with pytest.raises(TypeError, match=message):
        FAMILIES.names()


def test_a_dry_run_describes_it(folder, capsys):
    assert cli.main(["train", "run.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in ("3x4x4, 16 tokens", "4 steps of fading_sde", "look (contrast)", "update     reinforce", "0.000 M parameters"):
        assert part in said


def test_blocks_that_a_family_does_not_name_cannot_be_recomputed_or_compiled(folder, capsys):
    settings = ["engine.activation_checkpointing=every:2", "model.compile=blocks"]
    assert cli.main(["train", "run.yaml", "--dry-run", *settings]) == 1
    said = capsys.readouterr().err
    assert "engine.activation_checkpointing is every:2, but dots names no blocks to recompute; use none" in said
    assert "model.compile is blocks, but dots names no blocks to compile; use none" in said


def test_model_and_objective_bring_their_defaults_and_a_run_overrides_them(folder):
    config = run_config.load("run.yaml")
    assert (config.sample.height, config.sample.steps, config.sample.transition) == (8, 4, "fading_sde")
    assert (config.sample.init_noise, config.grpo.updates_per_iteration) == ("per_sample", 2)
    assert run_config.load("run.yaml", ["sample.init_noise=shared"]).sample.init_noise == "shared"


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("model.kind", "dotz", "dots"),
        ("sample.transition", "fadingsde", "fading_sde"),
        ("grpo.objective", "reinforced", "reinforce"),
    ],
)
def test_wrong_names_list_those_of_packages_and_the_nearest(folder, key, wrong, right):
    with pytest.raises(ConfigError, match=rf"{key} is '{wrong}' \(did you mean '{right}'\?\); allowed: .*{right}"):
        run_config.load("run.yaml", [f"{key}={wrong}"])


def test_names_are_known_without_importing_the_package(installed):
    for sort, registry in REGISTRIES.items():
        assert OFFERED[sort].partition(" ")[0] in registry.names()
    assert not any(name.partition(".")[0] == "dots" for name in sys.modules)


def test_a_checkpoint_of_our_own_is_read_without_importing_the_package(installed, tmp_path):
    config = run_config.build(
        {
            "model": {"kind": "wan", "path": str(write_wan(tmp_path / "wan"))},
            "prompts": {"path": "prompts.txt"},
            "rewards": {"models": {"size": {"kind": "jpeg_size"}}},
            "run": {"dir": "run"},
        }
    )
    assert model_facts(config).hidden_width == 64
    assert not any(name.partition(".")[0] == "dots" for name in sys.modules)


@pytest.mark.parametrize("sort", REGISTRIES)
def test_what_cannot_be_imported_is_told_when_it_is_asked_for(offer, sort):
    offer(sort, "broken", "no_such_package:Thing")
    registry = REGISTRIES[sort]
    assert "broken" in registry.names() and "broken" not in registry.usable()
    with pytest.raises(ValueError, match=r"'broken' is offered by .*'no_such_package:Thing'.* be imported: ModuleNotFound"):
        registry["broken"]


@pytest.mark.parametrize(
    ("key", "sort"), [("model.kind", "models"), ("sample.transition", "transitions"), ("grpo.objective", "objectives")]
)
def test_a_configuration_names_the_key_of_what_cannot_be_imported(folder, offer, key, sort):
    offer("models", "dots", "dots.model.family:FAMILY")
    offer("transitions", "fading_sde", "dots.transition:FadingSDE")
    offer("objectives", "reinforce", "dots.objective:Reinforce")
    offer(sort, "broken", "no_such_package:Thing")
    with pytest.raises(ConfigError, match=rf"{key}: .*'broken' is offered by .*no_such_package"):
        run_config.load("run.yaml", [f"{key}=broken"])


@pytest.mark.parametrize(
    ("sort", "own"), [("models", "flux"), ("rewards", "jpeg_size"), ("transitions", "ddim"), ("objectives", "grpo")]
)
def test_a_package_cannot_replace_what_is_there(offer, sort, own):
    offer(sort, own, "elsewhere:Thing")
    with pytest.raises(ValueError, match=rf"'{own}' is offered more than once: fastvideo_grpo\..*, 'elsewhere:Thing'"):
        REGISTRIES[sort][own]


def test_two_packages_cannot_offer_one_name(offer):
    offer("objectives", "new", "one:Thing")
    offer("objectives", "new", "another:Thing")
    with pytest.raises(ValueError, match="offered more than once: 'one:Thing', 'another:Thing'"):
        OBJECTIVES["new"]


@pytest.mark.parametrize(
    ("sort", "value", "message"),
    [
        ("models", "fastvideo_grpo.models.family:Family", "no object of fastvideo_grpo.models.family.Family, but a class"),
        ("models", "dots.model.family:FAMILY", "kind is 'dots'; both must be the same"),
        ("rewards", "fastvideo_grpo:__version__", "no class and no function, but a str"),
        ("transitions", "fastvideo_grpo:__version__", "no class and no function, but a str"),
        ("transitions", "dots.reward:Contrast", "`prediction` is None; allowed: velocity, noise"),
        ("objectives", "fastvideo_grpo:__version__", "no class and no function, but a str"),
    ],
)
def test_an_entry_point_to_something_else_is_refused(installed, offer, sort, value, message):
    offer(sort, "new", value)
    with pytest.raises(ValueError, match=message):
        REGISTRIES[sort]["new"]


def test_an_objective_that_does_not_say_what_it_needs_is_refused(folder, offer):
    for sort, line in OFFERED.items():
        offer(sort, *line.split(" = "))
    offer("objectives", "silent", "dots.reward:Contrast")
    (folder / "run.yaml").write_text(RUN.replace(", objective_params: {strength: 2.0}", ""))
    with pytest.raises(ConfigError, match="objective silent does not say loss, needs_reference"):
        run_config.load("run.yaml", ["grpo.objective=silent"])


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"sample": {"hight": 8}}, r"grpo.objective=reinforce brings .*unknown key sample.hight: did you mean sample.height"),
        ({"sample": {"height": "tall"}}, r"grpo.objective=reinforce brings .*sample.height"),
    ],
)
def test_defaults_that_cannot_be_are_told_with_who_brings_them(folder, monkeypatch, defaults, message):
    monkeypatch.setattr(OBJECTIVES["reinforce"], "defaults", defaults)
    with pytest.raises(ConfigError, match=message):
        run_config.load("run.yaml")


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ("no_such_package:Trainer", "no_such_package:Trainer cannot be imported: ModuleNotFoundError"),
        ("dots.model.family:FAMILY", "dots.model.family:FAMILY is no class that inherits from GRPOTrainer"),
        ("fastvideo_grpo.trainers.base:GRPOTrainer", "does not say __init__, encode, generate, get_module"),
        ("dots.model.family:Missing", "dots.model.family:Missing is no class that inherits from GRPOTrainer, but None"),
    ],
)
def test_a_family_whose_trainer_is_none_is_told(installed, trainer, message):
    object.__setattr__(FAMILIES["dots"], "trainer", trainer)
    with pytest.raises(UserError, match=message):
        trainer_class("dots")


def test_a_reference_in_partitions_is_refused_for_a_model_that_does_not_say_how_it_is_read(folder):
    trainer = trainer_class("dots")(run_config.load("run.yaml"), World())
    trainer.config.engine.kind, trainer.config.engine.zero_stage = "deepspeed", 3
    with pytest.raises(UserError, match=r"model\.kind=dots.*no load_denoiser.*use engine\.zero_stage=2 or model\.lora"):
        trainer.make_reference()


def test_a_models_refusal_names_transitions_of_packages_that_fit(folder, capsys):
    assert "fading_sde" in transitions.predicting("velocity") and "fading_sde" not in transitions.predicting("noise")
    assert cli.main(["train", "run.yaml", "--dry-run", "sample.transition=ddim"]) == 1
    assert "dots predicts velocity; use cps or fading_sde or flow_sde" in capsys.readouterr().err


def test_a_network_that_is_none_of_diffusers_trains_but_is_not_exported(folder, capsys):
    assert cli.main(["train", "run.yaml", "run.iterations=1"]) == 0
    assert cli.main(["export", "run", "--out", "exported"]) == 1
    assert "diffusers has no DotsNetwork: it cannot be exported" in capsys.readouterr().err
    assert not (folder / "exported").exists()
