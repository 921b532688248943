"""What a run prints is ours: no bar, warning or farewell of a library stands between its lines or behind them."""

import os
import re
import subprocess
import sys

import pytest

from fastvideo_grpo.models.registry import FAMILIES
from tests import fork_server
from tests.promises.models import MODELS
from tests.trainer import runs

LINES = (
    r"loaded \S+: [\d.]+ [MG]iB in [\d.]+ s",
    r"evaluation (before training|after \d+): .*",
    r"iteration +\d+/\d+  .*  [\d.]+ s, [\d.]+ a sample",
)
QUICK = ("flux", "stable_diffusion", "wan")
KINDS = [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in FAMILIES.names() if kind in MODELS]
SHORT = {"run__iterations": 2, "run__eval_every": 2, "run__eval_prompts": 1, "run__sample_every": 2, "run__sample_prompts": 1}


def command(folder, checkpoint, kind, **more):
    """The command line of a short run, and where its configuration is."""
    settings = {**MODELS[kind].run(), **SHORT, "grpo__prompts_per_iteration": 2, "grpo__group_size": 2, **more}
    (folder / "empty.yaml").write_text("{}")
    overrides = runs.settings(folder, checkpoint, **{**settings, "rewards__models__pixels__kind": "jpeg_size"})
    return ["-m", "fastvideo_grpo.cli", "train", str(folder / "empty.yaml"), *overrides]


def assert_ours(printed, iterations=2):
    lines = printed.splitlines()
    strange = [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in LINES)]
    assert not strange, "\n".join(strange)
    assert lines[0].startswith("loaded ") and sum(line.startswith("iteration") for line in lines) == iterations


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_prints_its_own_lines_alone(kind, tiny_checkpoint, tmp_path):
    """In a process that has imported the libraries: what they say when a model is loaded, trained and let go."""
    done = fork_server.run([sys.executable, *command(tmp_path, tiny_checkpoint(kind), kind)], timeout=runs.TIMEOUT)
    assert (done.returncode, done.stderr) == (0, "")
    assert_ours(done.stdout)


FRESH = {
    "flux": {},
    "flux, ZeRO 1 alone": {"engine__kind": "deepspeed", "engine__zero_stage": 1},
    "hunyuan_video": {},
    "skyreels_i2v": {},
    "stable_diffusion": {},
    "stable_diffusion, ZeRO 3 alone": {"engine__kind": "deepspeed", "engine__zero_stage": 3},
    "wan": {},
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "flux, ZeRO 1 alone" else [pytest.mark.slow]) for case in FRESH]
)
def test_a_fresh_interpreter_says_no_more(case, tiny_checkpoint, tmp_path):
    """What libraries say when they are imported, and when the process ends."""
    kind = case.partition(",")[0]
    words = command(tmp_path, tiny_checkpoint(kind), kind, **FRESH[case])
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=runs.TIMEOUT)
    assert (done.returncode, done.stderr) == (0, "")
    assert_ours(done.stdout)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_processes_print_what_one_does(stage, tiny_checkpoint, tmp_path):
    more = {"engine__kind": "deepspeed", "engine__zero_stage": stage}
    settings = {**MODELS["flux"].run(), **SHORT, "rewards__models__pixels__kind": "jpeg_size", **more}
    assert runs.run(runs.settings(tmp_path, tiny_checkpoint("flux"), **settings), processes=2) == [0, 0]
    assert_ours(runs.output(tmp_path))


@pytest.mark.slow
def test_torchrun_adds_nothing(tiny_checkpoint, tmp_path):
    two = {"engine__kind": "deepspeed", "engine__zero_stage": 2, "grpo__prompts_per_iteration": 4}
    words = command(tmp_path, tiny_checkpoint("flux"), "flux", **two)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # torchrun tells who has not set it
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=runs.TIMEOUT, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert_ours(done.stdout)
