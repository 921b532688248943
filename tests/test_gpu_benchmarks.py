"""A case of benchmarks/gpu_cases.py and gpu_phases.py, whatever becomes of it, is a row of the table."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    import case_runner

    return case_runner


def test_numbers_of_a_case_are_found_among_what_it_prints(runner):
    program = "from case_runner import print_numbers; print('a warning', end=''); print_numbers({'a': [1, None]}); print('end')"
    assert runner.run_case("c", ["-c", program], "cpu", 100) == runner.Row("c", {"a": [1, None]})


def test_a_failure_says_why(runner):
    # The traceback quotes the line that would have printed.
    row = runner.run_case("c", ["-c", "print('RESULT ' + {'a': 1})"], "cpu", 100)
    assert (row.numbers, row.error, row.left_out) == ({}, "exit code 1", False)
    assert "TypeError" in row.output


def test_a_case_that_takes_too_long_is_stopped(runner, monkeypatch):
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0)
    row = runner.run_case("c", ["-IS", "-c", "import time; print('begun', flush=True); time.sleep(600)"], "cpu", 3)
    assert (row.error, row.output, row.left_out) == ("stopped after 3 s", "begun\n", False)


def test_without_time_nothing_is_started(runner):
    assert runner.run_case("c", ["-c", "raise AssertionError"], "cpu", 10).left_out


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([("a", 0.0), ("b", "left out: no time")], 0),
        ([("a", 0.0), ("b", "exit code 1")], 1),
        ([("a", 0.0), ("b", 1e-3)], 1),
        ([("a", 0.0), ("b", float("nan"))], 1),
        ([("a", "left out: no time")], 1),
    ],
)
def test_rows_are_written_and_decide_the_exit_code(runner, tmp_path, capsys, rows, code):
    machine = runner.Machine("cpu", "x86_64", 0, 2, "2.0", "2026-01-01")
    results = runner.Results(
        "name", machine, "tiny", ["ratio - 1", "other"], lambda n: [str(n["ratio deviation"]), ""], tmp_path
    )
    for case, said in rows:
        if isinstance(said, str):
            results.add(runner.Row(case, error=said, left_out=said.startswith("left out")))
        else:
            results.add(runner.Row(case, {"ratio deviation": said}))
    assert results.exit_code(1e-6) == code
    text = (tmp_path / "name.md").read_text()
    assert capsys.readouterr().out == text
    assert text.splitlines()[-len(rows) :] == [f"| {case} | {said} |  |" for case, said in rows]
    assert [each["case"] for each in json.loads((tmp_path / "name.json").read_text())["results"]] == [case for case, _ in rows]
