"""What the runs of a study say: values by seed, the table, the claims' verdicts. All of it is worked out from results.json."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo_grpo.disk.durable_files import write_atomic
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.studies import statistics
from fastvideo_grpo.studies.definitions import BEFORE, REACHED, STUDIES, Comparison, Study
from fastvideo_grpo.studies.jobs import StudyPlan
from fastvideo_grpo.studies.statistics import Estimate

RESULTS = "results.json"

_OF_TRAINING = ("area", "at_equal_iterations", "size_change", "ratio_dev", "ratio_mean", "distance", "until")
"""Measures that the untrained model cannot have."""

_DRAWN_WITHIN = 0.05
"""Of the average over all places, which the budget is made of: what a run may take more or less whose steps are drawn."""


@dataclass(frozen=True)
class Judged:
    """A comparison, what was found and what it says of the claim; ``why``: where nothing was measured, the reason."""

    comparison: Comparison
    first: Estimate
    second: Estimate
    found: Estimate
    verdict: str
    why: str = ""

    def sentence(self) -> str:
        """``A minus B in colour_match: +0.021 ± 0.018 (1.2 standard errors): not shown``."""
        names = f"{self.comparison.first} minus {self.comparison.second} in {self.comparison.measure}"
        if self.found.mean is None or self.found.error is None:
            return f"{names}: {self.verdict} ({self.why})"
        ratio = (
            f"{abs(self.found.mean) / self.found.error:.1f} standard errors" if self.found.error else "the same in every seed"
        )
        return f"{names}: {self.found.mean:+.3f} ± {self.found.error:.3f} ({ratio}): {self.verdict}"


@dataclass(frozen=True)
class Results:
    """A study's results: ``made`` (command, machine, commit, ...), ``before`` and ``arms`` label -> seed -> result or error."""

    study: Study
    made: dict[str, Any]
    before: dict[str, Any]
    arms: dict[str, dict[int, dict[str, Any]]]

    @property
    def seeds(self) -> int:
        return max(len(by_seed) for by_seed in self.arms.values())

    def finished(self, label: str) -> dict[int, dict[str, Any]]:
        """Seed -> result of the runs of an arm that ended well."""
        return {seed: run for seed, run in self.arms[label].items() if "error" not in run}

    def values(self, label: str, measure: str) -> dict[int, float | None]:
        """Seed -> value of a measure; the untrained model has one value for all seeds."""
        if label == BEFORE:
            seeds = sorted({seed for by_seed in self.arms.values() for seed in by_seed})
            value = self.before.get("measures", {}).get(measure)
            return dict.fromkeys(seeds, value)
        return {seed: self._value(run, measure) for seed, run in self.finished(label).items()}

    def _value(self, run: dict[str, Any], measure: str) -> float | None:
        if measure == "area":
            return statistics.area([(point["spent"], point["colour_match"]) for point in run["curve"]])
        if measure == "at_equal_iterations":
            at = self.equal_iterations()
            return next((point["colour_match"] for point in run["curve"] if point["iteration"] == at), None)
        if measure == "until":
            spent = statistics.reached([(point["spent"], point["colour_match"]) for point in run["curve"]], REACHED)
            return None if spent is None else spent / 1000
        if measure == "size_change":
            before, after = self.before.get("measures", {}).get("jpeg_size"), run["measures"].get("jpeg_size")
            return None if before is None or after is None else abs(after - before)
        return run["measures"].get(measure)

    def missing(self, label: str, measure: str) -> dict[int, str]:
        """Seed -> why an arm has no value of a measure there. The untrained model has one value for all seeds."""
        if label == BEFORE:
            if measure in _OF_TRAINING or self.before.get("measures", {}).get(measure) is not None:
                return {}
            return dict.fromkeys(range(self.seeds), self.before.get("error") or self._why_none(self.before, measure))
        reasons = {seed: f"the run failed: {' '.join(why.split())}" for seed, why in self.failed(label).items()}
        reasons |= {
            seed: self._why_none(self.finished(label)[seed], measure)
            for seed, value in self.values(label, measure).items()
            if value is None
        }
        return dict(sorted(reasons.items()))

    def _why_none(self, run: dict[str, Any], measure: str) -> str:
        """Why a run that ended has no value of a measure."""
        if run.get("stopped"):
            return f"the run stopped: {' '.join(run['stopped'].split())}"
        if measure in ("ratio_dev", "ratio_mean"):
            return "no iteration made an update"
        if measure == "until":
            return f"its curve stayed below {REACHED:.2f}"
        if measure == "at_equal_iterations":
            at = self.equal_iterations()
            return (
                "the runs were not evaluated after the same iterations"
                if at is None
                else f"the evaluation after {at} has no score"
            )
        if measure == "area":
            gaps = [str(point["iteration"]) for point in run["curve"] if point["colour_match"] is None]
            return f"the evaluations after {', '.join(gaps)} have no score" if gaps else "the run was evaluated less than twice"
        if measure == "size_change":
            measure = "jpeg_size"
            if self.before.get("measures", {}).get(measure) is None:
                return f"the untrained model has no {measure}"
        scores = run.get("per_prompt", {}).get(measure)
        if scores is None:
            return "it was not looked at"
        return f"samples of {sum(score is None for score in scores)} of {len(scores)} prompts could not be scored"

    def why_not_measured(self, comparison: Comparison) -> str:
        """Why a comparison has no verdict: it takes two seeds in which both arms have a value."""
        reasons = [
            f"{label}, seed {seed}: {why}"
            for label in (comparison.first, comparison.second)
            for seed, why in self.missing(label, comparison.measure).items()
        ]
        if self.seeds < 2:
            reasons.append("one seed has no standard error; --seeds 2 or more")
        return "; ".join(reasons) or "too few seeds have both"

    def not_measured(self) -> list[str]:
        """What the table lacks, in words: arm, measure, seeds and why."""
        columns = dict.fromkeys([*self.study.measures, *(c.measure for c in self.study.comparisons)])
        lines = []
        for label in (BEFORE, *self.arms):
            reasons: dict[str, list[str]] = {}
            for measure in columns:
                for seed, why in self.missing(label, measure).items():
                    if label == BEFORE or seed in self.finished(label):  # that a run failed is told by itself
                        which = measure if label == BEFORE else f"{measure} in seed {seed}"
                        reasons.setdefault(why, []).append(which)
            lines += [f"{label}: {', '.join(dict.fromkeys(which))}: {why}" for why, which in reasons.items()]
        return lines

    def by_seed(self, measure: str) -> list[str]:
        """``label: value of each seed``, for every arm that has one."""
        lines = []
        for label in self.arms:
            values = self.values(label, measure)
            if any(value is not None for value in values.values()):
                said = ["never" if value is None else f"{value:.1f}" for value in values.values()]
                lines.append(f"{label} {', '.join(said)}")
        return lines

    def equal_iterations(self) -> int | None:
        """The last iteration after which every run was evaluated."""
        evaluated = [
            {point["iteration"] for point in run["curve"]} for label in self.arms for run in self.finished(label).values()
        ]
        return max(set.intersection(*evaluated), default=None) if evaluated else None

    def estimate(self, label: str, measure: str) -> Estimate:
        """Mean over seeds; of the untrained model, which no seed changes, without an error."""
        values = list(self.values(label, measure).values())
        return statistics.estimate(values[:1] if label == BEFORE else values)

    def judge(self) -> list[Judged]:
        """Every comparison of the study."""
        judged = []
        for comparison in self.study.comparisons:
            first, second, measure = comparison.first, comparison.second, comparison.measure
            found = statistics.difference(self.values(first, measure), self.values(second, measure))
            verdict = statistics.verdict(comparison.relation, found)
            why = self.why_not_measured(comparison) if verdict == statistics.NOT_MEASURED else ""
            estimates = self.estimate(first, measure), self.estimate(second, measure)
            judged.append(Judged(comparison, *estimates, found, verdict, why))
        return judged

    def verdict(self) -> str:
        """On the study as a whole."""
        return statistics.overall([judged.verdict for judged in self.judge()])

    def seen(self) -> str:
        """One sentence on all comparisons, from the numbers."""
        judged = self.judge()
        agreeing = sum(statistics.agrees(j.verdict) for j in judged)
        who = "the paper says" if self.study.of_the_paper else "claimed"
        return f"{agreeing} of {len(judged)} comparisons as {who}. " + "; ".join(j.sentence() for j in judged) + "."

    def below_untrained(self, label: str) -> int:
        """Runs that end below where they began: by more than two standard errors over prompts, of the same noise."""
        measure = next((c.measure for c in self.study.comparisons if c.measure in self.before.get("per_prompt", {})), None)
        if measure is None:
            return 0
        start = self.before["per_prompt"][measure]
        count = 0
        for run in self.finished(label).values():
            ends = run["per_prompt"][measure]
            change = statistics.estimate([None if a is None or b is None else b - a for a, b in zip(start, ends, strict=True)])
            if change.mean is not None and change.error is not None:
                count += change.mean < -statistics.ERRORS * change.error
        return count

    def not_finite(self, label: str) -> int:
        """Runs in which a gradient or too many samples were not finite numbers."""
        return sum(bool(run["not_finite"] or run["stopped"]) for run in self.finished(label).values())

    def failed(self, label: str) -> dict[int, str]:
        """Seed -> why there is no result."""
        return {seed: run["error"] for seed, run in self.arms[label].items() if "error" in run}

    def spent(self, label: str) -> float | None:
        """Network evaluations that an iteration of an arm really took, on average."""
        return statistics.estimate([run["counted"] for run in self.finished(label).values()]).mean

    def miscounted(self) -> list[str]:
        """Arms whose network evaluations were not what the budget took them for, in words."""
        lines = []
        for label in self.arms:
            for run in self.finished(label).values():
                near = _DRAWN_WITHIN if run["drawn"] else 1e-9
                if run["counted"] is not None and not math.isclose(run["counted"], run["cost"], rel_tol=near):
                    lines.append(f"{label}: {run['counted']:.0f} network evaluations an iteration, planned {run['cost']}")
                    break
        return lines


def collect(plan: StudyPlan, errors: dict[str, str], made: dict[str, Any]) -> Results:
    """The results of a study's jobs that are there; ``errors``: folder name of a failed job -> why."""

    def of(job: Any) -> dict[str, Any]:
        if job.folder.name in errors:
            return {"error": errors[job.folder.name]}
        result = job.result()
        return {**result, "folder": str(job.folder)} if result else {"error": "not run"}

    before = of(plan.before)
    arms = {label: {seed: of(job) for seed, job in by_seed.items()} for label, by_seed in plan.arms.items()}
    return Results(plan.study, made, before, arms)


def save(results: Results, file: Path) -> None:
    """Write results.json."""
    content = {
        "study": results.study.name,
        "verdict": results.verdict(),
        "seen": results.seen(),
        "made": results.made,
        "before": results.before,
        "arms": results.arms,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, (json.dumps(content, indent=1) + "\n").encode())


def read_all(out: Path) -> list[Results]:
    """The results of all studies in ``out``, in the order of the definitions.

    Raises:
        UserError: there are none.
    """
    found = []
    for study in STUDIES.values():
        file = out / study.name / RESULTS
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            arms = {label: {int(s): run for s, run in by_seed.items()} for label, by_seed in content["arms"].items()}
            if set(arms) != {arm.label for arm in study.arms}:
                raise UserError(
                    f"{file} has other arms than the study {study.name} has now: run it again (runs that are made stay)"
                )
            found.append(Results(study, content["made"], content["before"], arms))
    if not found:
        raise UserError(f"{out} has no results of studies yet: fastvideo-grpo study all --out {out}")
    return found
