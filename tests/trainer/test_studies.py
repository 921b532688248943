"""A study's runs on a real trainer: what is counted and measured, and the command from end to end."""

import json

import pytest
import torch

from fastvideo_grpo import cli
from fastvideo_grpo.studies import budget
from fastvideo_grpo.studies.definitions import STUDIES
from fastvideo_grpo.studies.jobs import plan_study
from fastvideo_grpo.studies.measurement import EvaluationCounter, measure

CLEAN = {"sample__init_noise": "per_sample", "sample__stochastic__steps": "none"}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"grpo__kl_weight": 0.1, "grpo__timesteps__strategy": "first", "grpo__timesteps__fraction": 0.5},
        # 3 of 4 rows, in two micro-batches of 2: one row only fills
        {"grpo__best_of__top": 2, "grpo__best_of__bottom": 1},
        {**CLEAN, "grpo__objective": "nft", "sample__solver": "dpm_solver", "grpo__kl_weight": 1e-4},
        {**CLEAN, "grpo__objective": "awm", "grpo__ema_kl_weight": 0.1, "optim__ema_decay": 0.3},
    ],
)
def test_the_budget_counts_the_networks_evaluations(make_trainer, overrides):
    trainer = make_trainer(run__iterations=2, run__eval_every=1, run__eval_prompts=1, run__eval_samples=1, **overrides)
    counter = EvaluationCounter(trainer)
    trainer.train()
    each = budget.evaluations_per_iteration(trainer.config)
    assert counter.total == 2 * each and counter.spent == {0: 0, 1: each, 2: 2 * each}


def test_one_process_makes_a_studys_runs_one_after_the_other(tmp_path):
    """The untrained model and a run of two iterations, measured on the same noise; nothing large stays behind."""
    threads = torch.get_num_threads()
    plan = plan_study(STUDIES["initial_noise"], 1, 1792, tmp_path)
    before, after = measure(plan.before), measure(plan.arms["shared noise"][0])
    torch.set_num_threads(threads)
    assert json.loads(plan.before.result_file.read_text()) == before
    assert before["iterations"] == 0 and before["counted"] is None and before["curve"] == []
    assert after["iterations"] == 2 and after["counted"] == after["cost"] == 896
    assert [(point["iteration"], point["spent"]) for point in after["curve"]] == [(0, 0), (1, 896), (2, 1792)]
    assert after["measures"]["ratio_dev"] == 0.0 and after["stopped"] is None and after["not_finite"] == 0
    for result in (before, after):
        measures, scores = result["measures"], result["per_prompt"]["colour_match"]
        assert len(scores) == 18 and measures["colour_match"] == pytest.approx(sum(scores) / 18)
        assert measures["colour_match_train"] == pytest.approx(sum(scores[:12]) / 12)
        assert 0 < measures["diversity"] < 1 and 0 < measures["shape_diversity"] < 1 and 0 < measures["roughness"] < 1
    assert before["measures"]["colour_match"] != after["measures"]["colour_match"]
    # The curve's first point is the untrained model, on two of its eight samples.
    assert after["curve"][0]["colour_match"] == pytest.approx(before["measures"]["colour_match"], abs=0.15)
    assert (plan.before.folder / "pictures.png").is_file()
    assert not (plan.arms["shared noise"][0].folder / "checkpoints").exists()


@pytest.mark.slow
def test_a_study_from_the_command_to_its_page(tmp_path, capsys):
    out, docs = tmp_path / "studies", tmp_path / "docs" / "studies.md"
    argv = ["study", "initial_noise", "--seeds", "2", "--budget", "1792", "--workers", "2", "--out", str(out)]
    assert cli.main([*argv, "--docs", str(docs)]) == 0
    printed = capsys.readouterr().out
    assert "5/5" in printed and "FAILED" not in printed
    page = docs.read_text()
    assert "| shared noise | 2 | 896 |" in page and "curves](images/studies/initial_noise_curves.png)" in page
    assert "pictures of the first seed" in page and "Not as planned" not in page
    assert cli.main(argv) == 0
    assert "5 runs (5 made already)" in capsys.readouterr().out
