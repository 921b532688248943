"""One run of a study, in a worker process: train as ``fastvideo-grpo train`` does, then measure.

The heavy libraries are imported when the first run starts, so that a worker imports them once.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo_grpo.studies.pool import Job

if TYPE_CHECKING:
    from fastvideo_grpo.prompts.files import Prompt
    from fastvideo_grpo.trainers.base import GRPOTrainer

SAMPLES = 8
"""Samples per prompt of the last evaluation; the curve's points take ``run.eval_samples`` of the same noise."""

WATCHED = "watched_"
"""How the rewards are called that every run of a study is judged by; they have weight 0."""

PICTURES = 6
"""Pictures kept of a run of the first seed, for the page."""


def measure(job: Job) -> dict[str, Any]:
    """Make the run and write ``result.json`` into its folder, last; returns what is in it.

    ``measures``: name -> number or None; ``per_prompt``: reward -> mean score of each prompt; ``curve``: iteration, network
    evaluations spent until then and ``colour_match`` of each evaluation; ``counted``: network evaluations that were really made
    per iteration, to be held against ``cost``, which is an average where the stochastic steps are drawn (``drawn``).
    """
    import torch

    from fastvideo_grpo.disk.durable_files import write_atomic
    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.engines.process import prepare_process
    from fastvideo_grpo.models import run_config
    from fastvideo_grpo.studies import pixels
    from fastvideo_grpo.trainers.fixed_set import sample_fixed
    from fastvideo_grpo.trainers.invalid_samples import TooManyInvalidRewards
    from fastvideo_grpo.trainers.load import load_trainer

    started = time.monotonic()
    config = run_config.build(job.values)
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)  # of a run that ended before its result was written
    prepare_process(config)
    stopped = None
    with load_trainer(config, World.current()) as trainer:
        trainer.setup_training()
        counter = EvaluationCounter(trainer)
        first = {name: tensor.clone() for name, tensor in trainer.engine.state_dict().items()} if job.trained else {}
        if job.trained:
            try:
                trainer.train()
            except TooManyInvalidRewards as error:  # what a diverged network draws has no score
                stopped = str(error)
        counted = counter.total
        sets = trainer.run.monitor.evaluation_sets()
        prompts = [prompt for of_set in sets.values() for prompt in of_set]
        samples = sample_fixed(trainer, trainer.run.scoring, prompts, SAMPLES, "evaluation")
        distance = _distance(first, trainer.engine.state_dict()) if job.trained else None
    assert samples.media is not None  # one process
    per_prompt = {
        name.rpartition("/")[2]: scores.view(len(prompts), SAMPLES).double().mean(1).tolist()
        for name, scores in samples.scores.items()
        if name.startswith(WATCHED)
    }
    lines = trainer.run.log.read() if job.trained else []
    trained_on = len(sets["train"])
    measures = {name: _mean(scores) for name, scores in per_prompt.items()}
    measures["colour_match_train"] = _mean(per_prompt["colour_match"][:trained_on])
    measures["colour_match_heldout"] = _mean(per_prompt["colour_match"][trained_on:])
    whole = not any(samples.faults)  # black stands for what is not finite
    measures["diversity"] = pixels.diversity(samples.media, SAMPLES) if whole else None
    measures["shape_diversity"] = pixels.shape_diversity(samples.media, SAMPLES) if whole else None
    measures["roughness"] = pixels.roughness(samples.media) if whole else None
    deviations = [line["train/ratio_first_update_max_dev"] for line in lines if line.get("train/updates")]
    measures["ratio_dev"] = max((d for d in deviations if d is not None), default=None)
    measures["distance"] = distance
    ratios = [line["train/ratio_mean"] for line in lines if line.get("train/updates") and "train/ratio_mean" in line]
    shift = _mean([ratio - 1 for ratio in ratios if ratio is not None])
    measures["ratio_mean"] = None if shift is None else shift / config.grpo.clip_range
    shown = max(1, len(prompts) // PICTURES)  # every so many prompts
    if job.seed == 0:
        _keep_pictures(job.folder, samples.media[:: SAMPLES * shown][:PICTURES])
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
    result = {
        "name": job.name,
        "seed": job.seed,
        "iterations": len(lines),
        "cost": job.cost,
        "counted": counted / len(lines) if lines and stopped is None else None,
        "drawn": config.sample.stochastic.steps != "all",
        "seconds": time.monotonic() - started,
        "measures": {name: _plain(value) for name, value in measures.items()},
        "per_prompt": {name: [_plain(value) for value in values] for name, values in per_prompt.items()},
        "curve": _curve(job, lines, sets, counter.spent),
        "pictured": [prompt.text for prompt in prompts[::shown][:PICTURES]],
        "stopped": stopped,
        "not_finite": sum(line.get("train/skipped_updates", 0) for line in lines),
    }
    write_atomic(job.result_file, json.dumps(result, indent=1).encode())
    del trainer, samples
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


class EvaluationCounter:
    """Counts a trainer's network evaluations as :mod:`.budget` does, evaluations on fixed noise left out.

    ``spent``: finished iterations -> all that were made until then.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        import torch

        from fastvideo_grpo.studies.budget import BACKWARD, FORWARD

        self.total = 0
        self.spent = {0: 0}
        self._counting = True
        monitor, network_output = trainer.run.monitor, trainer.network_output
        evaluate, after_iteration = monitor.evaluate, monitor.after_iteration

        def counted(sample, level, conditioning):
            if self._counting:
                self.total += len(sample) * (FORWARD + (BACKWARD if torch.is_grad_enabled() else 0))
            return network_output(sample, level, conditioning)

        def not_counted():
            self._counting = False
            try:
                return evaluate()
            finally:
                self._counting = True

        def noted(finished, metrics, clock):
            self.spent[finished] = self.total
            return after_iteration(finished, metrics, clock)

        trainer.network_output = counted  # type: ignore[method-assign]
        monitor.evaluate = not_counted  # type: ignore[method-assign]
        monitor.after_iteration = noted  # type: ignore[method-assign]


def _distance(first: dict[str, Any], last: dict[str, Any]) -> float:
    """``|last - first| / |first|`` of all weights, in percent."""
    moved = math.fsum(float((last[name].double() - tensor.double()).square().sum()) for name, tensor in first.items())
    length = math.fsum(float(tensor.double().square().sum()) for tensor in first.values())
    return 100 * math.sqrt(moved / length)


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _plain(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _curve(job: Job, lines: list[dict[str, Any]], sets: dict[str, list[Prompt]], spent: dict[int, int]) -> list[dict[str, Any]]:
    """The evaluations of a run: both sets of prompts together, weighted by their prompts."""
    sizes = {name: len(prompts) for name, prompts in sets.items()}
    keys = {name: f"eval/{name}/{WATCHED}colour/colour_match/mean" for name in sizes}
    before = job.folder / "evaluation_before.json"
    points = [(0, json.loads(before.read_text()))] if before.is_file() and job.trained else []
    points += [(line["iteration"] + 1, line) for line in lines if all(key in line for key in keys.values())]
    curve = []
    for iteration, metrics in points:
        values = [(metrics[key], sizes[name]) for name, key in keys.items()]
        known = all(value is not None and math.isfinite(value) for value, _ in values)
        mean = sum(value * size for value, size in values) / sum(sizes.values()) if known else None
        curve.append({"iteration": iteration, "spent": spent[iteration], "colour_match": mean})
    return curve


def _keep_pictures(folder: Path, media) -> None:
    """A row of pictures, pixel by pixel."""
    import numpy as np
    from PIL import Image

    Image.fromarray(np.concatenate([np.asarray(picture[0]) for picture in media], axis=1)).save(folder / "pictures.png")
