"""metrics.jsonl, pictures and the console."""

import json

import torch

from fastvideo_grpo.tracking.console import Console
from fastvideo_grpo.tracking.metrics import MetricsLog
from fastvideo_grpo.tracking.pictures import save_samples


def test_metrics_are_lines_of_json_and_are_cut_back(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for i in range(4):
        log.append({"iteration": i, "loss": float("nan") if i == 1 else i / 2})
    assert [line["loss"] for line in log.read()] == [0.0, None, 1.0, 1.5]
    with log.path.open("a") as file:
        file.write('{"iteration": 4, "lo')  # killed while writing
    assert len(log.read()) == 4
    log.cut_back(2)
    assert [json.loads(line)["iteration"] for line in log.path.read_text().splitlines()] == [0, 1]


def test_samples_are_saved_with_prompt_and_rewards(tmp_path):
    media = torch.randint(0, 256, (3, 1, 32, 48, 3), dtype=torch.uint8)
    rewards = [{"m/score": 0.5}, {"m/score": None}, {"m/score": 1.0}]
    sheet = save_samples(tmp_path, media, ["a cat", "a dog", "x " * 60], rewards, columns=2)
    assert sheet.width > 2 * 96 and (tmp_path / "grid.png").is_file()
    index = json.loads((tmp_path / "index.json").read_text())
    assert [entry["file"] for entry in index] == ["0000.png", "0001.png", "0002.png"]
    assert index[1] == {"file": "0001.png", "prompt": "a dog", "rewards": {"m/score": None}}


def test_console_shows_rewards_invalid_scores_and_evaluations(capsys):
    metrics = {
        "reward/hps/hps/mean": 0.25,
        "reward/hps/hps/invalid": 2,
        "train/grad_norm": 0.5,
        "train/clip_fraction": 0.1,
        "time/rollout": 1.0,
        "eval/train/hps/hps/mean": 0.3,
        "eval/train/hps/hps/stderr": 0.01,
    }
    Console().iteration(3, 10, metrics)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "iteration  3/10  hps/hps 0.250  2 invalid  clipped 10%  grad 0.5  1.0 s"
    assert second == "evaluation after 3: train hps/hps 0.300 ± 0.010"
    Console(quiet=True).iteration(3, 10, metrics)
    assert capsys.readouterr().out == ""
