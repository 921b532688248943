"""What workers of the tests' studies do in place of training."""

from __future__ import annotations

import json
import os
import signal
import time

from fastvideo_grpo.studies.pool import Job


def fake_measure(job: Job) -> dict:
    """A result at once, with numbers that depend on configuration and seed; notes that it was made."""
    seed, shared = job.seed, job.values["sample"]["init_noise"] == "shared"
    value = 0.5 if not job.trained else (0.9 if shared else 0.7) + 0.01 * seed
    with (job.folder.parent / "made.txt").open("a") as file:
        file.write(f"{job.folder.name}\n")
    points = [(0, 0.5), (job.iterations, value)] if job.trained else []
    result = {
        "name": job.name,
        "seed": seed,
        "iterations": job.iterations if job.trained else 0,
        "cost": job.cost,
        "counted": float(job.cost) if job.trained else None,
        "drawn": False,
        "seconds": 1.0,
        "measures": {
            "colour_match": value,
            "colour_match_train": value,
            "colour_match_heldout": value,
            "jpeg_size": -1.0 - value,
            "diversity": 0.2,
            "shape_diversity": 0.1,
            "roughness": 0.05 + 0.001 * seed,
            "ratio_dev": 0.0 if job.trained else None,
        },
        "per_prompt": {"colour_match": [value - 0.1, value, value + 0.1]},
        "curve": [{"iteration": i, "spent": i * job.cost, "colour_match": v} for i, v in points],
        "pictured": ["a red circle", "a blue square"],
        "stopped": None,
        "not_finite": 0,
    }
    job.result_file.write_text(json.dumps(result))
    return result


def prefers_a_rate(job: Job) -> dict:
    """As above, and best at a learning rate that is another one for arms with a single stochastic step."""
    result = fake_measure(job)
    wanted = 1.4e-3 if job.values["sample"]["stochastic"]["steps"] == "one" else 3.5e-4
    for point in result["curve"][1:]:
        point["colour_match"] -= 0.1 * (job.values["optim"]["lr"] != wanted)
    job.result_file.write_text(json.dumps(result))
    return result


def fails_per_sample(job: Job) -> dict:
    """An arm that cannot be trained: one seed raises, the next takes its process with it."""
    if job.values["sample"]["init_noise"] == "per_sample":
        if job.seed:
            os.kill(os.getpid(), signal.SIGKILL)
        print("about to fail", flush=True)
        raise ArithmeticError("no luck")
    return fake_measure(job)


def meets_another(job: Job) -> int:
    """Ends only when another job runs at the same time; returns its process."""
    (job.folder / "here").touch()
    until = time.monotonic() + 120
    while len(list(job.folder.parent.glob("*/here"))) < 2:
        if time.monotonic() > until:
            raise TimeoutError("nobody came")
        time.sleep(0.05)
    return os.getpid()


def stays(job: Job) -> None:
    """A run that takes long."""
    (job.folder / "pid").write_text(str(os.getpid()))
    time.sleep(300)
