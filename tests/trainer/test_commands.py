"""The commands a user starts: the demo, and a train script on two processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastvideo_grpo import cli
from fastvideo_grpo.resources import data_dir

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_the_demo_learns_on_training_and_kept_out_prompts(tmp_path, capsys, seed):
    assert (data_dir() / "tiny-flux-shapes" / "model_index.json").is_file()
    assert cli.main(["demo", "--seed", str(seed), "--out", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr().out
    number = r"(\d\.\d+) ± (\d\.\d+)"
    before, error_before, after, error_after = map(
        float, re.search(rf"training prompts: colour/colour_match {number} -> {number}", printed).groups()
    )
    assert before < 0.6 and after >= 0.70
    before, error_before, after, error_after = map(
        float, re.search(rf"kept-out prompts: colour/colour_match {number} -> {number}", printed).groups()
    )
    assert after - before > 2 * (error_before**2 + error_after**2) ** 0.5
    for name in ("before_after.png", "curve.png", "metrics.jsonl", "config.yaml"):
        assert (tmp_path / "demo" / name).stat().st_size > 0
    assert "wrong on purpose" in printed and "noise level is 1.0" in printed and "make demo REWARD=jpeg_size" in printed


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_video_demo_learns_on_training_prompts(tmp_path, capsys, seed):
    once = ["run.eval_every=30", "run.save_every=30"]  # in the end
    assert cli.main(["demo", "--video", "--seed", str(seed), "--out", str(tmp_path / "demo"), *once]) == 0
    number = r"(\d\.\d+) ± (\d\.\d+)"
    printed = re.search(rf"training prompts: motion/moving_colour {number} -> {number}", capsys.readouterr().out)
    before, error_before, after, error_after = map(float, printed.groups())
    assert after - before > 2 * (error_before**2 + error_after**2) ** 0.5


def test_the_video_demo_runs_and_shows_its_clips(tmp_path, capsys):
    folder = tmp_path / "demo"
    command = ["demo", "--video", "--iterations", "1", "--out", str(folder), "run.eval_prompts=4", "run.eval_samples=1"]
    assert cli.main([*command, "run.sample_every=1", "run.sample_prompts=2"]) == 0
    printed = capsys.readouterr().out
    assert "wrong on purpose" in printed and "make demo-video REWARD=frame_difference" in printed
    assert (folder / "before_after.png").stat().st_size > 0
    index = json.loads((folder / "samples" / "000001" / "index.json").read_text())
    assert [entry["frames"] for entry in index] == [9, 9] and all(
        (folder / "samples" / "000001" / e["file"]).is_file() for e in index
    )
    assert cli.main(["demo", "--reward", "moving_colour"]) == 1
    assert "this demo has colour_match, threshold, jpeg_size" in capsys.readouterr().err


def test_the_demo_runs_with_the_keys_that_it_is_given(tmp_path, capsys):
    (tmp_path / "few.txt").write_text("a red circle\na blue square\n")
    words = [f"run.dir={tmp_path}/mine", f"prompts.path={tmp_path}/few.txt", "rewards.models.size.kind=jpeg_size"]
    words += [
        "prompts.eval_path=null",
        "sample.steps=3",
        "grpo.prompts_per_iteration=4",
        "grpo.updates_per_iteration=1",
        "run.eval_samples=1",
    ]
    assert cli.main(["demo", "--iterations", "1", "--out", str(tmp_path / "other"), *words]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "mine" / "curve.png").is_file() and not (tmp_path / "other").exists()
    assert "training prompts: size/jpeg_size" in printed and "kept-out" not in printed
    assert cli.main(["demo", "run.eval_every=0", f"run.dir={tmp_path}/mine"]) == 1
    assert "run.eval_every is 0, but a demo compares evaluations" in capsys.readouterr().err


@pytest.mark.parametrize("reward", [pytest.param("threshold", marks=pytest.mark.slow), "jpeg_size"])
def test_the_demos_other_rewards_run(tmp_path, capsys, reward):
    command = ["demo", "--reward", reward, "--iterations", "2", "--out", str(tmp_path / "demo"), "run.eval_samples=2"]
    assert cli.main(command) == 0
    assert f"make demo REWARD={reward}" not in capsys.readouterr().out
    key = {"threshold": "reward/colour/colour_match/above_threshold", "jpeg_size": "reward/size/jpeg_size/mean"}[reward]
    lines = [json.loads(line) for line in (tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and key in lines[0]


@pytest.mark.slow
def test_the_train_script_on_two_processes(tmp_path):
    """The tiny recipe from the script, on torchrun and DeepSpeed."""
    environment = {**os.environ, "GPUS": "2", "PYTHON": sys.executable}
    command = ["bash", "train_scripts/flux_t2i.sh", "tiny", f"run.dir={tmp_path / 'run'}", "run.iterations=2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "iteration 2/2" in done.stdout
    index = json.loads((tmp_path / "run" / "samples" / "000002" / "index.json").read_text())
    assert len(index) == 4
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_the_image_to_video_script_on_two_processes_that_share_clips_again_then_sample_and_export(tmp_path, capsys):
    """A second start finds its work done, and the embeddings of images and texts cached."""
    environment = {**os.environ, "GPUS": "2", "PYTHON": sys.executable}
    run = tmp_path / "run"
    command = ["bash", "train_scripts/skyreels_i2v.sh", "tiny", f"run.dir={run}", "run.iterations=2"]
    settings = ["engine.sequence_parallel=2", "engine.zero_stage=2", f"prompts.embeddings={tmp_path / 'embeddings'}"]
    for said in ("iteration 2/2", "has its 2 iterations"):
        done = subprocess.run([*command, *settings], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout
    assert len(list((run / "samples" / "000002").glob("*.mp4"))) == 2
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert line["train/ratio_first_update_max_dev"] == 0.0 and line["train/updates"] == 1
    prompts = ROOT / "data" / "prompts" / "image_to_video" / "prompts.jsonl"
    assert cli.main(["sample", str(run), "--prompts", str(prompts), "--out", str(tmp_path / "samples")]) == 0
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 6
    assert cli.main(["export", str(run), "--out", str(tmp_path / "exported"), "--pipeline"]) == 0
    assert "HunyuanSkyreelsImageToVideoPipeline" in capsys.readouterr().out


def test_samples_of_the_start_are_of_no_iteration(tmp_path, capsys):
    assert cli.main(["sample", str(tmp_path), "--weights", "start", "--iteration", "3", "--prompt", "a cat"]) == 1
    assert "--weights start is before the first iteration: leave --iteration out" in capsys.readouterr().err


def test_a_text_alone_is_no_prompt_for_a_model_that_starts_from_images(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["sample", "train_scripts/configs/skyreels_i2v_tiny.yaml", "--prompt", "a cat"]) == 1
    assert "skyreels_i2v starts from an image: write both into a .jsonl file" in capsys.readouterr().err


def test_the_train_script_says_what_it_needs(tmp_path):
    done = subprocess.run(
        ["bash", "train_scripts/flux_t2i.sh"], cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert done.returncode == 2 and "released_8gpu" in done.stderr and "no recipe" not in done.stderr


@pytest.mark.parametrize("script", ["flux_t2i", "hunyuan_progressive"])
def test_a_recipe_that_is_not_there_is_told_by_its_name(script):
    done = subprocess.run(
        ["bash", f"train_scripts/{script}.sh", "relesed"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "there is no recipe relesed" in done.stderr and "NAME is one of:\n" in done.stderr
