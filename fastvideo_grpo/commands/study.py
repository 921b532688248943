"""``fastvideo-grpo study``: the paper's comparisons on the tiny models, with several seeds on all cores."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from fastvideo_grpo.commands.arguments import path_argument
from fastvideo_grpo.disk.room import refusal
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.studies.definitions import BUDGET, REACHED, SEEDS, STUDIES, Study
from fastvideo_grpo.studies.pool import Job, run_jobs

EPILOG = """\
examples:
  fastvideo-grpo study --list
  fastvideo-grpo study noise_level timesteps
  fastvideo-grpo study all --docs docs/studies.md
  fastvideo-grpo study --docs docs/studies.md        # only write the page, from the results that are there

A run that was made already, by this study or another or before this one was killed, is not made again, unless its
configuration, its checkpoint or the code that its numbers depend on has changed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", help="studies (see --list), or all")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"runs of each arm (default: {SEEDS})")
    parser.add_argument(
        "--budget", type=int, default=BUDGET, metavar="EVALS", help=f"network evaluations of a run (default: {BUDGET})"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes, one run each at a time (default: one a core)")
    parser.add_argument(
        "--out",
        type=path_argument,
        default="runs/studies",
        metavar="DIR",
        help="runs, results and pages (default: runs/studies)",
    )
    parser.add_argument("--list", action="store_true", help="say which studies there are, and run nothing")
    parser.add_argument("--docs", type=path_argument, metavar="FILE", help="write a Markdown page of all results in DIR")
    parser.epilog = EPILOG


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0: all runs ended well; 1: some failed, which the pages say, too."""
    if arguments.list:
        for study in STUDIES.values():
            print(f"{study.name:15} {study.question}\n{'':15} arms: {' | '.join(arm.label for arm in study.arms)}")
        return 0
    studies = chosen(arguments.names)
    for option in ("seeds", "budget", "workers"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; it must be at least 1")
    if not studies and arguments.docs is None:
        raise UserError(f"name a study, or all: {', '.join(STUDIES)}")
    if arguments.docs is not None and Path(arguments.docs).suffix != ".md":
        raise UserError(f"--docs is {arguments.docs}; it must be a Markdown file, for example docs/studies.md")
    out = Path(arguments.out)
    answer = refusal(out)
    if answer is not None:
        raise UserError(f"--out {out} cannot be written: {answer.reason}; repair it, or choose another folder")
    failures = run_studies(studies, arguments, out) if studies else 0
    _write_pages(out, arguments.docs)
    return 1 if failures else 0


def chosen(names: list[str]) -> list[Study]:
    """The studies of these names, each once.

    Raises:
        UserError: an unknown name.
    """
    unknown = [name for name in names if name != "all" and name not in STUDIES]
    if unknown:
        raise UserError(f"there is no study {', '.join(unknown)}; there are {', '.join(STUDIES)}, and all")
    return list(STUDIES.values()) if "all" in names else [STUDIES[name] for name in dict.fromkeys(names)]


def run_studies(studies: list[Study], arguments: argparse.Namespace, out: Path, work: Any = None) -> int:
    """Make the runs that are missing, and write each study's results; returns how many runs failed."""
    from fastvideo_grpo.studies import results
    from fastvideo_grpo.studies.jobs import plan_search, plan_study

    if work is None:
        from fastvideo_grpo.studies.measurement import measure as work

    started = time.monotonic()
    errors: dict[str, str] = {}
    searches = {study.name: plan_search(study, arguments.budget, out) for study in studies}
    tried = [job for arms in searches.values() for by_value in arms.values() for job in by_value.values()]
    if tried:
        print(f"first a learning rate for each arm of {', '.join(name for name, arms in searches.items() if arms)}", flush=True)
        _make(tried, arguments.workers, work, errors, "runs to choose by")
    chosen = {name: {label: best(by_value) for label, by_value in arms.items()} for name, arms in searches.items()}
    plans = [plan_study(study, arguments.seeds, arguments.budget, out, chosen[study.name]) for study in studies]
    _make(
        [job for study_plan in plans for job in study_plan.jobs()], arguments.workers, work, errors, f"{len(studies)} studies"
    )
    made = provenance(time.monotonic() - started)
    for study_plan in plans:
        name = study_plan.study.name
        found = results.collect(study_plan, errors, {**made, "searched": chosen[name]})
        results.save(found, out / name / results.RESULTS)
    return len(errors)


def best(by_value: dict[str, Job]) -> str:
    """The override whose run needed fewest evaluations until the reward that ``until`` waits for; where none came there, the
    one whose curve is highest on average; the first where none has a curve."""
    from fastvideo_grpo.studies.statistics import area, reached

    runs = {value: (job.result() or {}).get("curve", []) for value, job in by_value.items()}
    curves = {value: [(point["spent"], point["colour_match"]) for point in run] for value, run in runs.items()}

    def rank(value: str) -> tuple[float, float]:
        spent, mean = reached(curves[value], REACHED), area(curves[value])
        return math.inf if spent is None else spent, math.inf if mean is None else -mean

    return min(curves, key=rank)


def _make(jobs: list[Job], workers: int | None, work: Any, errors: dict[str, str], what: str) -> None:
    """Make those that are missing; ``errors`` gets folder -> why of those that failed."""
    from fastvideo_grpo.models import run_config
    from fastvideo_grpo.models.checkpoint import model_facts
    from fastvideo_grpo.planning import plan

    started = time.monotonic()
    wanted: dict[str, Job] = {}
    for job in jobs:
        wanted.setdefault(job.folder.name, job)
    for job in wanted.values():
        config = run_config.build(job.values)
        plan.check_run(config, model_facts(config), ranks=1)
    # The longest first, so that the last ones to end are short.
    missing = sorted((job for job in wanted.values() if job.result() is None), key=lambda job: -_weight(job))
    workers = min(workers or len(os.sched_getaffinity(0)), max(1, len(missing)))
    print(f"{what}, {len(wanted)} runs ({len(wanted) - len(missing)} made already), {workers} at a time", flush=True)
    total = sum(_weight(job) for job in missing)
    done = 0
    for number, finished in enumerate(run_jobs(missing, workers, work), start=1):
        done += _weight(finished.job)
        left = (time.monotonic() - started) * (total - done) / done
        if finished.error is None:
            said = _measured(finished.result)
        else:
            errors[finished.job.folder.name] = f"{finished.error} ({finished.log})"
            said = f"FAILED: {finished.error}; see {finished.log}"
        print(
            f"{number}/{len(missing)}  {finished.job.name}: {said}, {finished.seconds:.0f} s; about {left / 60:.0f} min left",
            flush=True,
        )


def _measured(result: dict[str, Any]) -> str:
    """What a run reached, or why that is not known."""
    score = result["measures"]["colour_match"]
    if score is not None:
        return f"colour_match {score:.3f}"
    unscored = sum(value is None for value in result["per_prompt"]["colour_match"])
    return f"colour_match not measured ({result['stopped'] or f'samples of {unscored} prompts could not be scored'})"


def _weight(job: Job) -> float:
    """Network evaluations of a run, roughly, for the time that is left."""
    return job.iterations * job.cost if job.trained else job.cost


def provenance(seconds: float) -> dict[str, Any]:
    """What a reader needs to make the numbers again."""
    from fastvideo_grpo.tracking.provenance import git_commit, versions

    return {
        "command": shlex.join(["fastvideo-grpo", *sys.argv[1:]]),
        "machine": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), **versions()},
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": seconds,
    }


def cpu_name() -> str:
    """The processor's name as Linux has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _write_pages(out: Path, docs: str | None) -> None:
    """index.html of each study and of all, and the Markdown page if it was asked for."""
    from fastvideo_grpo.studies import report, results

    found = results.read_all(out)
    for one in found:
        blocks = [*report.section(one, 1), *report.introduction([one]), *report.provenance([one])]
        (out / one.study.name / "index.html").write_text(report.page(one.study.title, blocks), encoding="utf-8")
        table = report.markdown(report.section(one, 1), out / one.study.name, ".")
        (out / one.study.name / "results.md").write_text(table, encoding="utf-8")
    title = "The paper's comparisons in miniature" if any(one.study.of_the_paper for one in found) else "Studies in miniature"
    blocks = [
        report.Heading(1, title),
        *report.introduction(found),
        report.summary(found),
        *(block for one in found for block in report.section(one)),
        *report.provenance(found),
    ]
    (out / "index.html").write_text(report.page(title, blocks), encoding="utf-8")
    print(f"\n{'':15} verdict")
    for one in found:
        print(f"{one.study.name:15} {one.verdict()}")
        lacks = [f"{judged.comparison.measure}: {judged.why}" for judged in one.judge() if judged.why]
        for line in dict.fromkeys([*lacks, *one.not_measured()]):
            print(f"{'':15} not measured: {line}")
    print(f"\npages  {out / 'index.html'}")
    if docs is not None:
        file = Path(docs)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(report.markdown(blocks, file.parent / "images" / "studies", "images/studies"), encoding="utf-8")
        print(f"       {file}")
