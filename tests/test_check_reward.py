"""`fastvideo-grpo check-reward`: what it prints of a sane reward, and that it notices those that are not."""

import itertools

import pytest
import torch
from PIL import Image

from fastvideo_grpo import cli
from fastvideo_grpo.commands.check_reward import built_in, degradations
from fastvideo_grpo.rewards import registry
from fastvideo_grpo.rewards.base import RewardResult
from fastvideo_grpo.rewards.registry import kinds, register


@pytest.fixture(autouse=True)
def own_kinds(monkeypatch):
    kinds()
    monkeypatch.setattr(registry.REWARDS, "_registered", dict(registry.REWARDS._registered))


class Brightness:
    outputs, media_kind = ("brightness",), "any"

    def score(self, request):
        scores = request.media.float().mean((1, 2, 3, 4))
        return RewardResult({"brightness": scores}, torch.ones(len(scores), dtype=torch.bool))

    def to(self, device):
        return self

    def close(self):
        pass


@pytest.fixture
def check(tmp_path, capsys):
    """`check(kind, argument, ...)` -> (exit code, what it printed)."""

    def run(kind, *arguments):
        (tmp_path / "run.yaml").write_text(
            f"model: {{path: nowhere}}\nprompts: {{path: nowhere.txt}}\nrun: {{dir: nowhere}}\n"
            f"rewards: {{models: {{it: {{kind: {kind}}}}}}}\n"
        )
        code = cli.main(["check-reward", str(tmp_path / "run.yaml"), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def table(text):
    """Variant -> the numbers behind it."""
    return {line[:26].strip(): line[26:].split() for line in text.splitlines() if line.startswith("    ")}


def test_a_reward_that_sees_what_is_wrong_is_shown_to(check):
    code, text = check("colour_match")
    rows = table(text)
    assert code == 0 and float(rows["untouched"][0]) > 0.9
    assert float(rows["with another's prompt"][0]) < 0.6 and rows["with another's prompt"][1] != "0%"
    assert "the same batch again moves scores by 0, one by one by 0, in another order by 0" in text
    assert "samples a second" in text and "of host memory" in text


def test_what_is_no_device_is_told(check, capsys):
    assert check("jpeg_size", "--device", "gpu") == (
        1,
        "fastvideo-grpo check-reward: --device is 'gpu'; it must be a device, for example cpu or cuda:1\n",
    )
    for option, message in (
        ("--devices=cpu,,cpu", "--devices is ''; it must be a device"),
        ("--timeout=nan", "--timeout is nan"),
    ):
        assert cli.main(["serve-reward", "jpeg_size", option]) == 1
        assert message in capsys.readouterr().err


def test_a_reward_of_motion_sees_clips_standing_still(check):
    code, text = check("moving_colour")
    rows = table(text)
    assert code == 0 and rows["standing still"][1] == "100%" and float(rows["standing still"][0]) < 0.1
    assert "frames shuffled" in rows


def test_memory_is_that_of_each_reward_and_only_here(check):
    class Hungry(Brightness):
        def score(self, request):
            bytearray(200 * 2**20)[::4096] = bytes([1]) * (200 * 256)
            return super().score(request)

    register("hungry")(Hungry)
    register("brightness")(Brightness)
    code, text = check("hungry, outputs: {brightness: {weight: 1.0}}}, then: {kind: brightness")
    assert code == 0
    first, second = (float(line.split("; ")[1].split()[0]) for line in text.splitlines() if "of host memory" in line)
    assert 150 < first < 400 and second < 50
    code, text = check("jpeg_size, placement: process")
    assert code == 0 and "its memory is another process's" in text


def test_rewards_that_do_not_repeat_themselves_or_fail_are_found(check):
    calls = itertools.count()

    class Drifting(Brightness):
        def score(self, request):
            result = super().score(request)
            result.scores["brightness"] += 1e-3 * next(calls)
            return result

    class Batchwise(Brightness):
        def score(self, request):
            result = super().score(request)
            result.scores["brightness"] -= result.scores["brightness"].mean()
            return result

    class Broken(Brightness):
        def score(self, request):
            raise RuntimeError("no such weights")

    class Silent(Brightness):
        def score(self, request):
            result = super().score(request)
            result.scores["brightness"][0] = torch.nan
            return result

    for reward in (Drifting, Batchwise, Broken, Silent):
        register(reward.__name__.lower())(reward)
    code, text = check("drifting")
    assert code == 1 and "not repeatable: the same batch moved a score by 0.001" in text
    code, text = check("batchwise")
    assert code == 0 and "again moves scores by 0, one by one by " in text and "one by one by 0," not in text
    code, text = check("broken")
    assert code == 1 and "failed: RuntimeError: no such weights" in text
    code, text = check("silent")
    assert code == 1 and "gave no score for 1 of 8 samples" in text


def test_given_pictures_and_clips_are_scored(check, tmp_path):
    register("brightness")(Brightness)
    Image.new("RGB", (16, 8), (90, 90, 90)).save(tmp_path / "grey.png")
    mp4 = tmp_path / "clip.mp4"
    frames = torch.full((9, 32, 32, 3), 200, dtype=torch.uint8)
    from diffusers.utils import export_to_video

    export_to_video([frame.numpy() / 255 for frame in frames], str(mp4), fps=8)
    code, text = check("brightness", "--media", tmp_path / "grey.png", "--prompt", "grey")
    assert code == 0 and float(table(text)["untouched"][0]) == 90
    code, text = check("brightness", "--media", mp4, "--prompt", "light")
    assert code == 0 and abs(float(table(text)["untouched"][0]) - 200) < 4 and "standing still" in text
    code, text = check("brightness", "--media", tmp_path / "grey.png")
    assert code == 1 and "1 --media and 0 --prompt" in text
    (tmp_path / "notes.txt").write_text("no picture")
    code, text = check("brightness", "--media", tmp_path / "notes.txt", "--prompt", "x")
    assert code == 1 and "notes.txt" in text and "cannot be read as a video" in text


def test_degradations_keep_form_and_change_content():
    for kind in ("image", "video"):
        (batch,) = built_in(kind)
        for name, changed in degradations(batch).items():
            assert changed.media.shape == batch.media.shape and changed.media.dtype == torch.uint8, name
            assert not torch.equal(changed.media, batch.media) or changed.prompts != batch.prompts, name
