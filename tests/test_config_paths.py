"""``~`` and variables in paths: expanded in every path key and every argument that is one, once, or told."""

import argparse
import importlib
import os

import pytest

from fastvideo_grpo import cli
from fastvideo_grpo.commands.arguments import path_argument, seed_argument
from fastvideo_grpo.config import files as config_files
from fastvideo_grpo.config import saved as config_saved
from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.config.loading import reward_params
from fastvideo_grpo.config.paths import as_typed, expanded
from fastvideo_grpo.config.values import keys
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.models import run_config
from fastvideo_grpo.rewards import registry

GIVEN = ["model.path=m", "prompts.path=p.txt", "rewards.models.a.kind=jpeg_size", "run.dir=r"]
PATHS = [
    *("model.path", "prompts.path", "prompts.eval_path", "prompts.embeddings", "run.dir", "engine.deepspeed_json"),
    *("rewards.models.a.checkpoint", "rewards.models.a.python"),
]
PARAMS = {
    "hps": {"tokenizer"},
    "clip": {"tokenizer"},
    "pickscore": {"tokenizer"},
    "image_reward": {"tokenizer"},
    "aesthetic": {"clip"},
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    return str(tmp_path)


def value(config, dotted):
    found = config
    for part in dotted.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("~", "HOME"),
        ("~/x", "HOME/x"),
        ("~/$DATA", "HOME//data"),
        ("$HOME/x", "HOME/x"),
        ("${DATA}/x", "/data/x"),
        ("a/$DATA-b", "a//data-b"),
        ("x/~", "x/~"),
        ("./~", "./~"),
        ("a$$b", "a$b"),
        ("$$DATA", "$DATA"),
        ("a$", "a$"),
        ("$ 5", "$ 5"),
        ("plain/path with spaces", "plain/path with spaces"),
    ],
)
def test_what_a_path_stands_for(home, typed, meant):
    assert expanded(typed) == meant.replace("HOME", home)
    assert expanded(as_typed(expanded(typed))) == expanded(typed)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("~nobody-here/x", "there is no home ~nobody-here"),
        ("$NOWHERE/x", r"the variable \$NOWHERE is not set"),
        ("x/${NOWHERE}", r"the variable \$\{NOWHERE\} is not set"),
        ("$EMPTY/x", r"the variable \$EMPTY is empty"),
        ("${}/x", "is not set"),
        ("a\0b", "a path cannot hold a NUL character"),
        ("a\udcffb", "a path cannot hold the byte 0xff, which is not UTF-8"),
        ("", "a path cannot be empty"),
    ],
)
def test_what_it_cannot_stand_for_is_told_with_the_key(typed, message):
    with pytest.raises(ConfigError, match=rf"run.dir is .*: .*{message}|run.dir is .*{message}"):
        run_config.build({}, [*GIVEN, f"run.dir={typed}"])
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        path_argument(typed)


def test_an_empty_path_that_may_be_left_out_is_told_how():
    with pytest.raises(ConfigError, match=r"prompts.eval_path is '': a path cannot be empty, but null for none"):
        run_config.build({}, [*GIVEN, "prompts.eval_path="])


def test_no_home_is_no_folder_called_nothing(monkeypatch):
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ValueError, match="there is no home ~"):
        expanded("~/x")


@pytest.mark.parametrize("dotted", PATHS)
def test_every_path_key_is_expanded_on_the_command_line_and_in_files(home, tmp_path, dotted):
    more = ["engine.kind=deepspeed"]
    assert value(run_config.build({}, [*GIVEN, *more, f"{dotted}=~/$DATA/x"]), dotted) == f"{home}//data/x"
    file = tmp_path / "run.yaml"
    file.write_text(config_saved.to_yaml(run_config.build({}, [*GIVEN, *more])))
    assert value(run_config.load(file), dotted) == value(run_config.build({}, [*GIVEN, *more]), dotted)
    nested = "~/x"
    for part in reversed(dotted.split(".")):
        nested = {part: nested}
    (tmp_path / "over.yaml").write_text(f"base: run.yaml\n{config_files.dump(nested)}")
    assert value(run_config.load(tmp_path / "over.yaml"), dotted) == f"{home}/x"


def test_every_key_that_is_a_path_is_known_here():
    def paths(cls, prefix=""):
        for name, (_, key) in keys(cls).items():
            if key.sort in ("section", "names"):
                yield from paths(key.of, f"{prefix}{name}.{'a.' if key.sort == 'names' else ''}")
            elif key.metadata["path"]:
                yield prefix + name

    assert {*paths(Config)} == {*PATHS}
    assert registry.paths("videoalign") == {"template", "base"} and registry.paths("no such kind") == frozenset()
    assert {kind: {*registry.paths(kind)} for kind in PARAMS} == PARAMS


def test_paths_among_rewards_parameters_are_expanded(home, tmp_path):
    words = ["rewards.models.a.kind=hps", "rewards.models.a.params.tokenizer=~/t", "rewards.models.a.params.frames=~/f"]
    config = run_config.build({}, [*GIVEN, *words])
    assert config.rewards.models["a"].params == {"tokenizer": f"{home}/t", "frames": "~/f"}
    with pytest.raises(ConfigError, match=r"rewards.models.a.params.tokenizer is '~nobody-here/t': there is no home"):
        run_config.build({}, [*GIVEN, words[0], "rewards.models.a.params.tokenizer=~nobody-here/t"])
    assert reward_params("hps", ["tokenizer=$DATA/t", "batch_size=2"]) == {"tokenizer": "/data/t", "batch_size": 2}
    with pytest.raises(ConfigError, match=r"params.tokenizer is '\$NOWHERE/t': the variable"):
        reward_params("hps", ["tokenizer=$NOWHERE/t"])


def test_a_run_keeps_what_was_expanded_and_does_not_expand_it_again(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/strange/$DATA")
    words = ["run.dir=~/x", "rewards.models.a.kind=hps", "rewards.models.a.params.tokenizer=~/t"]
    config = run_config.build({}, [*GIVEN, *words])
    assert config.run.dir == "/strange/$DATA/x"
    (tmp_path / "config.yaml").write_text(config_saved.to_yaml(config))
    monkeypatch.setenv("HOME", home)
    assert run_config.load(tmp_path / "config.yaml") == config
    assert run_config.build(config_saved.to_dict(config)) == config
    assert config_saved.changed_on_resume(config_saved.to_dict(config), config) == []


def test_url_and_texts_are_no_paths():
    words = [
        "rewards.models.a.url=~/x",
        "sample.negative_prompt=~/$DATA",
        "sample.cfg_scale=2",
        "rewards.models.a.device=$DATA",
    ]
    config = run_config.build({}, [*GIVEN, *words])
    assert (config.rewards.models["a"].url, config.sample.negative_prompt) == ("~/x", "~/$DATA")
    assert config.rewards.models["a"].device == "$DATA"


@pytest.mark.parametrize("command", cli.SUBCOMMANDS)
def test_every_argument_that_is_a_path_is_expanded(command):
    parser = argparse.ArgumentParser()
    importlib.import_module(cli.SUBCOMMANDS[command][0]).add_arguments(parser)
    for action in parser._actions:
        if action.metavar in ("DIR", "FILE", "PATH", "CONFIG", "RUN", "RUN|CONFIG"):
            assert action.type is path_argument, f"{command} {action.option_strings or action.dest}"


@pytest.mark.parametrize("text", ["-1", "1.5", "x", "", "²", str(2**63), "9" * 5000])
def test_seeds_of_commands_are_those_of_configurations(text, capsys):
    for command in (["tiny", "flux"], ["make-references", "--model", "m", "--prompts", "p", "--out", "o"], ["demo"]):
        with pytest.raises(SystemExit):
            cli.parse([*command, f"--seed={text}"])
        assert f"is no whole number from 0 to {2**63 - 1}" in capsys.readouterr().err
    with pytest.raises(argparse.ArgumentTypeError):
        seed_argument(text)
    assert seed_argument("7") == 7


def test_a_command_says_which_argument_has_no_home(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["sample", "~nobody-here/run"])
    assert left.value.code == 2
    assert "RUN|CONFIG: '~nobody-here/run': there is no home ~nobody-here" in capsys.readouterr().err
    assert cli.parse(["tiny", "flux", "--out=~/x"])[0].out == os.path.expanduser("~/x")
