"""What is printed as a command runs as it stands: by its path, or after the line that puts it on the PATH."""

import re
import sys
from pathlib import Path

import pytest

from fastvideo_grpo import cli
from fastvideo_grpo.printed_commands import runnable

ROOT = Path(__file__).parent.parent
ACTIVATE = ". .venv/bin/activate"
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "data" / "README.md", *(ROOT / "train_scripts").glob("*.sh")]
# A line of its own, or what a line of a script's head ends in.
_COMMAND = re.compile(r"^(?:    |#.*[ (])(?:hf download|fastvideo-grpo [a-z]|torchrun |wandb )", re.MULTILINE)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment with these commands in ``env/bin``, in a working directory of its own, that nobody activated."""
    folder = tmp_path / "env" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "fastvideo-grpo", "hf"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return folder


def test_commands_of_an_environment_that_is_not_activated_are_written_by_their_path(environment, tmp_path, monkeypatch):
    said = "get it: hf download a/b --local-dir c; or fastvideo-grpo tiny flux --out d"
    assert runnable(said) == "get it: env/bin/hf download a/b --local-dir c; or env/bin/fastvideo-grpo tiny flux --out d"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert runnable("fastvideo-grpo doctor") == f"{environment}/fastvideo-grpo doctor"


def test_a_folder_with_a_space_is_quoted(tmp_path, monkeypatch):
    folder = tmp_path / "my project" / "bin"
    folder.mkdir(parents=True)
    (folder / "hf").write_text("#!/bin/sh\n")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.chdir(tmp_path)
    assert runnable("hf download a") == "'my project/bin/hf' download a"


def test_they_stay_as_they_are_where_the_shell_finds_them(environment, monkeypatch):
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin")
    assert runnable("fastvideo-grpo doctor, hf download a") == "fastvideo-grpo doctor, hf download a"


def test_those_of_another_environment_are_not_ours(environment, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "fastvideo-grpo").write_text("#!/bin/sh\n")
    (other / "fastvideo-grpo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{other}:/usr/bin")
    assert runnable("fastvideo-grpo doctor") == "env/bin/fastvideo-grpo doctor"


@pytest.mark.parametrize(
    "text",
    [
        "fastvideo-grpo train: no such file",  # who speaks
        "fastvideo-grpo 0.1.0",
        ".venv/bin/fastvideo-grpo doctor",
        "torchrun --nproc-per-node 8",  # not installed in that environment
        "half download",
    ],
)
def test_what_is_no_command_of_ours_stays(environment, text):
    assert runnable(text) == text


def test_help_and_errors_print_commands_that_run(environment, capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "--help"])
    assert "\n  env/bin/fastvideo-grpo sample runs/flux --prompt" in capsys.readouterr().out
    assert cli.main(["study", "--out", "nowhere", "--docs", "page.md"]) == 1
    assert "env/bin/fastvideo-grpo study all --out nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_what_puts_its_commands_on_the_path_before_the_first(page):
    text = page.read_text(encoding="utf-8")
    first = _COMMAND.search(text)
    assert first is None or ACTIVATE in text[: first.start()], f"{page.name}: {first[0]!r} comes before {ACTIVATE}"
