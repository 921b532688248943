"""Studies: definitions, budgets, identities of runs, statistics, verdicts, workers, pages. No model is trained here."""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fastvideo_grpo import cli
from fastvideo_grpo.commands import study as command
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.studies import budget, jobs, report, results, statistics
from fastvideo_grpo.studies.definitions import BEFORE, BEST_WAY, BUDGET, MEASURES, PAPERS_WAY, SEEDS, STUDIES
from fastvideo_grpo.studies.jobs import arm_config, plan_study, what_runs
from fastvideo_grpo.studies.pool import run_jobs
from tests.workers import studies as work

ROOT = Path(__file__).parent.parent

COMPARED = {
    "initial_noise": 2,
    "timesteps": 5,
    "noise_level": 5,
    "noise_schedule": 3,
    "best_of_n": 3,
    "binary_reward": 2,
    "multi_reward": 3,
    "diversity": 2,
    "objectives": 5,
    "methods": 8,
    "ddpo_flow": 2,
    "cfg_training": 2,
}


def test_every_comparison_of_the_paper_has_a_study_with_at_least_three_seeds():
    assert {name: len(study.arms) for name, study in STUDIES.items()} == COMPARED
    assert SEEDS >= 3


@pytest.mark.parametrize("name", STUDIES)
def test_a_studys_comparisons_are_between_its_arms_in_known_measures(name):
    study = STUDIES[name]
    labels = [arm.label for arm in study.arms]
    assert len(set(labels)) == len(labels) and BEFORE not in labels
    for comparison in study.comparisons:
        assert {comparison.first, comparison.second} <= {*labels, BEFORE} and comparison.first != comparison.second
        assert comparison.measure in MEASURES and comparison.relation in (">", "=")
    assert study.comparisons and set(study.measures) <= set(MEASURES)


@pytest.mark.parametrize("name", STUDIES)
def test_the_arms_of_a_study_take_equal_budgets_of_ten_or_more_steps(name, tmp_path):
    study = STUDIES[name]
    plan = plan_study(study, seeds=3, evaluations=BUDGET, out=tmp_path)
    for by_seed in plan.arms.values():
        assert len({job.folder for job in by_seed.values()}) == 3
        for seed, job in by_seed.items():
            run = job.values["run"]
            assert job.values["sample"]["steps"] >= 10 and job.iterations == run["iterations"] >= 10
            assert job.seed == run["seed"] == job.values["prompts"]["seed"] == seed
            spent = job.iterations * job.cost
            assert study.budget * BUDGET - job.cost < spent <= study.budget * BUDGET


def test_the_arms_are_what_their_labels_say():
    def of(name):
        return {arm.label: arm_config(STUDIES[name], arm) for arm in STUDIES[name].arms}

    noise = of("initial_noise")
    assert [noise[label].sample.init_noise for label in ("shared noise", "noise per sample")] == ["shared", "per_sample"]
    steps = {label: (c.grpo.timesteps.strategy, c.grpo.timesteps.fraction) for label, c in of("timesteps").items()}
    assert steps == {
        "first 30 % of steps": ("first", 0.3),
        "random 30 % of steps": ("random", 0.3),
        "last 40 % of steps": ("last", 0.4),
        "random 60 % of steps": ("random", 0.6),
        "all steps": ("all", 1.0),
    }
    assert [c.sample.noise_level for c in of("noise_level").values()] == [0.1, 0.3, 0.6, 1.0, 1.5]
    best = of("best_of_n")
    assert [c.grpo.group_size for c in best.values()] == [16, 64, 256]
    assert best["16 of 16 samples"].grpo.best_of is None
    assert all(
        (c.grpo.best_of.top, c.grpo.best_of.bottom) == (8, 8) for label, c in best.items() if label != "16 of 16 samples"
    )
    assert of("binary_reward")["binary reward"].rewards.models["reward"].outputs["colour_match"].threshold == 0.8
    trained = {label: {n for n in c.rewards.models if not n.startswith("watched_")} for label, c in of("multi_reward").items()}
    assert trained == {"colour alone": {"reward"}, "size alone": {"size"}, "colour and size": {"reward", "size"}}


def test_network_evaluations_are_counted_by_hand():
    base = arm_config(STUDIES["noise_level"], STUDIES["noise_level"].arms[3])
    assert budget.evaluations_per_iteration(base) == 4 * 8 * 10 + 4 * 8 * 6 * 3
    base.sample.cfg_scale = 3.0
    assert budget.evaluations_per_iteration(base) == 2 * (4 * 8 * 10 + 4 * 8 * 6 * 3)
    base.sample.cfg_scale = 1.0
    base.grpo.kl_weight = 0.1  # a forward of the reference
    assert budget.evaluations_per_iteration(base) == 4 * 8 * 10 + 4 * 8 * 6 * 4
    best = arm_config(STUDIES["best_of_n"], STUDIES["best_of_n"].arms[2])
    assert budget.evaluations_per_iteration(best) == 256 * 10 + 16 * 6 * 3
    best.grpo.best_of.top = 1  # 9 rows in a micro-batch of 16: those that only fill are computed, too
    assert budget.evaluations_per_iteration(best) == 256 * 10 + 16 * 6 * 3
    assert budget.iterations(best, 2 * 2848 + 5) == 2
    with pytest.raises(UserError, match=r"--budget is 2847.*at least 2848"):
        budget.iterations(best, 2847)


def test_equal_arms_of_different_studies_are_one_run_and_anything_that_matters_makes_another(tmp_path):
    def folders(name, **arguments):
        plan = plan_study(STUDIES[name], **{"seeds": 2, "evaluations": BUDGET, "out": tmp_path, **arguments})
        return {label: {seed: job.folder.name for seed, job in by_seed.items()} for label, by_seed in plan.arms.items()}, plan

    noise, plan = folders("noise_level")
    assert folders("initial_noise")[0]["shared noise"] == noise["noise 1.0"] == folders("timesteps")[0]["random 60 % of steps"]
    assert folders("multi_reward")[1].before.folder == plan.before.folder
    assert len({folder for by_seed in noise.values() for folder in by_seed.values()}) == 10
    assert folders("noise_level", evaluations=BUDGET // 2)[0]["noise 1.0"] != noise["noise 1.0"]
    assert folders("noise_level", out=tmp_path / "elsewhere")[0] == noise


def test_a_comment_or_docstring_leaves_finished_runs_valid_and_code_does_not():
    source = '"""Module."""\ndef f(x):\n    """Doc."""\n    return x + 1  # why\n'
    assert what_runs(source) == what_runs("def f(x):\n    return x + 1\n")
    assert what_runs(source) != what_runs(source.replace("x + 1", "x + 2"))
    package = ROOT / "fastvideo_grpo"
    assert all(list(package.glob(pattern)) for pattern in jobs.CODE)  # a file that was moved must not drop out


def test_means_and_errors_by_hand():
    three = statistics.estimate([1.0, 2.0, 6.0])
    assert (three.mean, three.n) == (3.0, 3) and three.error == pytest.approx(math.sqrt(7.0 / 3))
    assert statistics.estimate([None, 4.0, math.nan]) == statistics.Estimate(4.0, None, 1)
    assert statistics.estimate([]) == statistics.Estimate(None, None, 0)
    # By seed: 1, 2 and 3, though each arm alone is far more spread.
    paired = statistics.difference({0: 11.0, 1: 22.0, 2: 33.0, 3: None}, {0: 10.0, 1: 20.0, 2: 30.0, 3: 1.0})
    assert paired.mean == 2.0 and paired.error == pytest.approx(1 / math.sqrt(3))
    assert statistics.area([(0, 0.0), (1, 1.0), (3, 1.0)]) == pytest.approx(2.5 / 3)
    assert statistics.area([(0, 0.5)]) is None and statistics.area([(0, 0.5), (1, None)]) is None
    assert statistics.chance(3) == pytest.approx(1 - 2 / math.sqrt(6)) and statistics.chance(2) == pytest.approx(
        1 - 2 / math.pi * math.atan(2)
    )


@pytest.mark.parametrize(
    ("relation", "mean", "error", "verdict"),
    [
        (">", 0.2, 0.1, "shown"),
        (">", 0.199, 0.1, "not shown"),
        (">", -0.199, 0.1, "not shown"),
        (">", -0.2, 0.1, "contradicted"),
        (">", 0.0, 0.0, "not shown"),
        ("=", 0.199, 0.1, "not told apart"),
        ("=", 0.2, 0.1, "contradicted"),
        ("=", 0.0, 0.0, "not told apart"),
        (">", 0.2, None, "not measured"),
        (">", None, None, "not measured"),
    ],
)
def test_verdicts(relation, mean, error, verdict):
    assert statistics.verdict(relation, statistics.Estimate(mean, error, 3)) == verdict


def test_a_studys_verdict_is_no_better_than_its_comparisons():
    assert statistics.overall(["shown", "not told apart"]) == "agrees"
    assert statistics.overall(["shown", "not shown"]) == "agrees in part"
    assert statistics.overall(["shown", "not measured"]) == "agrees in part"
    assert statistics.overall(["not shown", "not shown"]) == "does not show it"
    assert statistics.overall(["shown", "contradicted"]) == "agrees in part, contradicts in part"
    assert statistics.overall(["not shown", "contradicted"]) == "contradicts"
    assert statistics.overall(["not measured"]) == "not measured"
    with pytest.raises(ValueError, match="relation is '<'"):
        statistics.verdict("<", statistics.Estimate(0.0, 1.0, 3))


def test_pixel_measures_by_hand():
    import torch

    from fastvideo_grpo.studies import pixels

    media = torch.zeros(4, 1, 2, 2, 3, dtype=torch.uint8)  # two prompts of two samples
    media[1] = 255  # all of the first prompt's second picture: distance 1; the second prompt's are alike
    assert pixels.diversity(media, 2) == pytest.approx(0.5)
    assert pixels.shape_diversity(media, 2) == 0.0  # white is no colour
    media[3, 0, 0, 0] = torch.tensor([255, 0, 0])  # a quarter of a picture is coloured
    assert pixels.shape_diversity(media, 2) == pytest.approx(0.125)
    assert pixels.roughness(media[:3]) == 0.0
    stripes = torch.zeros(1, 1, 2, 4, 3, dtype=torch.uint8)
    stripes[..., ::2, :] = 255
    assert pixels.roughness(stripes) == pytest.approx(0.5)  # 1 across, 0 down


def arguments(**changes):
    return argparse.Namespace(**{"seeds": 2, "budget": 1792, "workers": 2, **changes})


def made(out: Path) -> list[str]:
    file = out / "runs" / "made.txt"
    return file.read_text().splitlines() if file.is_file() else []


def test_a_studys_runs_are_made_once_and_its_pages_say_what_was_seen(tmp_path, capsys):
    study = STUDIES["initial_noise"]
    assert command.run_studies([study], arguments(), tmp_path, work.fake_measure) == 0
    assert len(made(tmp_path)) == 5  # two arms, two seeds, and the untrained model
    assert "1 studies, 5 runs (0 made already), 2 at a time" in capsys.readouterr().out
    assert command.run_studies([study, STUDIES["diversity"]], arguments(), tmp_path, work.fake_measure) == 0
    assert len(made(tmp_path)) == 5  # the other study's arms are the same runs
    for run in (tmp_path / "runs").glob("*-seed0"):
        Image.new("RGB", (192, 32), "red").save(run / "pictures.png")

    (found, diversity) = results.read_all(tmp_path)
    reward, size, roughness = found.judge()
    assert reward.verdict == "shown" and reward.found.mean == pytest.approx(0.2) and found.equal_iterations() == 2
    assert size.verdict == "contradicted"  # shared moved further, in the fake
    assert found.estimate("shared noise", "area").mean == pytest.approx(0.5 * 0.5 + 0.5 * 0.905)
    assert roughness.verdict == "not shown" and found.verdict() == "agrees in part, contradicts in part"
    assert found.seen().startswith(
        "1 of 3 comparisons as the paper says. shared noise minus noise per sample in colour_match: +0.200"
    )
    assert found.below_untrained("shared noise") == 0 and diversity.judge()[0].verdict == "not shown"

    command._write_pages(tmp_path, str(tmp_path / "docs" / "studies.md"))
    page = (tmp_path / "docs" / "studies.md").read_text()
    for text in (
        study.claim,
        found.seen(),
        found.made["commit"] or "None",
        found.made["machine"],
        "| shared noise > noise per sample | colour_match | 0.905 ± 0.005 | 0.705 ± 0.005 | +0.200 ± 0.000 | shown |",
        "![Initial noise: curves](images/studies/initial_noise_curves.png)",
        "come about by chance in 30% of comparisons",
        "![Initial noise: pictures of the first seed](images/studies/initial_noise_pictures.png)",
        "from the same noise: a red circle, a blue square.",
    ):
        assert text in page
    assert (tmp_path / "docs" / "images" / "studies" / "initial_noise_curves.png").stat().st_size > 1000
    whole = (tmp_path / "index.html").read_text()
    assert 'id="initial-noise"' in whole and "data:image/png;base64" in whole and 'src="http' not in whole
    assert "Initial noise" in (tmp_path / "initial_noise" / "index.html").read_text()


def test_each_arm_takes_the_learning_rate_that_served_it_best_in_a_run_of_another_seed(tmp_path, capsys):
    """In the fake the second of four, and of the best way the third."""
    whole = STUDIES["methods"]
    study = dataclasses.replace(whole, arms=whole.arms[::7], comparisons=whole.comparisons[:1])
    assert command.run_studies([study], arguments(budget=20_000), tmp_path, work.prefers_a_rate) == 0
    printed = capsys.readouterr().out
    assert "first a learning rate for each arm of methods" in printed and "runs to choose by, 8 runs" in printed
    content = json.loads((tmp_path / "methods" / results.RESULTS).read_text())
    assert content["made"]["searched"] == {PAPERS_WAY: "optim.lr=3.5e-4", BEST_WAY: "optim.lr=1.4e-3"}
    plan = plan_study(study, 2, 20_000, tmp_path, content["made"]["searched"])
    assert {job.seed for by_seed in plan.arms.values() for job in by_seed.values()} == {0, 1}
    for label, rate in ((PAPERS_WAY, 3.5e-4), (BEST_WAY, 1.4e-3)):
        assert {job.values["optim"]["lr"] for job in plan.arms[label].values()} == {rate}
        assert all(job.result() for job in plan.arms[label].values())
    assert len(made(tmp_path)) == 8 + 4 + 1
    assert command.run_studies([study], arguments(budget=20_000), tmp_path, work.prefers_a_rate) == 0
    assert len(made(tmp_path)) == 8 + 4 + 1


def test_evaluations_until_a_reward_are_told_seed_by_seed(tmp_path):
    whole = STUDIES["methods"]
    study = dataclasses.replace(whole, arms=whole.arms[::7], comparisons=whole.comparisons[:1])
    assert command.run_studies([study], arguments(budget=20_000), tmp_path, work.fake_measure) == 0
    plan = plan_study(study, 2, 20_000, tmp_path)
    found = results.collect(plan, {}, {})
    for run in found.arms[BEST_WAY].values():
        run["curve"][-1]["colour_match"] = 0.7
    paper = found.values(PAPERS_WAY, "until")
    assert paper[0] > paper[1] > 0  # the fake's second seed rises higher
    page = report.markdown(report.section(found), tmp_path, ".")
    assert f"**until, seed by seed:** {PAPERS_WAY} {paper[0]:.1f}, {paper[1]:.1f}." in page


def test_evaluations_until_a_reward_by_hand():
    assert statistics.reached([(0, 0.5), (10, 0.7), (20, 0.9)], 0.8) == pytest.approx(15)
    assert statistics.reached([(0, 0.9)], 0.8) == 0
    assert statistics.reached([(0, 0.5), (10, 0.7)], 0.8) is None
    assert statistics.reached([(0, 0.5), (10, None), (20, 0.9)], 0.8) is None


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    study = STUDIES["initial_noise"]
    plan = plan_study(study, 2, 1792, tmp_path)
    for job in plan.jobs()[:3]:
        job.folder.mkdir(parents=True)
        work.fake_measure(job)
    half = plan.jobs()[3].folder
    half.mkdir()
    (half / "metrics.jsonl").write_text("{}\n")  # it was killed in the middle of this one
    command.run_studies([study], arguments(), tmp_path, work.fake_measure)
    assert len(made(tmp_path)) == len(set(made(tmp_path))) == 5 and made(tmp_path)[:3] == [
        job.folder.name for job in plan.jobs()[:3]
    ]


def test_failing_runs_are_told_with_their_log_and_leave_the_others_alone(tmp_path, capsys):
    study = STUDIES["initial_noise"]
    assert command.run_studies([study], arguments(), tmp_path, work.fails_per_sample) == 2
    printed = capsys.readouterr().out
    assert "FAILED: ArithmeticError: no luck; see" in printed and "SIGKILL" in printed
    plan = plan_study(study, 2, 1792, tmp_path)
    log = plan.arms["noise per sample"][0].log_file.read_text()
    assert "about to fail" in log and "Traceback" in log and "no luck" in log
    (found,) = results.read_all(tmp_path)
    assert len(found.finished("shared noise")) == 2 and set(found.failed("noise per sample")) == {0, 1}
    assert found.verdict() == "not measured"
    assert "noise per sample, seed 0: the run failed: ArithmeticError: no luck" in found.seen()
    page = report.markdown(report.section(found), tmp_path, ".")
    assert "**Failed:** noise per sample, seed 0: ArithmeticError: no luck" in page and "0 of 2 ended" in page
    untrained_failed = dataclasses.replace(found, before={"error": "no luck either"})
    Image.new("RGB", (192, 32), "red").save(plan.arms["shared noise"][0].folder / "pictures.png")
    page = report.markdown(report.section(untrained_failed), tmp_path, ".")
    assert "**Failed:** untrained: no luck either" in page and "a red circle, a blue square" in page
    # What failed is made at the next start.
    assert command.run_studies([study], arguments(), tmp_path, work.fake_measure) == 0
    assert results.read_all(tmp_path)[0].judge()[0].verdict == "shown"


def test_what_was_not_measured_is_told_with_the_reason(tmp_path, capsys):
    """On the page and on the console: a single seed, a run that stopped, samples without a score, a gap in a curve."""
    study = STUDIES["initial_noise"]
    assert command.run_studies([study], arguments(seeds=1), tmp_path, work.fake_measure) == 0
    assert "initial_noise, arm 'shared noise', seed 0: colour_match 0.900" in capsys.readouterr().out
    command._write_pages(tmp_path, None)
    assert "not measured: colour_match: one seed has no standard error; --seeds 2 or more" in capsys.readouterr().out
    assert "not measured: one seed has no standard error" in (tmp_path / "initial_noise" / "results.md").read_text()

    assert command.run_studies([study], arguments(seeds=3), tmp_path, work.fake_measure) == 0
    plan = plan_study(study, 3, 1792, tmp_path)
    for seed, changes in enumerate(
        (
            {"stopped": "16 of 16 samples could not be scored"},
            {"per_prompt": {"colour_match": [0.5, None, None], "jpeg_size": [1.0]}},
            {"curve": [{"iteration": i, "spent": i, "colour_match": v} for i, v in ((0, 0.5), (1, None), (2, 0.5))]},
        )
    ):
        job = plan.arms["noise per sample"][seed]
        result = {**job.result(), **changes}
        if seed < 2:
            result["measures"] |= {"colour_match": None}
        job.result_file.write_text(json.dumps(result))
    found = results.collect(plan, {}, results.read_all(tmp_path)[0].made)
    reasons = [
        "noise per sample, seed 0: the run stopped: 16 of 16 samples could not be scored",
        "noise per sample, seed 1: samples of 2 of 3 prompts could not be scored",
    ]
    assert found.judge()[0].why == "; ".join(reasons) and "; ".join(reasons) in found.seen()
    assert "noise per sample: area in seed 2: the evaluations after 1 have no score" in found.not_measured()
    results.save(found, tmp_path / "initial_noise" / results.RESULTS)
    command._write_pages(tmp_path, None)
    printed, page = capsys.readouterr().out, (tmp_path / "initial_noise" / "results.md").read_text()
    for text in (*reasons, "area in seed 2: the evaluations after 1 have no score"):
        assert text in printed and text in page
    assert command._measured(plan.arms["noise per sample"][1].result()) == (
        "colour_match not measured (samples of 2 prompts could not be scored)"
    )


def test_workers_run_at_the_same_time(tmp_path):
    two = plan_study(STUDIES["initial_noise"], 1, 1792, tmp_path).jobs()[:2]
    finished = list(run_jobs(two, 2, work.meets_another))
    assert [f.error for f in finished] == [None, None] and len({f.result for f in finished}) == 2


def test_workers_end_with_a_study_that_is_killed(tmp_path):
    program = (
        "from pathlib import Path\n"
        "from fastvideo_grpo.studies.pool import Job, run_jobs\n"
        "from tests.workers.studies import stays\n"
        f"list(run_jobs([Job('a', Path({str(tmp_path / 'job')!r}), 0, {{}}, True, 1, 1)], 1, stays))\n"
    )
    study = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        noted = tmp_path / "job" / "pid"
        _wait_for(lambda: noted.is_file() and noted.read_text())
        worker = int(noted.read_text())
        assert Path(f"/proc/{worker}").exists()
    finally:
        study.kill()
        study.wait()
    _wait_for(lambda: not Path(f"/proc/{worker}").exists())


def _wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_counts_that_are_not_as_planned_are_told(tmp_path):
    plan = plan_study(STUDIES["initial_noise"], 1, 1792, tmp_path)
    for job in plan.jobs():
        job.folder.mkdir(parents=True)
        result = work.fake_measure(job)
        if job.values["sample"]["init_noise"] == "per_sample":
            job.result_file.write_text(json.dumps({**result, "counted": 900.0}))
    found = results.collect(plan, {}, {})
    assert found.miscounted() == ["noise per sample: 900 network evaluations an iteration, planned 896"]
    assert "| noise per sample | 2 | 900 |" in report.markdown(report.section(found), tmp_path, ".")
    for run in found.arms["noise per sample"].values():
        run["drawn"] = True  # planned on average over the places
    assert found.miscounted() == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["study"], "name a study, or all: initial_noise"),
        (["study", "nosie"], "there is no study nosie; there are initial_noise"),
        (["study", "noise_level", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["study", "noise_level", "--workers", "0"], "--workers is 0"),
        (["study", "noise_level", "--budget", "895"], "--budget is 895, but one iteration takes 896"),
        (["study", "noise_level", "--docs", "page.html"], "must be a Markdown file"),
        (["study", "--docs", "page.md", "--out", "nowhere"], "nowhere has no results of studies yet"),
        (["study", "noise_level", "--out", "page.md/studies"], "a file, not a folder"),
    ],
)
def test_bad_commands_are_told(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").touch()
    assert cli.main(argv) == 1
    assert said in capsys.readouterr().err


def test_the_studies_can_be_listed(capsys):
    assert cli.main(["study", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == list(STUDIES)
    assert lines[5].strip() == "arms: noise 0.1 | noise 0.3 | noise 0.6 | noise 1.0 | noise 1.5"
