"""Training runs in processes of their own.

FastVideo takes half a minute to import, so a fork server imports it once and every run is forked from there: real
processes with their own process groups, which can be killed for real.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.trainer import brightness as _brightness  # noqa: F401  (registers the reward)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastvideo_grpo.trainers.flux", "deepspeed", "tests.trainer.brightness"])
TIMEOUT = 300  # seconds a run may take

PROMPTS = ["a red circle", "a blue square", "a green triangle", "a cyan circle", "a yellow square"]


def settings(folder: Path, checkpoint: Path, **overrides: Any) -> list[str]:
    """Overrides of a run of a few seconds on the random tiny FLUX; ``overrides`` are written section__key=value."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    values: dict[str, Any] = {
        "model.path": checkpoint,
        "model.precision": "fp32",
        "prompts.path": prompts,
        "prompts.text_length": 16,
        "sample.height": 64,
        "sample.width": 64,
        "sample.steps": 4,
        "sample.noise_level": 0.7,
        "grpo.prompts_per_iteration": 4,
        "grpo.group_size": 4,
        "grpo.updates_per_iteration": 2,
        "engine.micro_batch_size": 2,
        "rewards.models.pixels.kind": "test_brightness",
        "run.dir": folder / "run",
        "run.iterations": 3,
        "run.threads": 1,
        "run.eval_every": 0,
        "run.sample_every": 0,
        "run.save_every": 1,
    }
    values.update({key.replace("__", "."): value for key, value in overrides.items()})
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]


@dataclass
class Kill:
    """Where a run kills itself with SIGKILL: at the ``call``-th call (from 0) of an engine's ``method``.

    ``before`` the call, or after it (for "save": weights are written, the checkpoint is not complete).
    """

    method: str
    call: int


def run(overrides: list[str], *, processes: int = 1, kill: Kill | None = None) -> list[int]:
    """Train in ``processes`` processes; returns their exit codes (-9: killed). ``kill`` is for every process of the run."""
    port = _free_port() if processes > 1 else None
    workers = [CONTEXT.Process(target=_work, args=(overrides, rank, processes, port, kill)) for rank in range(processes)]
    _output_file(overrides).write_text("")
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(TIMEOUT)
    stuck = [worker for worker in workers if worker.is_alive()]
    for worker in stuck:
        worker.kill()
        worker.join()
    assert not stuck, (
        f"{len(stuck)} of {processes} processes did not finish in {TIMEOUT} s:\n{_output_file(overrides).read_text()}"
    )
    print(_output_file(overrides).read_text())  # pytest shows it when the test fails
    return [worker.exitcode if worker.exitcode is not None else -1 for worker in workers]


def output(folder: Path) -> str:
    """Everything the processes of the last run in ``folder`` printed."""
    return (folder / "output.txt").read_text()


def _output_file(overrides: list[str]) -> Path:
    directory = next(item.partition("=")[2] for item in overrides if item.startswith("run.dir="))
    return Path(directory).parent / "output.txt"


def _work(overrides: list[str], rank: int, processes: int, port: int | None, kill: Kill | None) -> None:
    if port is not None:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        os.environ.update({key: str(value) for key, value in address.items()})
    torch.set_num_threads(1)
    log = os.open(_output_file(overrides), os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        train(overrides, kill)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Interpreter shutdown after a fork may wait for threads that were not forked.
    sys.stdout.flush()
    os._exit(0)


def train(overrides: list[str], kill: Kill | None = None) -> Any:
    """What ``fastvideo-grpo train`` does after reading the command line; returns the trainer."""
    from fastvideo_grpo import config as configuration
    from fastvideo_grpo import plan
    from fastvideo_grpo.commands.train import prepare_process
    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.trainers.load import load_trainer

    empty = Path(overrides[0].partition("=")[2]).parent / "empty.yaml"
    empty.write_text("{}")
    config = configuration.load(empty, overrides)
    plan.check_run(config, plan.model_facts(config), int(os.environ.get("WORLD_SIZE", "1")))
    prepare_process(config)
    trainer = load_trainer(config, World.current())
    trainer.setup_training()
    if kill is not None:
        _arm(trainer.engine, kill)
    trainer.train()
    return trainer


def _arm(engine: Any, kill: Kill) -> None:
    original, calls = getattr(engine, kill.method), [0]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if calls[0] == kill.call and kill.method != "save":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls[0] == kill.call:
            os.kill(os.getpid(), signal.SIGKILL)
        calls[0] += 1
        return result

    setattr(engine, kill.method, deadly)


def weights(folder: Path, iteration: int, which: str = "model") -> dict[str, torch.Tensor]:
    """Trained weights of a run's checkpoint."""
    from fastvideo_grpo.checkpoints.export import plain_names
    from fastvideo_grpo.engines.consolidate import weights_from_checkpoint

    return plain_names(weights_from_checkpoint(folder / "run" / "checkpoints" / f"{iteration:06d}" / "state", which))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times and memory."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are bitwise equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of any weight."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
