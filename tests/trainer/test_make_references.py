"""``make-references``: the same images whoever draws them and however often it was interrupted."""

import errno
import json
import os
import shutil
import signal
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastvideo_grpo import cli
from fastvideo_grpo.commands import make_references
from fastvideo_grpo.commands.make_references import file_name, prompt_lines
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.prompts.files import Prompt, read_prompts
from fastvideo_grpo.prompts.images import check_images, load_image
from fastvideo_grpo.trainers.policy import Drawn
from tests.trainer import runs

ENTRIES = [
    {"prompt": "a red circle", "id": "red", "style": "flat"},
    {"prompt": "a blue square", "negative_prompt": "blur"},
    {"prompt": "a green\ntriangle \u2028 \u4e09\u89d2", "id": "../green/\u4e09"},
    {"prompt": "a cyan circle", "id": 4, "image": "of another run.png"},
    {"prompt": "a yellow square", "id": "yellow.5"},
]
SIZE = {"flux": (64, 96), "hunyuan_video": (48, 64)}
SMALL = ["sample.steps=3", "model.precision=fp32", "prompts.text_length=16", "run.threads=1"]


def _arguments(checkpoint, prompts, out, *more, kind="flux"):
    height, width = SIZE[kind]
    size = [f"sample.height={height}", f"sample.width={width}"]
    return ["make-references", "--model", str(checkpoint), "--prompts", str(prompts), "--out", str(out), *SMALL, *size, *more]


def _contents(folder):
    """File -> bytes of everything in the folder but the settings."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "settings.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _times(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}


def _make(arguments, fault=None):
    """The command in a process of its own; ``fault`` prepares what goes wrong."""
    if fault is not None:
        fault()
    return cli.main(arguments)


def _kill_at_second_image():
    left = iter(range(2))  # settings.json and the first image
    original = make_references._write

    def write(file, content):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        original(file, content)

    make_references._write = write


def _fill_the_disk_of_rank_1():
    from fastvideo_grpo.disk import durable_files

    left = iter(range(1))
    original = durable_files.write_synced

    def write(path, content):
        if os.environ["RANK"] == "1" and next(left, None) is None:
            path.write_bytes(content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, content)

    durable_files.write_synced = write


def _run_out_of_memory():
    from fastvideo_grpo.trainers.base import GRPOTrainer

    original = GRPOTrainer.draw_fixed

    def draw(self, prompt, keys):
        if prompt.id == "red":
            raise RuntimeError("out of memory")
        return original(self, prompt, keys)

    GRPOTrainer.draw_fixed = draw


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(entry) for entry in ENTRIES))
    return file


@pytest.fixture(scope="module")
def whole(tiny_flux, prompts, tmp_path_factory):
    """What one process draws without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert runs.in_processes(partial(_make, _arguments(tiny_flux, prompts, folder)), folder.parent / "whole.txt") == [0]
    said = (folder.parent / "whole.txt").read_text()
    assert "drawing 5 of 5 images with" in said
    assert f"5 images drawn, 0 kept, in {folder / 'images'}" in said
    assert f"prompts.path={folder / 'prompts.jsonl'}" in said
    return folder


def test_the_prompts_come_back_with_their_images(whole, prompts):
    before, after = read_prompts(prompts), read_prompts(whole / "prompts.jsonl", images=True)
    assert [(p.id, p.text, p.negative_prompt) for p in after] == [(p.id, p.text, p.negative_prompt) for p in before]
    assert after[0].metadata == {"style": "flat"} and after[3].metadata == {}
    check_images(after, *SIZE["flux"], World())
    pictures = [load_image(p.image, *SIZE["flux"]).numpy() for p in after]
    assert all(np.abs(a.astype(int) - b).mean() > 1 for a, b in pairwise(pictures))
    names = {path.name for path in (whole / "images").iterdir()}
    assert len(names) == 5 and {"red.png", "4.png", "yellow.5.png", file_name("../green/\u4e09")} <= names
    assert all(Image.open(p.image).size == (96, 64) for p in after)


def test_two_processes_write_the_same_files(whole, tiny_flux, prompts, tmp_path):
    action = partial(_make, _arguments(tiny_flux, prompts, tmp_path / "out"))
    assert runs.in_processes(action, tmp_path / "log.txt", processes=2) == [0, 0]
    assert _contents(tmp_path / "out") == _contents(whole)
    assert (tmp_path / "log.txt").read_text().count("5 images drawn") == 1


def test_killed_and_started_again_gives_the_same_files_and_keeps_what_is_there(whole, tiny_flux, prompts, tmp_path):
    arguments, out, log = _arguments(tiny_flux, prompts, tmp_path / "out"), tmp_path / "out", tmp_path / "log.txt"
    assert runs.in_processes(partial(_make, arguments, _kill_at_second_image), log) == [-9]
    times = _times(out)
    assert list(times) == ["red.png"] and not (out / "prompts.jsonl").exists()
    assert runs.in_processes(partial(_make, arguments), log, processes=2) == [0, 0]
    assert "drawing 4 of 5 images (1 are there)" in log.read_text() and "4 images drawn, 1 kept" in log.read_text()
    assert _contents(out) == _contents(whole)
    assert _times(out).items() >= times.items()


def test_a_full_disk_on_one_rank_ends_all_with_what_is_there_kept(whole, tiny_flux, prompts, tmp_path):
    arguments, out, log = _arguments(tiny_flux, prompts, tmp_path / "out"), tmp_path / "out", tmp_path / "log.txt"
    assert runs.in_processes(partial(_make, arguments, _fill_the_disk_of_rank_1), log, processes=2) == [1, 1]
    said = log.read_text()
    assert said.count("No space left on device") == 2 and "4.png cannot be written" in said and "Traceback" not in said
    kept = _contents(out)
    assert len(kept) == 3 and kept.items() <= _contents(whole).items()  # two rounds, of which the last has one image
    assert runs.in_processes(partial(_make, arguments), log) == [0]
    assert _contents(out) == _contents(whole)


class _Trainer:
    """Draws one colour."""

    checkpoint = "model"

    def __init__(self, value=5, finite=True, decoded=True, vae_precision="fp32"):
        self.config = SimpleNamespace(model=SimpleNamespace(path="model", precision="bf16", vae_precision=vae_precision))
        media = torch.full((1, 1, 2, 3, 3), value, dtype=torch.uint8)
        self.drawn = Drawn(torch.zeros(1, 4, 2, 3), media, torch.tensor([finite]), torch.tensor([decoded]), None)
        self.keys, self.forgot = [], 0

    def draw_fixed(self, prompt, keys):
        self.keys += keys
        return self.drawn

    def forget_conditioning(self):
        self.forgot += 1


def test_a_picture_that_is_not_finite_is_an_error():
    prompt = Prompt("cat", "a cat")
    with pytest.raises(UserError, match=r"'cat' is not written: sampling.*set model\.precision=fp32 \(it is bf16\)"):
        make_references.draw(_Trainer(finite=False, decoded=False), prompt, 0)
    with pytest.raises(UserError, match=r"'cat' is not written: decoding.*set model\.vae_precision=fp32 \(it is fp16\)"):
        make_references.draw(_Trainer(decoded=False, vae_precision="fp16"), prompt, 0)
    with pytest.raises(UserError, match=r"'cat' is not written: decoding.*see that model is whole"):
        make_references.draw(_Trainer(decoded=False), prompt, 0)
    assert make_references.draw(_Trainer(0, vae_precision="fp16"), prompt, 0).shape == (2, 3, 3)  # a black one


def test_noise_depends_on_seed_and_prompt_and_embeddings_do_not_pile_up():
    trainer = _Trainer()
    for prompt, seed in (("a", 0), ("a", 1), ("b", 0), ("a", 0)):
        make_references.draw(trainer, Prompt(prompt, "x"), seed)
    assert len(set(trainer.keys)) == 3 and trainer.keys[0] == trainer.keys[3] and trainer.forgot == 4


def test_whatever_fails_on_one_rank_is_told_by_all(tiny_flux, prompts, tmp_path):
    action = partial(_make, _arguments(tiny_flux, prompts, tmp_path / "out"), _run_out_of_memory)
    assert runs.in_processes(action, tmp_path / "log.txt", processes=2) == [1, 1]
    said = (tmp_path / "log.txt").read_text()
    assert "Traceback" in said and "[rank 1] rank 0 failed: RuntimeError: out of memory" in said


def test_hunyuan_video_draws_images_too(tiny_hunyuan_video, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    arguments = _arguments(tiny_hunyuan_video, tmp_path / "prompts.txt", tmp_path / "out", kind="hunyuan_video")
    assert runs.in_processes(partial(_make, arguments), tmp_path / "log.txt") == [0]
    check_images(read_prompts(tmp_path / "out" / "prompts.jsonl", images=True), *SIZE["hunyuan_video"], World())
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["model.kind"] == "hunyuan_video" and settings["sample.guidance_scale"] == 6.0


# --- refused before a model is loaded -----------------------------------------------------------------------------------


def _refused(capsys, arguments):
    assert cli.main(arguments) == 1
    return capsys.readouterr().err


def test_a_finished_folder_loads_no_model(whole, tiny_flux, prompts, capsys, monkeypatch):
    monkeypatch.setattr("fastvideo_grpo.commands.make_references.draw_missing", None)
    before, times = _contents(whole), _times(whole)
    assert cli.main(_arguments(tiny_flux, prompts, whole)) == 0
    assert "0 images drawn, 5 kept" in capsys.readouterr().out
    assert _contents(whole) == before and _times(whole) == times


def test_other_settings_or_another_model_are_refused_by_name(whole, tiny_flux, tiny_hunyuan_video, prompts, tmp_path, capsys):
    before = _contents(whole)
    said = _refused(capsys, _arguments(tiny_flux, prompts, whole, "sample.steps=4", "sample.shift=2.5", "--seed", "3"))
    assert "sample.shift (3.0 there, 2.5 now), sample.steps (3 there, 4 now), seed (0 there, 3 now). Set them back" in said
    said = _refused(capsys, _arguments(tiny_hunyuan_video, prompts, whole))
    assert "model.kind (flux there, hunyuan_video now)" in said and "checkpoint.vae (another one now)" in said
    other = tmp_path / "other"
    shutil.copytree(tiny_flux, other)
    config = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(json.dumps(config))  # written otherwise: no longer the same bytes
    said = _refused(capsys, _arguments(other, prompts, whole))
    assert "other settings: checkpoint.transformer (another one now). Set" in said
    assert _contents(whole) == before


def test_an_image_of_an_edited_prompt_or_a_damaged_one_is_not_taken(whole, tiny_flux, tmp_path, capsys):
    edited = tmp_path / "prompts.jsonl"
    edited.write_text(json.dumps({**ENTRIES[0], "prompt": "a red square"}))
    said = _refused(capsys, _arguments(tiny_flux, edited, whole))
    assert "red.png was drawn for the text 'a red circle', but the prompt 'red' is now 'a red square'; remove it" in said
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    edited.write_text(json.dumps(ENTRIES[0]))
    (out / "images" / "red.png").write_bytes(b"")
    assert "red.png is damaged" in _refused(capsys, _arguments(tiny_flux, edited, out))
    Image.new("RGB", (96, 64)).save(out / "images" / "red.png")
    assert "nobody knows what text" in _refused(capsys, _arguments(tiny_flux, edited, out))
    (out / "settings.json").write_text("[]")
    assert "no settings file of make-references" in _refused(capsys, _arguments(tiny_flux, edited, out))
    (out / "settings.json").unlink()
    assert "there is no settings.json" in _refused(capsys, _arguments(tiny_flux, edited, out))
    said = _refused(capsys, _arguments(tiny_flux, edited, edited))
    assert f"--out {edited} cannot be used" in said


@pytest.mark.parametrize(
    "more,message",
    [
        (["sample.frames=5"], "sample.frames does nothing in make-references; did you mean"),
        (["engine.kind=deepspeed"], "engine.kind does nothing"),
        (["sample.height=50"], "sample.height is 50; it must be a multiple of 16"),
        (["sample.steps=many"], "sample.steps"),
        (["sample.vae_tiling=true"], "flux decodes images whole"),
        (["steps"], "must be written key=value"),
    ],
)
def test_settings_that_cannot_be_are_told_before_anything_is_written(tiny_flux, prompts, tmp_path, capsys, more, message):
    assert message in _refused(capsys, _arguments(tiny_flux, prompts, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_no_model_for_images_are_told_with_those_that_do(tmp_path, prompts, capsys):
    model, known = tmp_path / "model", "FLUX.1-dev (FluxPipeline), HunyuanVideo (HunyuanVideoPipeline)"
    said = _refused(capsys, _arguments(model, prompts, tmp_path / "out"))
    assert f"{model} does not exist; expected a diffusers folder of {known}" in said
    assert "hf download black-forest-labs/FLUX.1-dev --exclude flux1-dev.safetensors" in said and "tiny flux --out" in said
    said = _refused(capsys, _arguments(tmp_path / "HunyuanVideo", prompts, tmp_path / "out"))
    assert "hf download hunyuanvideo-community/HunyuanVideo --local-dir" in said
    model.mkdir()
    assert f"has no model_index.json; expected a diffusers folder of {known}" in _refused(
        capsys, _arguments(model, prompts, tmp_path / "out")
    )
    (model / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    said = _refused(capsys, _arguments(model, prompts, tmp_path / "out"))
    assert f"holds a WanPipeline; images are drawn by {known}" in said
    (model / "model_index.json").write_text("{")
    assert "model_index.json is damaged" in _refused(capsys, _arguments(model, prompts, tmp_path / "out"))


def test_names_of_files_are_ids_where_those_are_good_names():
    assert file_name("a-B_1.2") == "a-B_1.2.png"
    odd = ["", ".", "..", "a/b", "a b", "_x", "\u4e09", "x" * 101, "-x", "a\0", "\udce9"]
    names = {file_name(name) for name in odd}
    assert len(names) == len(odd) and all(name.startswith("_") and len(name) == 37 for name in names)


def test_a_line_of_the_prompt_file_is_never_cut(tmp_path):
    text = "one\u2028two\x85three\nfour"
    (tmp_path / "prompts.jsonl").write_bytes(prompt_lines([Prompt("1", text, {"note": "\u2029"})]))
    (prompt,) = read_prompts(tmp_path / "prompts.jsonl", images=True)
    assert prompt.text == text and prompt.metadata == {"note": "\u2029"}
