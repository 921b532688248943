"""What a launcher says in the environment: nothing is as good as unset, and what cannot be is told in a line."""

import os

import pytest
import torch

from fastvideo_grpo import cli, launcher
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import UserError

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DRY_RUN = ["train", "train_scripts/configs/flux_t2i_tiny.yaml", "--dry-run"]


@pytest.fixture(autouse=True)
def none_set(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that it is what it was afterwards, whatever check() takes out
        monkeypatch.delenv(variable)
    # Of a process that has process groups, from another test, nothing is asked.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)


@pytest.mark.parametrize("empty", ["", " "])
def test_a_variable_that_is_set_to_nothing_is_not_set(monkeypatch, capsys, empty):
    for variable in VARIABLES:
        monkeypatch.setenv(variable, empty)
    assert cli.main(DRY_RUN) == 0
    assert "processes    1 (local" in capsys.readouterr().out
    assert not {*VARIABLES} & {*os.environ}, "libraries read them, too"
    for variable in VARIABLES:
        monkeypatch.setenv(variable, empty)
    assert World.current("cpu") == World()


@pytest.mark.parametrize("variable", [variable for variable in VARIABLES if variable != "MASTER_ADDR"])
@pytest.mark.parametrize("value", ["two", "-1", "1.5", "0x2", "²", "9" * 30])
def test_a_variable_that_is_no_number_is_told_in_a_line(monkeypatch, capsys, variable, value):
    monkeypatch.setenv(variable, value)
    assert cli.main(DRY_RUN) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{variable}={value!r}" in said and f"unset {variable}" in said
    with pytest.raises(UserError, match=variable):
        World.current("cpu")


def test_variables_that_cannot_both_be_and_missing_ones(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE=2, but not RANK, MASTER_ADDR, MASTER_PORT"):
        World.current("cpu")
    launcher.check()  # who only plans for them does not have to meet them
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="RANK=2 and WORLD_SIZE=2, but the first counts from 0 to 1"):
        launcher.check()


def test_world_sizes_to_plan_for(capsys):
    assert cli.main([*DRY_RUN, "--world-size", "0"]) == 1
    assert "--world-size is 0; it must be at least 1" in capsys.readouterr().err
