"""metrics.jsonl, pictures and the console."""

import errno
import io
import json
import os
import resource
import signal
import time

import av
import numpy as np
import pytest
import torch
from PIL import Image

from fastvideo_grpo.errors import UserError
from fastvideo_grpo.tracking.console import Console
from fastvideo_grpo.tracking.metrics import MetricsLog
from fastvideo_grpo.tracking.pictures import contact_sheet, encode_mp4, enlargement, not_samples, save_samples
from fastvideo_grpo.tracking.wandb_run import WandbRun


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


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_line_of_metrics_is_written_whole_or_not_at_all(tmp_path, monkeypatch, fails):
    """A disk that is full for an iteration: half of its line fits, and the next iteration's line begins a line."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"iteration": 0})
    before = log.path.read_bytes()
    with monkeypatch.context() as patch:
        if fails == "write":
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        else:
            patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        try:
            with pytest.raises(OSError):
                log.append({"iteration": 1, "loss": 0.25})
        finally:
            if fails == "write":
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                signal.signal(signal.SIGXFSZ, handler)
    assert log.path.read_bytes() == before
    log.append({"iteration": 2})
    assert [line["iteration"] for line in log.read()] == [0, 2]


BAD_LINES = {
    "torn": (b'{"iteration": 4, "lo', "line 3: it is torn"),
    "torn, the next one glued on": (b'{"iteration": 4, "lo{"iteration": 5}', "line 3: it is torn"),
    "NUL": (b'\0\0\0{"iteration": 4}', "line 3: it holds NUL"),
    "blank": (b"  ", "line 3: it is blank"),
    "other bytes": (b'{"iteration": 4, "note": "\xff\xfe"}', "line 3: it is not UTF-8"),
    "no object": (b"[4]", "line 3: it is no JSON object"),
    "no iteration": (b'{"loss": 1.0}', "line 3: it has no iteration"),
    "a text for an iteration": (b'{"iteration": "4"}', "line 3: its iteration is '4'"),
    "true for an iteration": (b'{"iteration": true}', "line 3: its iteration is True"),
    "nested without an end": (b"[" * 100_000, "line 3: it is torn"),
}


@pytest.mark.parametrize("content, why", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_of_metrics_is_set_aside_and_named(tmp_path, caplog, content, why):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for i in (0, 1, 6):
        log.append({"iteration": i})
    first, second, last = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(first + second + content + b"\n" + last)
    for _ in range(2):
        assert [line["iteration"] for line in log.read()] == [0, 1, 6]
    assert caplog.text.count(why) == 1 and "bad lines: 1, left out" in caplog.text and str(log.path) in caplog.text
    log.cut_back(9)
    assert log.path.read_bytes() == first + second + last and log.set_aside.read_bytes() == content + b"\n"
    log.append({"iteration": 7})
    again = MetricsLog(log.path)
    caplog.clear()
    assert [line["iteration"] for line in again.read()] == [0, 1, 6, 7] and not caplog.records
    log.path.write_bytes(log.path.read_bytes() + content)  # and at the end, before any other line
    again.append({"iteration": 8})
    again.cut_back(9)
    assert "metrics.jsonl.set_aside" in caplog.text and log.set_aside.read_bytes() == 2 * (content + b"\n")
    assert [line["iteration"] for line in MetricsLog(log.path).read()] == [0, 1, 6, 7, 8]


def test_of_an_iteration_that_is_there_twice_the_later_line_counts(tmp_path, caplog):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for i, loss in ((1, 0.1), (2, 0.2), (0, 0.0), (1, 0.5)):
        log.append({"iteration": i, "loss": loss})
    assert log.read() == [{"iteration": i, "loss": loss} for i, loss in ((0, 0.0), (1, 0.5), (2, 0.2))]
    assert "line 1: line 4 has iteration 1, too" in caplog.text
    log.cut_back(2)
    assert [json.loads(line)["loss"] for line in log.path.read_text().splitlines()] == [0.0, 0.5]
    assert json.loads(log.set_aside.read_text())["loss"] == 0.1


def test_the_metrics_of_a_run_that_starts_over_are_set_aside(tmp_path):
    """Its checkpoints were moved away, as advised when all of them are damaged."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for i in range(2):
        log.append({"iteration": i})
    before = log.path.read_bytes()
    log.cut_back(0)
    assert log.read() == [] and log.set_aside.read_bytes() == before


def test_cutting_metrics_back_on_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for i in range(4):
        log.append({"iteration": i})
    before = log.path.read_bytes()
    log.cut_back(4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            log.cut_back(2)
    assert log.path.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_samples_are_saved_with_prompt_and_rewards(tmp_path):
    media = torch.randint(0, 256, (3, 1, 32, 48, 3), dtype=torch.uint8)
    rewards = [{"m/score": 0.5}, {"m/score": None}, {"m/score": 1.0}]
    files = save_samples(tmp_path, media, ["a cat", "a dog", "x " * 60], rewards, columns=2)
    assert Image.open(tmp_path / "grid.png").width > 2 * 96
    for file, picture in zip(files, media, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), picture[0])
    index = json.loads((tmp_path / "index.json").read_text())
    assert [entry["file"] for entry in index] == ["0000.png", "0001.png", "0002.png"]
    assert index[1] == {"file": "0001.png", "prompt": "a dog", "rewards": {"m/score": None}}


def test_samples_in_the_folder_give_way_whatever_their_number(tmp_path):
    """A run that goes on saves the pictures of an iteration again, perhaps of fewer prompts, or clips where there were none."""
    (tmp_path / "notes.txt").write_text("mine")
    save_samples(tmp_path, torch.zeros(5, 1, 32, 32, 3, dtype=torch.uint8), ["a cat"] * 5, [{}] * 5)
    save_samples(
        tmp_path, torch.zeros(2, 1, 32, 32, 3, dtype=torch.uint8), ["a dog"] * 2, [{}] * 2, made_from={"weights": "ema"}
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.png", "0001.png", "grid.png", "index.json", "notes.txt"]
    assert json.loads((tmp_path / "index.json").read_text())[1] == {
        **{"file": "0001.png", "prompt": "a dog", "rewards": {}, "weights": "ema"}
    }
    save_samples(tmp_path, clips_of(2), ["a cat", "a dog"], [{}] * 2, fps=8)
    save_samples(tmp_path, torch.zeros(1, 1, 32, 32, 3, dtype=torch.uint8), ["a cat"], [{}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.png", "grid.png", "index.json", "notes.txt"]
    assert not_samples(tmp_path) == ["notes.txt"]


def clips_of(batch=2, frames=9, height=32, width=48):
    """Smooth clips: a gradient with a blob of another colour that moves. Every frame differs from the others."""
    rows, columns = np.mgrid[0:height, 0:width]
    media = np.empty((batch, frames, height, width, 3))
    for b in range(batch):
        for f in range(frames):
            blob = np.exp(-((columns - width * (f + 1) / (frames + 1)) ** 2 + (rows - height / 2) ** 2) / (height / 4) ** 2)
            background = np.stack([2 * columns + 20 * b, 3 * rows, 60 + 0 * rows], axis=-1)
            media[b, f] = background + blob[..., None] * ([210, 40, 40] - background)
    return torch.from_numpy(media.clip(0, 255).astype(np.uint8))


def read_mp4(source):
    """uint8 [F, H, W, 3], frames per second."""
    with av.open(source) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.average_rate


def test_clips_are_saved_as_mp4_with_contact_sheets_and_read_back(tmp_path):
    media = clips_of()
    rewards = [{"m/score": 0.5}, {"m/score": None}]
    files = save_samples(tmp_path, media, ["a red circle moving right", "a dog"], rewards, fps=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("0000.mp4", "0000.png", "0001.mp4", "0001.png", "grid.png", "index.json")
    ]
    index = json.loads((tmp_path / "index.json").read_text())
    assert index[1] == {
        **{"file": "0001.mp4", "prompt": "a dog", "rewards": {"m/score": None}},
        **{"contact_sheet": "0001.png", "fps": 8, "frames": 9, "enlarged": 6},
    }
    assert files == [tmp_path / entry["file"] for entry in index]
    for file, clip in zip(files, media.numpy(), strict=True):
        read, fps = read_mp4(file)
        assert fps == 8 and read.shape == (9, 32 * 6, 48 * 6, 3)
        middles = read[:, 3::6, 3::6].astype(float)
        assert np.abs(middles - clip).mean() < 2, "the pixels of a small clip are not blurred into each other"
        assert np.abs(read.astype(float) - clip.repeat(6, axis=1).repeat(6, axis=2)).mean() < 2
    grid, sheet = Image.open(tmp_path / "grid.png"), Image.open(tmp_path / "0000.png")
    assert grid.height > 2 * sheet.height and grid.width > sheet.width + 200, "a row for each clip, text beside it"


@pytest.mark.parametrize("height, width", [(33, 47), (32, 271), (301, 64), (256, 256), (5, 3)])
def test_clips_of_any_size_can_be_encoded(height, width):
    clip, factor = clips_of(1, 5, height, width)[0], enlargement(height, width)
    read, _ = read_mp4(io.BytesIO(encode_mp4(clip, 8)))
    height, width = height * factor, width * factor
    assert read.shape == (5, height + height % 2, width + width % 2, 3)
    shown = clip.numpy().repeat(factor, axis=1).repeat(factor, axis=2)
    assert np.abs(read[:, :height, :width].astype(float) - shown).mean() < 3


def test_small_clips_are_enlarged_by_an_even_factor():
    assert [enlargement(side, side // 2) for side in (8, 32, 100, 128, 255, 256, 832)] == [32, 8, 4, 2, 2, 1, 1]


@pytest.mark.parametrize("fps", [8, 23.976, 0.5, 60])
def test_clips_keep_their_frame_rate(fps):
    read, rate = read_mp4(io.BytesIO(encode_mp4(clips_of(1)[0], fps)))
    assert float(rate) == pytest.approx(fps, rel=1e-4) and len(read) == 9


def test_clips_need_a_frame_rate(tmp_path):
    with pytest.raises(ValueError, match="fps is not given"):
        save_samples(tmp_path, clips_of(1), ["a"], [{}])
    with pytest.raises(ValueError, match="fps is 0"):
        save_samples(tmp_path, clips_of(1), ["a"], [{}], fps=0)


@pytest.mark.parametrize("frames, shown", [(2, [0, 1]), (9, list(range(9))), (13, [0, 2, 3, 4, 6, 8, 9, 10, 12])])
def test_a_contact_sheet_has_the_first_and_the_last_frame(frames, shown):
    clip = torch.arange(frames, dtype=torch.uint8).mul(10).view(-1, 1, 1, 1).expand(-1, 96, 96, 3)
    pixels = np.asarray(contact_sheet(clip))
    assert pixels.shape[0] == 96
    assert [int(column) // 10 for column in pixels[0, 48 :: 96 + 6, 0]] == shown


def test_contact_sheets_of_large_clips_are_small():
    assert contact_sheet(torch.zeros(5, 480, 832, 3, dtype=torch.uint8)).height == 148


def test_wandb_offline_keeps_clips_with_their_captions(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    files = save_samples(tmp_path / "samples", clips_of(), ["a cat", "a dog"], [{}, {}], fps=8)
    run = WandbRun("offline", tmp_path, {})
    run.log({"iteration": 0, "loss": 1.0})
    run.log_pictures(0, files, ["a cat\nscore 1.0", "a dog\nscore 0.5"])
    run.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    kept = {path.read_bytes() for path in (folder / "files" / "media").rglob("*.mp4")}
    assert kept == {file.read_bytes() for file in files}
    (record,) = folder.glob("*.wandb")
    waits = time.monotonic() + 60  # wandb's own process writes it, on a busy machine later
    while json.dumps("a dog\nscore 0.5").encode() not in record.read_bytes():
        assert time.monotonic() < waits
        time.sleep(0.1)


@pytest.mark.parametrize("content", [b"", b'{"id": "1', b"{}", b"[]", b"\xff\x00"])
def test_a_damaged_id_of_wandbs_run_is_told(tmp_path, content):
    (tmp_path / "wandb.json").write_bytes(content)
    with pytest.raises(UserError, match=r"wandb\.json is damaged, .*remove it to begin a new one"):
        WandbRun("offline", tmp_path, {})


def test_console_shows_rewards_invalid_scores_and_evaluations(capsys):
    metrics = {
        "reward/hps/hps/mean": 0.25,
        "reward/hps/hps/invalid": 2,
        "train/grad_norm": 0.5,
        "train/clip_fraction": 0.1,
        "time/rollout": 1.0,
        "perf/seconds_per_sample": 0.125,
        "eval/train/hps/hps/mean": 0.3,
        "eval/train/hps/hps/stderr": 0.01,
    }
    Console().iteration(3, 10, metrics)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "iteration  3/10  hps/hps 0.250  2 invalid  clipped 10%  grad 0.5  1.0 s, 0.12 a sample"
    assert second == "evaluation after 3: train hps/hps 0.300 ± 0.010"
    Console(quiet=True).iteration(3, 10, metrics)
    assert capsys.readouterr().out == ""
