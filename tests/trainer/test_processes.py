"""The loop in real processes: samples that change hands, damaged checkpoints (promise 6), rewards that hang or end a process
(promise 5), Ctrl-C.

That processes equal one, and kill and resume: tests/promises.
"""

import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import psutil

from fastvideo_grpo.checkpoints import run_status
from tests.trainer import runs


def test_best_of_n_moves_samples_between_processes(tiny_flux, tmp_path):
    """One prompt an update: its samples are drawn on both ranks, and each rank trains on the best or the worst."""
    weights = {}
    for processes in (1, 2):
        overrides = runs.settings(
            tmp_path / str(processes),
            tiny_flux,
            **({"engine__kind": "deepspeed"} if processes == 2 else {}),
            grpo__group_size=8,
            grpo__best_of__top=2,
            grpo__best_of__bottom=2,
            grpo__prompts_per_iteration=2,
        )
        assert runs.run(overrides, processes=processes) == [0] * processes
        weights[processes] = runs.weights(tmp_path / str(processes), 3)
    assert runs.largest_difference(weights[1], weights[2]) < 1e-6


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tiny_flux, tmp_path):
    whole = tmp_path / "whole"
    assert runs.run(runs.settings(whole, tiny_flux)) == [0]
    overrides = runs.settings(tmp_path, tiny_flux)
    assert runs.run([*overrides, "run.iterations=2"]) == [0]
    (damaged,) = (tmp_path / "run" / "checkpoints" / "000002" / "state").glob("weights-*.safetensors")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert runs.run(overrides) == [0]
    output = runs.output(tmp_path)
    assert "000002 is damaged" in output and damaged.name in output
    assert "after iteration 1" in output
    assert runs.same_bits(runs.weights(tmp_path, 3), runs.weights(whole, 3))


def test_resuming_with_other_settings_or_prompts_is_refused(tiny_flux, tmp_path):
    overrides = runs.settings(tmp_path, tiny_flux)
    assert runs.run([*overrides, "run.iterations=1"]) == [0]
    assert runs.run([*overrides, "optim.lr=1e-3", "grpo.group_size=8"]) == [1]
    assert "other values of grpo.group_size, optim.lr" in runs.output(tmp_path)
    (tmp_path / "prompts.txt").write_text("another prompt\n")
    assert runs.run(overrides) == [1]
    assert "other prompts" in runs.output(tmp_path)


def test_a_reward_that_hangs_on_one_rank_stops_all_with_what_was_trained_saved(tiny_hunyuan_video, tmp_path):
    """Promise 5, with ranks that wait for the one that scores; and only that one has the rewards in memory."""
    # 8 micro-batches in an iteration; the third one of the second iteration is never answered.
    hanging = {
        "rewards__models__pixels__kind": "test_hangs",
        "rewards__models__pixels__params": f"{{answers: 10, folder: {tmp_path}}}",
        "rewards__timeout_s": 1.0,
        "rewards__retries": 1,
        "rewards__max_invalid_fraction": 0.25,
        "sample__steps": 3,
        "run__iterations": 2,
    }
    shared = {"engine__kind": "deepspeed", "engine__zero_stage": 2, "engine__sequence_parallel": 2}
    overrides = runs.settings(tmp_path, tiny_hunyuan_video, **runs.HUNYUAN_T2V, **shared, **hanging)
    assert runs.run(overrides, processes=2) == [1, 1]
    assert [file.name for file in sorted(tmp_path.glob("made-*"))] == ["made-0"]
    text = runs.output(tmp_path)
    assert "12 of 16 samples of iteration 2 do not count" in text and "no answer within 1 s" in text
    assert runs.checkpoints(tmp_path) == ["000001"]


def test_a_reward_that_ends_its_process_fakes_no_success_and_the_next_start_says_so(tiny_flux, tmp_path):
    """Of two processes the one that is left has an exit code other than 0, which torchrun passes on."""
    overrides = runs.settings(
        tmp_path,
        tiny_flux,
        engine__kind="deepspeed",
        rewards__models__pixels__kind="test_ends_process",
        rewards__models__pixels__params=f"{{answers: 6, folder: {tmp_path}}}",
        run__iterations=2,
    )
    assert runs.run(overrides, processes=2) == [0, 1]
    assert "ended without a word" not in runs.output(tmp_path)
    (tmp_path / "mended").touch()
    assert runs.run(overrides, processes=2) == [0, 0]
    text = runs.output(tmp_path)
    assert text.count("ended without a word in iteration 2, while scoring with reward pixels: killed, out of memory, or") == 1
    assert "rewards.models.pixels.placement=process" in text and "after iteration 1" in text
    assert json.loads((tmp_path / "run" / "status.json").read_text())["ended"] == "finished"


def interrupted(overrides, folder):
    """`fastvideo-grpo train`, which gets Ctrl-C when its first iteration has begun."""
    from fastvideo_grpo import cli

    def interrupt():
        while "1/100 " not in (folder / "output.txt").read_text():
            time.sleep(0.05)
        (folder / "children").write_text(" ".join(str(child.pid) for child in psutil.Process().children()))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    return cli.main(["train", str(folder / "empty.yaml"), *overrides])


def test_ctrl_c_ends_a_run_and_the_processes_of_its_rewards(tiny_flux, tmp_path):
    (tmp_path / "empty.yaml").write_text("{}")
    size = {"rewards__models__pixels__kind": "jpeg_size", "rewards__models__pixels__placement": "process"}
    overrides = runs.settings(tmp_path, tiny_flux, run__iterations=100, run__save_every=100, **size)
    assert runs.in_processes(partial(interrupted, overrides, tmp_path), tmp_path / "output.txt") == [130]
    (worker,) = (tmp_path / "children").read_text().split()
    assert not Path(f"/proc/{worker}").exists()
    assert "was interrupted in iteration " in run_status.how_it_ended(tmp_path / "run")
