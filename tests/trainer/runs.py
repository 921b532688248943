"""Training runs in processes of their own.

FastVideo takes half a minute to import, so every run is forked from a server that has imported it (tests/fork_server.py): real
processes, which can be killed for real.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import operator
import os
import pkgutil
import random
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastvideo_grpo.models.registry import FAMILIES
from tests import fork_server
from tests.trainer import exact_rewards as _exact_rewards  # noqa: F401  (registers them)

TIMEOUT = 300  # seconds a run may take
LOWEST_PORT = 20000  # that a run gets
OF_THE_MACHINE = ("time/", "memory/", "perf/")
"""What keys of metrics begin with whose values differ from run to run."""

# Overrides that make a run one of the random tiny HunyuanVideo. 27 and 9 tokens: two processes cannot share them evenly.
HUNYUAN_T2V: dict[str, Any] = {
    "model__kind": "hunyuan_video",
    "prompts__text_length": 256,
    "sample__height": 48,
    "sample__width": 48,
    "sample__frames": 9,
    "sample__guidance_scale": 6.0,
    "sample__shift": 5.0,
}
HUNYUAN_T2I: dict[str, Any] = {**HUNYUAN_T2V, "sample__frames": 1}

# Of the random tiny SkyReels-I2V, with guidance; its prompts name images (see `settings`).
SKYREELS_I2V: dict[str, Any] = {
    **HUNYUAN_T2V,
    "model__kind": "skyreels_i2v",
    "sample__guidance_scale": 1.0,
    "sample__shift": 7.0,
    "sample__cfg_scale": 5.0,
    "grpo__updates_per_iteration": 1,
}

# Of the random tiny Wan, with guidance. 27 tokens of 9 frames, and 9 of one.
WAN_T2V: dict[str, Any] = {
    "model__kind": "wan",
    "sample__height": 48,
    "sample__width": 48,
    "sample__frames": 9,
    "grpo__updates_per_iteration": 1,
}
WAN_T2I: dict[str, Any] = {**WAN_T2V, "sample__frames": 1}

# Of the random tiny Stable Diffusion, with guidance.
STABLE_DIFFUSION: dict[str, Any] = {
    "model__kind": "stable_diffusion",
    "prompts__text_length": 77,
    "sample__noise_level": 1.0,
    "grpo__updates_per_iteration": 1,
}

PROMPTS = ["a red circle", "a blue square", "a green triangle", "a cyan circle", "a yellow square"]


def settings(folder: Path, checkpoint: Path, **overrides: Any) -> list[str]:
    """Overrides of a run of a few seconds on the random tiny FLUX; ``overrides`` are written section__key=value."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    if FAMILIES[overrides.get("model__kind", "flux")].reads_images:
        prompts = _with_images(folder)
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


def _with_images(folder: Path) -> Path:
    """A prompt file whose prompts name images of 48x48 pixels, one of them with a negative prompt of its own."""
    lines = []
    for number, prompt in enumerate(PROMPTS):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append({"prompt": prompt, "image": f"{number}.png"})
    lines[1]["negative_prompt"] = "a photograph of a cat, and a dog"
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@dataclass
class Kill:
    """Where a process kills itself with SIGKILL: before or after the ``call``-th call (from 0) of ``target``.

    ``target`` is dotted: an attribute of the trainer ("engine.step"), or a function under its full name
    ("fastvideo_grpo.engines.base.write_tensors").
    """

    target: str
    call: int
    after: bool = False


def run(overrides: list[str], *, processes: int = 1, kill: Kill | None = None, record: bool = False) -> list[int]:
    """Train in ``processes`` processes; returns their exit codes (-9: killed).

    ``kill`` is for every process of the run; what each had done until then: :func:`killed`. ``record``: keep what every
    rollout drew; :func:`drawn` reads it.
    """
    return in_processes(partial(train, overrides, kill, record), _output_file(overrides), processes=processes)


def in_processes(action: Callable[[], Any], log: Path, *, processes: int = 1) -> list[int]:
    """Do ``action`` (it is pickled) in ``processes`` processes as torchrun starts them; their exit codes.

    An exit code is what ``action`` returns, if that is a number, 1 when it raises, -9 when it is killed. What they print is
    in ``log``.
    """
    port = free_port() if processes > 1 else None
    log.write_text("")
    with log.open("a") as file:
        workers = [
            fork_server.Process(action, env={**os.environ, **_rank(rank, processes, port)}, stdout=file, stderr=file)
            for rank in range(processes)
        ]
    for worker in workers:
        with contextlib.suppress(fork_server.TimeoutExpired):
            worker.wait(TIMEOUT)
    stuck = [worker for worker in workers if worker.poll() is None]
    for worker in stuck:
        worker.kill()
        worker.wait()
    assert not stuck, f"{len(stuck)} of {processes} processes did not finish in {TIMEOUT} s:\n{log.read_text()}"
    print(log.read_text())  # pytest shows it when the test fails
    return [worker.wait() for worker in workers]


def once(tmp_path_factory: Any, tiny_checkpoint: Callable[..., Path], *, record: bool = False) -> Callable[..., Path]:
    """``make(settings, processes=1)`` -> folder of a finished run of a tiny checkpoint; equal ones run once."""
    folders: dict[str, Path] = {}

    def make(settings_: dict[str, Any], processes: int = 1) -> Path:
        key = repr((processes, sorted(settings_.items())))
        if key not in folders:
            folder = tmp_path_factory.mktemp("once")
            overrides = settings(folder, tiny_checkpoint(settings_.get("model__kind", "flux")), **settings_)
            assert run(overrides, processes=processes, record=record) == [0] * processes
            folders[key] = folder
        return folders[key]

    return make


def output(folder: Path) -> str:
    """Everything the processes of the last run in ``folder`` printed."""
    return (folder / "output.txt").read_text()


def _output_file(overrides: list[str]) -> Path:
    directory = next(item.partition("=")[2] for item in overrides if item.startswith("run.dir="))
    return Path(directory).parent / "output.txt"


def _rank(rank: int, processes: int, port: int | None) -> dict[str, str]:
    """What torchrun tells a process of several."""
    if port is None:
        return {}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    return {key: str(value) for key, value in address.items()}


def train(overrides: list[str], kill: Kill | None = None, record: bool = False) -> Any:
    """What ``fastvideo-grpo train`` does after reading the command line; returns the trainer."""
    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.engines.process import prepare_process
    from fastvideo_grpo.models import run_config
    from fastvideo_grpo.models.checkpoint import model_facts
    from fastvideo_grpo.planning import plan
    from fastvideo_grpo.trainers.load import load_trainer
    from tests import counted_operations

    counted_operations.share()
    empty = Path(overrides[0].partition("=")[2]).parent / "empty.yaml"
    empty.write_text("{}")
    config = run_config.load(empty, overrides)
    plan.check_run(config, model_facts(config), int(os.environ.get("WORLD_SIZE", "1")))
    prepare_process(config)
    world = World.current(sequence_parallel=config.engine.sequence_parallel)
    plan.check_images(config, world)
    plan.check_folder(config)
    with load_trainer(config, world) as trainer:
        trainer.setup_training()
        if record:
            _record(trainer)
        if kill is not None:
            _arm(trainer, kill)
        trainer.train()
    return trainer


COUNTED = ("draw", "engine.backward", "engine.step")


def _arm(trainer: Any, kill: Kill) -> None:
    """Let the process kill itself there, after writing down how often it had finished each of ``COUNTED``."""
    done = dict.fromkeys(COUNTED, 0)

    def die() -> None:
        file = trainer.run.folder.parent / f"killed-{trainer.world.rank}.json"
        file.write_text(json.dumps(done))
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(target: str, before: Callable[[], None], after: Callable[[], None]) -> None:
        path, _, name = target.rpartition(".")
        if target.startswith("fastvideo_grpo."):
            owner = pkgutil.resolve_name(path)
        else:
            owner = operator.attrgetter(path)(trainer) if path else trainer
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before()
            result = original(*args, **kwargs)
            after()
            return result

        setattr(owner, name, wrapped)

    for target in COUNTED:
        wrap(target, lambda: None, lambda target=target: done.update({target: done[target] + 1}))
    started, finished = itertools.count(), itertools.count()
    wrap(
        kill.target,
        lambda: die() if next(started) == kill.call and not kill.after else None,
        lambda: die() if next(finished) == kill.call and kill.after else None,
    )


def killed(folder: Path, rank: int = 0) -> tuple[int, int, int]:
    """How many draws, backwards and optimiser steps the killed process of the last run had finished."""
    done = json.loads((folder / f"killed-{rank}.json").read_text())
    return tuple(done[name] for name in COUNTED)


def _record(trainer: Any) -> None:
    original = trainer.rollout

    def rollout(iteration: int, *args: Any) -> Any:
        result = original(iteration, *args)
        kept = {"scores": result.raw, "trajectories": result.trajectories}
        torch.save(kept, trainer.run.folder / f"rollout-{iteration}-{trainer.world.rank}.pt")
        return result

    trainer.rollout = rollout
    if trainer.engine.zero_stage in (None, 0):
        _record_gradients(trainer)


def _record_gradients(trainer: Any) -> None:
    """Keep the whole gradient of each update; without ZeRO every process has it."""
    original, updates = trainer.engine._update, itertools.count()

    def update() -> float:
        gradients = {name: parameter.grad.clone() for name, parameter in trainer.engine._parameters.items()}
        torch.save(gradients, trainer.run.folder / f"gradients-{next(updates)}-{trainer.world.rank}.pt")
        return original()

    trainer.engine._update = update


def drawn(folder: Path, iteration: int) -> tuple[dict[Any, torch.Tensor], dict[str, torch.Tensor]]:
    """Of a recorded run's iteration: (what, group, member) -> that part of a sample's trajectory, reward -> score of each."""
    parts = [torch.load(file) for file in sorted((folder / "run").glob(f"rollout-{iteration}-*.pt"))]
    trajectories = {key: value for part in parts for key, value in part["trajectories"].items()}
    assert len(trajectories) == sum(len(part["trajectories"]) for part in parts), "two processes drew the same sample"
    assert all(torch.equal(part["scores"][name], parts[0]["scores"][name]) for part in parts for name in part["scores"])
    return trajectories, parts[0]["scores"]


def gradients(folder: Path, update: int, rank: int = 0) -> dict[str, torch.Tensor]:
    """Of a recorded run without ZeRO: the gradient of its ``update``-th optimiser step."""
    return torch.load(folder / "run" / f"gradients-{update}-{rank}.pt")


def pictures(folder: Path, iteration: int) -> torch.Tensor:
    """The pictures of fixed noise a run saved, uint8 ``[B, H, W, 3]``."""
    files = sorted((folder / "run" / "samples" / f"{iteration:06d}").glob("0*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])


def checkpoints(folder: Path) -> list[str]:
    """What lies in a run's folder of checkpoints, unfinished ones included."""
    return sorted(entry.name for entry in (folder / "run" / "checkpoints").iterdir())


def weights(folder: Path, iteration: int, which: str = "model") -> dict[str, torch.Tensor]:
    """Trained weights of a run's checkpoint."""
    from fastvideo_grpo.engines.consolidate import weights_from_checkpoint

    return weights_from_checkpoint(folder / "run" / "checkpoints" / f"{iteration:06d}" / "state", which)


def averages(folder: Path, iteration: int) -> dict[str, int]:
    """Name -> moves of the averages of the weights in a run's checkpoint."""
    from fastvideo_grpo.engines.shards import read_engine_json

    return read_engine_json(folder / "run" / "checkpoints" / f"{iteration:06d}" / "state")["averages"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from run to run."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(OF_THE_MACHINE)} for line in lines]


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are bitwise equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of any weight."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def free_port() -> int:
    """A port that nobody listens on and that no other call in this session returns.

    It is below those that the system gives to whoever connects somewhere: one of these may be taken between being found free
    and being listened on.
    """
    first_of_system = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with (Path(os.environ[fork_server.SESSION_VARIABLE]) / "port").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        port = int(file.read() or random.SystemRandom().randrange(LOWEST_PORT, first_of_system))
        while True:
            port = port + 1 if port + 1 < first_of_system else LOWEST_PORT
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                break
        file.truncate(0)
        file.write(str(port))
    return port
