"""From studies to runs: configurations with equal budgets, and names by which a run that was made already is found."""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvideo_grpo.config import saved as config_saved
from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.models import run_config
from fastvideo_grpo.prompts.embeddings import encoder_identity
from fastvideo_grpo.resources import data_dir
from fastvideo_grpo.studies import budget
from fastvideo_grpo.studies.definitions import BEFORE, SEARCH_POINTS, SEARCH_SEED, Arm, Study
from fastvideo_grpo.studies.pool import Job
from fastvideo_grpo.tracking.provenance import versions

CODE = (
    "sampling/*.py",
    "grpo/**/*.py",
    "engines/base.py",
    "engines/local.py",
    "engines/make.py",
    "planning/run_steps.py",
    "precision.py",
    "prompts/embeddings.py",
    "prompts/order.py",
    "rewards/base.py",
    "rewards/output_transform.py",
    "rewards/placement/inline.py",
    "rewards/reward_set.py",
    "rewards/rules/colour_*.py",
    "rewards/rules/jpeg_size.py",
    "trainers/base.py",
    "trainers/conditioning.py",
    "trainers/fastvideo.py",
    "trainers/fixed_set.py",
    "trainers/iteration_steps.py",
    "trainers/monitoring.py",
    "trainers/policy.py",
    "trainers/replay.py",
    "trainers/rollout.py",
    "trainers/scoring.py",
    "trainers/stages.py",
    "trainers/training_run.py",
    "studies/measurement.py",
    "studies/pixels.py",
    "tracking/statistics.py",
)
"""What a run's numbers depend on, besides the trainer of its model and the libraries."""


@dataclass(frozen=True)
class StudyPlan:
    """A study's jobs: ``arms`` label -> seed -> job, and ``before``, the untrained model."""

    study: Study
    arms: dict[str, dict[int, Job]]
    before: Job

    def jobs(self) -> list[Job]:
        return [self.before, *(job for by_seed in self.arms.values() for job in by_seed.values())]


def plan_search(study: Study, evaluations: int, out: Path) -> dict[str, dict[str, Job]]:
    """Of a study that searches, arm -> override -> its run; errors as :func:`plan_study`."""
    planned: dict[str, dict[str, Job]] = {arm.label: {} for arm in study.arms if study.search}
    for label, by_value in planned.items():
        for value in study.search:
            arm = next(arm for arm in study.arms if arm.label == label)
            config = arm_config(study, Arm(label, (*arm.overrides, value)))
            count = budget.iterations(config, evaluations * study.budget)
            name = f"{study.name}, arm '{label}', {value}"
            by_value[value] = _trained_job(name, config, SEARCH_SEED, count, math.ceil(count / SEARCH_POINTS), out)
    return planned


def plan_study(study: Study, seeds: int, evaluations: int, out: Path, searched: Mapping[str, str] | None = None) -> StudyPlan:
    """The runs of a study.

    Args:
        evaluations: network evaluations that a run may take; the study's own factor comes on top.
        out: folder of all studies; runs go to ``out/runs``, under a name made of all that they depend on.
        searched: arm -> the override of ``study.search`` that it takes (default: its first).

    Raises:
        ConfigError: an arm's configuration cannot be.
        UserError: the budget does not pay for one iteration.
    """
    total = evaluations * study.budget
    taken = searched or {arm.label: study.search[0] for arm in study.arms if study.search}
    configs = {
        arm.label: arm_config(study, Arm(arm.label, (*arm.overrides, *([taken[arm.label]] if study.search else []))))
        for arm in study.arms
    }
    counts = {label: budget.iterations(config, total) for label, config in configs.items()}
    arms: dict[str, dict[int, Job]] = {}
    for label, count in counts.items():
        every = max(1, min(counts.values()) // 2) if study.equal_iterations else math.ceil(count / study.curve_points)
        arms[label] = {
            seed: _trained_job(f"{study.name}, arm '{label}', seed {seed}", configs[label], seed, count, every, out)
            for seed in range(seeds)
        }
    # The same run for all studies of a model: what is trained for does not matter before it is.
    untrained = _load(study.settings, ["rewards.models.reward.kind=colour_match", "run.iterations=1", "run.eval_every=0"])
    return StudyPlan(study, arms, _job(f"{study.name}, {BEFORE} model", untrained, False, out))


def _trained_job(name: str, config: Config, seed: int, count: int, every: int, out: Path) -> Job:
    config = copy.deepcopy(config)
    config.run.seed = config.prompts.seed = seed
    config.run.iterations = config.run.save_every = count
    config.run.eval_every = every
    return _job(name, config, True, out)


def arm_config(study: Study, arm: Arm) -> Config:
    """An arm's configuration, without what :func:`plan_study` fills in."""
    return _load(study.settings, [*study.overrides, *arm.overrides])


def _load(settings: str, overrides: Sequence[str]) -> Config:
    data = data_dir()
    config = run_config.load(data / settings, list(overrides))
    # The files name them from the root of a checkout; installed, data/ lies elsewhere.
    config.model.path = str(data / config.model.path.removeprefix("data/"))
    config.prompts.path = str(data / config.prompts.path.removeprefix("data/"))
    assert config.prompts.eval_path is not None
    config.prompts.eval_path = str(data / config.prompts.eval_path.removeprefix("data/"))
    return config


def _job(name: str, config: Config, trained: bool, out: Path) -> Job:
    folder = out / "runs" / _identity(config, trained)
    config.run.dir = str(folder)
    values = config_saved.to_dict(config)
    return Job(name, folder, config.run.seed, values, trained, config.run.iterations, budget.evaluations_per_iteration(config))


def _identity(config: Config, trained: bool) -> str:
    """A name that changes when the numbers might: with configuration, checkpoint, prompts, code and libraries."""
    values = config_saved.to_dict(config)
    values["run"].pop("dir")
    values["model"]["path"] = _checkpoint_identity(config.model.path)
    for key in ("path", "eval_path"):
        values["prompts"][key] = hashlib.sha256(Path(values["prompts"][key]).read_bytes()).hexdigest()
    text = json.dumps([values, trained, code_identity(config.model.kind), versions()], sort_keys=True, default=str)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]}-seed{config.run.seed}"


@functools.cache
def _checkpoint_identity(path: str) -> str:
    return encoder_identity(Path(path), sorted(p.name for p in Path(path).iterdir() if p.is_dir()), {})


@functools.cache
def code_identity(kind: str) -> str:
    """A hash of the code that a run of ``model.kind`` depends on, without comments and docstrings."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for pattern in (*CODE, f"models/{kind}/trainer.py", f"models/{kind}/family.py"):
        for file in sorted(package.glob(pattern)):
            digest.update(f"{file.relative_to(package)}\n{what_runs(file.read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()


def what_runs(source: str) -> str:
    """Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    """A docstring, of whatever it stands under."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
