"""The batch script and the train scripts, with stand-ins for what Slurm brings: two nodes are two tasks of this machine."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

from fastvideo_grpo import cli
from fastvideo_grpo.trainers.stopping import EXIT_STOPPED
from tests import fork_server
from tests.trainer import runs

ROOT = Path(__file__).parent.parent.parent
BATCH = ROOT / "train_scripts" / "slurm" / "train.sbatch"

# srun hands its signals on to its tasks, and exits with the highest code of a task, or 128 + signal.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
words = sys.argv[1:]
options, command = words[: words.index("bash")], words[words.index("bash") :]
count = int(options[options.index("--ntasks") + 1])
environments = [{{**os.environ, "SLURM_NODEID": str(node)}} for node in range(count)]
tasks = [subprocess.Popen(command, env=environment) for environment in environments]
def forward(number, frame):
    for task in tasks:
        if task.poll() is None:
            task.send_signal(number)
signal.signal(signal.SIGUSR1, forward)
signal.signal(signal.SIGTERM, forward)
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf '127.0.0.1\\n127.0.0.2\\n'; else echo "$@" >> "$SCONTROL_LOG"; fi
"""
# Stands for the interpreter: writes down what it was asked to run; what has $FAIL in it leaves with $CODE.
PYTHON = """#!/bin/sh
echo "${NODE_RANK:-} $*" >> "$CALLS"
if [ -n "$FAIL" ]; then case "$*" in *"$FAIL"*) exit "$CODE" ;; esac; fi
case "$*" in
  *"cli export"*) out=${*#*--out }; out=${out%% *}; mkdir -p "$out"; touch "$out/model_index.json" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path):
    """What a job on two nodes finds in its environment."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python-stand-in", PYTHON)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": str(programs / "python-stand-in"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CALLS": str(tmp_path / "calls"),
        "SCONTROL_LOG": str(tmp_path / "requeued"),
        "LOGS": str(tmp_path / "logs"),
        "FAIL": "",
        "CODE": "0",
        "GPUS": "1",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def _bash(environment, *words, cwd=ROOT):
    return subprocess.run(["bash", *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def _batch(environment, *words):
    """Slurm starts a copy of the batch script, from anywhere."""
    copy = shutil.copy(BATCH, Path(environment["CALLS"]).parent / "slurm_script")
    return _bash(environment, copy, *words, cwd="/")


def test_the_batch_script_starts_a_train_script_on_every_node(slurm, tmp_path):
    done = _batch({**slurm, "GPUS": "", "SLURM_GPUS_ON_NODE": "4"}, "flux_t2i", "released", "run.iterations=7")
    assert done.returncode == 0, done.stderr
    calls = sorted((tmp_path / "calls").read_text().splitlines())
    assert [call.split()[0] for call in calls] == ["0", "1"]
    for node, call in enumerate(calls):
        assert f"torchrun.py --nnodes 2 --nproc-per-node 4 --node-rank {node} --master-addr 127.0.0.1" in call
        assert "--master-port 24711 " in call
        assert f"--log-dir {tmp_path}/logs/start-0/node-{node} " in call
        assert "cli train train_scripts/configs/flux_t2i_released.yaml engine.kind=deepspeed run.iterations=7" in call
    assert not (tmp_path / "requeued").exists()


def test_the_batch_script_takes_a_configuration(slurm, tmp_path):
    (tmp_path / "mine.yaml").touch()
    done = _batch(slurm, tmp_path / "mine.yaml", "run.iterations=7")
    assert done.returncode == 0, done.stderr
    assert f"cli train {tmp_path}/mine.yaml engine.kind=deepspeed run.iterations=7" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("code,requeue,asked", [(75, "1", True), (75, "0", False), (1, "1", False)])
def test_only_a_run_that_stopped_on_demand_is_put_back_into_the_queue(slurm, tmp_path, code, requeue, asked):
    done = _batch({**slurm, "FAIL": "cli train", "CODE": str(code), "REQUEUE": requeue}, "hunyuan_t2v", "released_vq")
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == asked
    if asked:
        assert (tmp_path / "requeued").read_text() == "requeue 4711\n"


def test_the_batch_script_says_what_it_needs(slurm):
    outside = _batch({**slurm, "SLURM_JOB_ID": ""}, "flux_t2i", "tiny")
    assert outside.returncode == 2 and "sbatch [options]" in outside.stderr and "SRUN_ARGS" in outside.stderr
    unknown = _batch(slurm, "flux", "tiny")
    assert unknown.returncode == 2 and "no train_scripts/flux.sh" in unknown.stderr and "hunyuan_t2v" in unknown.stderr
    elsewhere = _batch({**slurm, "SLURM_SUBMIT_DIR": "/tmp"}, "flux_t2i", "tiny")
    assert elsewhere.returncode == 2 and "set ROOT" in elsewhere.stderr


SCRIPTS = sorted(path.name for path in (ROOT / "train_scripts").glob("*.sh") if path.name != "common.sh")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_train_script_says_what_it_takes(slurm, script):
    done = _bash(slurm, f"train_scripts/{script}")
    assert done.returncode == 2 and "usage: " in done.stderr and "key=value" in done.stderr
    assert script == "train_config.sh" or "\n  tiny\n" in done.stderr
    assert _bash({**slurm, "PYTHON": "nowhere"}, f"train_scripts/{script}", "tiny").returncode == 2


def test_the_progressive_recipe_goes_on_where_it_was(slurm, tmp_path):
    """Each stage starts from the model of the one before; what is done is not done again."""
    environment = {**slurm, "RUNS": str(tmp_path / "runs"), "FAIL": "2_small/run", "CODE": "75"}
    command = ("train_scripts/hunyuan_progressive.sh", "released_vq", "small:optim.lr=1e-6", "run.iterations=3")
    assert _bash(environment, *command).returncode == EXIT_STOPPED
    done = _bash({**environment, "FAIL": ""}, *command)
    assert done.returncode == 0, done.stderr
    calls = [call.strip() for call in (tmp_path / "calls").read_text().splitlines()]
    trained = [call for call in calls if " train " in call]
    folders = [next(word for word in call.split() if word.startswith("run.dir=")).split("/")[-2] for call in trained]
    assert folders == ["1_image", "2_small", "2_small", "3_large"]
    starts = [[word for word in call.split() if word.startswith("model.path=")] for call in trained]
    model = f"model.path={tmp_path}/runs/{{}}/model".format
    assert starts == [[], [model("1_image")], [model("1_image")], [model("2_small")]]
    assert trained[1] == trained[2] and trained[1].endswith("sample.frames=29 run.iterations=3 optim.lr=1e-6")
    assert "hunyuan_t2i_released.yaml" in trained[0] and "hunyuan_t2v_released_vq.yaml" in trained[3]
    exported = [call.split(" --out ")[1].split()[0] for call in calls if " export " in call]
    assert exported == [f"{tmp_path}/runs/{stage}/model" for stage in ("1_image", "2_small", "3_large")]
    again = _bash(environment, *command)
    assert again.returncode == 0 and "stage large is done" in again.stdout
    wrong = _bash(environment, *command, "larg:optim.lr=1")
    assert wrong.returncode == 2 and "stages are image, small and large" in wrong.stderr


# --- real training --------------------------------------------------------------------------------------------------------


def _start(folder, checkpoint, *overrides):
    """The command in a forked process."""
    settings = runs.settings(folder, checkpoint, rewards__models__pixels__kind="jpeg_size", run__save_every=100)
    (folder / "run.yaml").write_text("{}")
    command = ["train", str(folder / "run.yaml"), *settings, *overrides]
    with (folder / "output.txt").open("a") as log:
        return fork_server.Process(partial(cli.main, command), stdout=log, stderr=log)


def test_a_stopped_run_resumes_to_the_bits_of_one_that_ran_through(tiny_flux, tmp_path):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process, metrics = _start(stopped, tiny_flux, "run.iterations=50"), stopped / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, runs.output(stopped)
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(runs.TIMEOUT) == EXIT_STOPPED, runs.output(stopped)
    (saved,) = runs.checkpoints(stopped)
    assert f"stopped by SIGUSR1 after iteration {int(saved)} of 50" in runs.output(stopped)
    last = int(saved) + 1
    for folder in (stopped, whole):
        assert _start(folder, tiny_flux, f"run.iterations={last}").wait(runs.TIMEOUT) == 0, runs.output(folder)
    assert runs.same_bits(runs.weights(stopped, last), runs.weights(whole, last))
    assert runs.metrics(stopped) == runs.metrics(whole)


@pytest.fixture
def job(slurm, tiny_flux, tmp_path):
    """``job(name, key=value, ...)`` starts the tiny FLUX run in folder ``name`` as a job on two nodes of one process each."""
    started = []

    def job(name, *overrides):
        folder = tmp_path / name
        settings = runs.settings(folder, tiny_flux, rewards__models__pixels__kind="jpeg_size", run__save_every=100)
        (folder / "run.yaml").write_text("{}")
        output = (folder / "output.txt").open("w")
        command = ["bash", str(BATCH), str(folder / "run.yaml"), *settings, *overrides]
        environment = {**slurm, "PYTHON": sys.executable, "MASTER_PORT": str(runs.free_port()), "LOGS": str(folder / "logs")}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT))
        return started[-1]

    yield job
    for process in started:
        _kill(process)


def _kill(process):
    """SIGKILL for everything the job started."""
    if process.poll() is None:
        whole = psutil.Process(process.pid)
        for one in [whole, *whole.children(recursive=True)]:
            one.kill()
        process.wait()


def _wait_for_lines(process, folder, lines, seconds=400):
    file, end = folder / "run" / "metrics.jsonl", time.monotonic() + seconds
    while not (file.exists() and file.read_text().count("\n") >= lines):
        assert process.poll() is None and time.monotonic() < end, runs.output(folder)
        time.sleep(0.1)


def _stop(process, folder):
    _wait_for_lines(process, folder, 1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(200) == EXIT_STOPPED, runs.output(folder)
    (saved,) = runs.checkpoints(folder)
    assert f"stopped by SIGUSR1 after iteration {int(saved)} of " in runs.output(folder)
    return int(saved)


@pytest.mark.slow
def test_a_signalled_job_on_two_nodes_saves_and_asks_to_be_requeued(job, tmp_path):
    stopped = _stop(job("stopped", "run.iterations=50"), tmp_path / "stopped")
    assert 1 <= stopped < 50 and len(runs.metrics(tmp_path / "stopped")) == stopped
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    logs = tmp_path / "stopped" / "logs" / "start-0"
    first, second = ("".join(f.read_text() for f in (logs / f"node-{node}").rglob("stdout.log")) for node in (0, 1))
    assert "iteration  1/50" in first and "iteration" not in second


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_stopped_and_killed_jobs_resume_to_the_bits_of_one_that_ran_through(job, tmp_path):
    whole, stopped, killed = (tmp_path / name for name in ("whole", "stopped", "killed"))
    assert job("whole", "run.iterations=6").wait(600) == 0, runs.output(whole)
    assert _stop(job("stopped", "run.iterations=6"), stopped) < 6
    process = job("killed", "run.iterations=6", "run.save_every=2")
    _wait_for_lines(process, killed, 3)
    _kill(process)
    for folder in (stopped, killed):
        assert "000006" not in runs.checkpoints(folder)
        assert job(folder.name, "run.iterations=6").wait(600) == 0, runs.output(folder)
        assert "resuming" in runs.output(folder)
        assert runs.same_bits(runs.weights(folder, 6), runs.weights(whole, 6))
        assert runs.metrics(folder) == runs.metrics(whole)
    assert job("whole", "run.iterations=6").wait(600) == 0
    assert "has its 6 iterations" in runs.output(whole)


def test_a_signal_while_the_progressive_recipe_exports_stops_it_afterwards_and_a_failed_export_is_told(slurm, tmp_path):
    """SIGUSR1 outside of training would end the script with 138, and the job would not be put back into the queue."""
    runs_folder = tmp_path / "runs"
    code = f"""
trap 'exit 75' USR1
set -euo pipefail
source train_scripts/common.sh
forwarding sleep 0
(trap '' USR1 && kill -USR1 $$ && sleep 1 && touch {tmp_path}/exported)
touch {tmp_path}/after
"""
    assert _bash(slurm, "-c", code).returncode == 75
    assert (tmp_path / "exported").exists() and not (tmp_path / "after").exists()
    environment = {**slurm, "RUNS": str(runs_folder), "FAIL": "export", "CODE": "1"}
    done = _bash(environment, "train_scripts/hunyuan_progressive.sh", "tiny")
    assert done.returncode == 1 and (runs_folder / "1_image" / "export_failed").exists()
    done = _bash({**environment, "NODE_RANK": "1", "FAIL": "nothing"}, "train_scripts/hunyuan_progressive.sh", "tiny")
    assert done.returncode == 1 and "could not export stage image" in done.stderr


def test_gpus_are_those_that_are_visible(slurm):
    code = "source train_scripts/common.sh; visible_gpus"
    for devices, count in (("0,1,3", 3), ("", 0), ("GPU-8f6a", 1)):
        assert _bash({**slurm, "CUDA_VISIBLE_DEVICES": devices}, "-c", code).stdout.strip() == str(count)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_tiny_progressive_recipe(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "RUNS": str(tmp_path)}
    command = ("train_scripts/hunyuan_progressive.sh", "tiny", "run.iterations=1", "run.eval_every=0", "run.sample_every=0")
    done = _bash(environment, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    for before, after in (("1_image", "2_small"), ("2_small", "3_large")):
        started = yaml.safe_load((tmp_path / after / "run" / "config.yaml").read_text())["model"]["path"]
        assert started == str(tmp_path / before / "model")
        assert (tmp_path / after / "model" / "model_index.json").is_file()
    assert _bash(environment, *command).stdout.count("is done") == 3
