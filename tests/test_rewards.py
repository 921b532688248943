"""Rewards: what they answer, how they are found, and that none can invent a number or end the run."""

import importlib.metadata
import logging
import math
import re
import textwrap
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastvideo_grpo import extensions
from fastvideo_grpo.rewards import registry
from fastvideo_grpo.rewards.base import Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.output_transform import OutputTransform
from fastvideo_grpo.rewards.registry import create, kinds, register
from fastvideo_grpo.rewards.reward_set import RewardSet
from fastvideo_grpo.rewards.rules.colour_match import PALETTE, colour_of
from fastvideo_grpo.rewards.rules.moving_colour import DIRECTIONS, direction_of
from fastvideo_grpo.tiny import moving_shapes


def request_of(batch=3, frames=1, prompt="a red circle", fill=128):
    return RewardRequest([prompt] * batch, torch.full((batch, frames, 16, 16, 3), fill, dtype=torch.uint8))


class Scripted:
    """A reward that answers, or raises, what the test says."""

    outputs = ("quality", "motion")
    media_kind = "any"

    def __init__(self, *, answer):
        self.answer = answer

    def score(self, request):
        answer = self.answer() if callable(self.answer) else self.answer
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def to(self, device):
        return self

    def close(self):
        pass


@pytest.fixture(autouse=True)
def scripted_kinds(monkeypatch):
    kinds()  # own kinds register when first asked for: before the copy, not into it
    monkeypatch.setattr(registry.REWARDS, "_registered", dict(registry.REWARDS._registered))
    register("scripted")(Scripted)


def scripted_set(answer, **entry):
    return RewardSet({"script": {"kind": "scripted", "params": {"answer": answer}, **entry}}, backoff_s=0.0)


def good_answer(quality=(1.0, 2.0, 3.0), motion=(4.0, 5.0, 6.0), valid=(True, True, True)):
    return RewardResult({"quality": torch.tensor(quality), "motion": torch.tensor(motion)}, torch.tensor(valid))


# --- requests


@pytest.mark.parametrize(
    "media",
    [
        torch.zeros(1, 1, 8, 8, 3),
        torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_request_refuses_other_media(media):
    with pytest.raises(ValueError, match=r"uint8 \[batch, frames, height, width, 3\]"):
        RewardRequest(["a"], media)


def test_request_refuses_other_lengths():
    media = torch.zeros(2, 1, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="1 prompts for 2 samples"):
        RewardRequest(["a"], media)
    with pytest.raises(ValueError, match="1 metadata entries for 2 samples"):
        RewardRequest(["a", "b"], media, metadata=[{}])
    assert RewardRequest(["a", "b"], media).metadata == [{}, {}]


# --- the set


def test_scores_and_weights_are_named_model_and_output():
    rewards = scripted_set(good_answer(), outputs={"quality": {"weight": 0.7}, "motion": {}})
    assert rewards.names == ["script/quality", "script/motion"]
    assert rewards.weights == {"script/quality": 0.7, "script/motion": 1.0}
    batch = rewards.score(request_of())
    assert batch.scores["script/quality"].tolist() == [1, 2, 3]
    assert batch.scores["script/motion"].tolist() == [4, 5, 6]
    assert batch.valid["script/motion"].all() and not batch.failures


def test_outputs_left_out_are_all_outputs():
    assert scripted_set(good_answer()).weights == {"script/quality": 1.0, "script/motion": 1.0}
    assert scripted_set(good_answer(), outputs={"motion": {}}).names == ["script/motion"]


def test_entries_may_be_objects():
    entry = SimpleNamespace(
        kind="jpeg_size",
        checkpoint=None,
        params={"quality": 50},
        outputs={"jpeg_size": SimpleNamespace(weight=2.0, threshold=None)},
    )
    rewards = RewardSet({"size": entry})
    assert rewards.weights == {"size/jpeg_size": 2.0}
    assert rewards.rewards["size"].reward.quality == 50


def test_threshold_changes_scores_and_keeps_raw():
    batch = scripted_set(good_answer(), outputs={"quality": {"threshold": 2.0}}).score(request_of())
    assert batch.raw["script/quality"].tolist() == [1, 2, 3]
    assert batch.scores["script/quality"].tolist() == [0, 0, 1]


def test_samples_marked_invalid_are_masked_in_every_output():
    batch = scripted_set(good_answer(valid=(True, False, True))).score(request_of())
    for name in ("script/quality", "script/motion"):
        assert batch.valid[name].tolist() == [True, False, True]
        assert math.isnan(batch.scores[name][1]) and math.isnan(batch.raw[name][1])
    assert len(batch.failures) == 1 and "script" in batch.failures[0] and "1 of 3" in batch.failures[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_mask_only_their_sample_and_output(bad):
    answer = good_answer(quality=(1.0, bad, 3.0))
    batch = scripted_set(answer, outputs={"quality": {"threshold": 0.0}, "motion": {}}).score(request_of())
    assert batch.valid["script/quality"].tolist() == [True, False, True]
    assert math.isnan(batch.scores["script/quality"][1])
    assert batch.valid["script/motion"].all()
    assert "script/quality" in batch.failures[0] and "NaN or infinity" in batch.failures[0]


def test_a_reward_that_raises_is_masked_named_and_counted(caplog):
    rewards = scripted_set(RuntimeError("no such weights"))
    with caplog.at_level(logging.WARNING):
        first, second = rewards.score(request_of()), rewards.score(request_of())
    for batch in (first, second):
        assert not batch.valid["script/quality"].any() and batch.scores["script/quality"].isnan().all()
        assert "reward script: RuntimeError: no such weights (3 of 3 samples masked)" in batch.failures
    assert rewards.failure_counts == {"reward script: RuntimeError: no such weights": 2}
    logged = [record.getMessage() for record in caplog.records]
    assert sum("masked" in line for line in logged) == 1, "the same message is logged once"
    assert sum("asked again, 2 times" in line for line in logged) == 1
    assert rewards.retried == {"script": 2}, "the second request is made once: the reward has failed throughout"


def test_a_failing_reward_leaves_the_others_alone():
    rewards = RewardSet(
        {
            "broken": {"kind": "scripted", "params": {"answer": ValueError("x")}},
            "size": {"kind": "jpeg_size"},
        },
        backoff_s=0.0,
    )
    batch = rewards.score(request_of())
    assert batch.valid["size/jpeg_size"].all()
    assert not batch.valid["broken/quality"].any()


@pytest.mark.parametrize(
    "answer, text",
    [
        (None, "NoneType"),
        (RewardResult({"motion": torch.zeros(3)}, torch.ones(3, dtype=torch.bool)), "lacks the output"),
        (RewardResult({"quality": torch.zeros(3, 1), "motion": torch.zeros(3)}, torch.ones(3, dtype=torch.bool)), "[3, 1]"),
        (RewardResult({"quality": torch.zeros(1), "motion": torch.zeros(3)}, torch.ones(3, dtype=torch.bool)), "[1]"),
        (RewardResult({"quality": [0.0] * 3, "motion": torch.zeros(3)}, torch.ones(3, dtype=torch.bool)), "list"),
        (RewardResult({"quality": torch.zeros(3), "motion": torch.zeros(3)}, torch.ones(3)), "valid is"),
        (RewardResult({"quality": torch.zeros(3), "motion": torch.zeros(3)}, torch.ones(2, dtype=torch.bool)), "valid is"),
    ],
)
def test_answers_of_the_wrong_form_are_masked(answer, text):
    batch = scripted_set(answer).score(request_of())
    assert not batch.valid["script/quality"].any()
    assert batch.scores["script/quality"].isnan().all()
    assert text in batch.failures[0]


def test_validity_is_per_output():
    answer = RewardResult({"motion": torch.zeros(3)}, torch.ones(3, dtype=torch.bool))
    batch = scripted_set(answer).score(request_of())
    assert batch.valid["script/motion"].all() and not batch.valid["script/quality"].any()


def test_scores_carry_no_gradient_and_are_float32():
    answer = RewardResult(
        {"quality": torch.ones(3, dtype=torch.float16), "motion": torch.ones(3, requires_grad=True)},
        torch.ones(3, dtype=torch.bool),
    )
    batch = scripted_set(answer).score(request_of())
    assert all(not s.requires_grad and s.dtype == torch.float32 for s in batch.scores.values())


@pytest.mark.parametrize(
    "models, text",
    [
        ({}, "rewards.models is empty"),
        ({"a/b": {"kind": "jpeg_size"}}, "may not hold '/'"),
        ({"a": {}}, "rewards.models.a.kind"),
        ({"a": {"kind": "jpg_size"}}, "did you mean 'jpeg_size'"),
        ({"a": {"kind": "jpeg_size", "params": {"qualty": 3}}}, "rewards.models.a: .*'qualty'.*'quality'.*sign"),
        ({"a": {"kind": "jpeg_size", "outputs": {"size": {}}}}, r"rewards.models.a.outputs.size: .*jpeg_size"),
        ({"a": {"kind": "jpeg_size", "outputs": {"jpeg_size": {"weight": math.nan}}}}, "weight is nan"),
        ({"a": {"kind": "jpeg_size", "outputs": {"jpeg_size": {"threshold": "high"}}}}, "threshold is 'high'"),
        ({"a": {"kind": "jpeg_size", "checkpoint": "x.pt"}}, "takes no checkpoint"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_key(models, text):
    with pytest.raises(ValueError, match=text):
        RewardSet(models)


def test_every_entry_is_checked_before_any_reward_is_made():
    made = []
    register("costly")(type("Costly", (Scripted,), {"__init__": lambda self: made.append(self)}))
    with pytest.raises(ValueError, match=r"rewards.models.second"):
        RewardSet({"first": {"kind": "costly"}, "second": {"kind": "scripted"}})
    assert not made


def test_media_a_reward_cannot_look_at_are_refused():
    rewards = scripted_set(good_answer())
    rewards.check_frames(1)
    rewards.check_frames(5)
    rewards.rewards["script"].media_kind = "image"
    with pytest.raises(ValueError, match=r"the model makes 5 frame"):
        rewards.check_frames(5)
    rewards.rewards["script"].media_kind = "video"
    with pytest.raises(ValueError, match=r"the model makes 1 frame"):
        rewards.check_frames(1)


# --- the registry


def test_own_kinds_are_known():
    assert {"jpeg_size", "colour_match", "frame_difference", "moving_colour"} <= set(kinds())
    assert create("jpeg_size", params={"sign": 1}).sign == 1
    for kind in ("jpeg_size", "colour_match", "frame_difference", "moving_colour"):
        reward = create(kind).to("cpu")
        assert isinstance(reward, Reward)
        reward.close()


def test_unknown_kind_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"'color_match'.*did you mean 'colour_match'.*colour_match, .*jpeg_size"):
        create("color_match")


def test_missing_parameter_and_checkpoint_are_named():
    with pytest.raises(ValueError, match="needs the parameter 'answer'"):
        create("scripted")

    @register("heavy")
    def heavy(checkpoint):
        return Scripted(answer=checkpoint)

    with pytest.raises(ValueError, match="needs a checkpoint"):
        create("heavy")
    with pytest.raises(ValueError, match="no parameter 'checkpoint'"):
        create("heavy", params={"checkpoint": "here"})
    assert create("heavy", checkpoint="there").answer == "there"


def test_a_kind_registered_twice_is_refused():
    with pytest.raises(ValueError, match="registered twice"):
        register("jpeg_size")(Scripted)
    register("scripted")(Scripted)  # the same class again, as after a reload, is no conflict


@pytest.fixture
def entry_points(monkeypatch):
    points = []
    monkeypatch.setattr(extensions, "entry_points", lambda group: [point for point in points if point.group == group])

    def add(name, value):
        points.append(importlib.metadata.EntryPoint(name, value, registry.REWARDS.group))

    return add


def test_rewards_of_other_packages_are_found(entry_points):
    entry_points("elsewhere", "fastvideo_grpo.rewards.rules.jpeg_size:JpegSize")
    assert "elsewhere" in kinds()
    assert create("elsewhere", params={"quality": 10}).quality == 10


def test_an_entry_point_that_cannot_be_imported_is_named(entry_points):
    entry_points("elsewhere", "no_such_package:Reward")
    with pytest.raises(ValueError, match=r"no_such_package:Reward.*ModuleNotFoundError"):
        create("elsewhere")


def test_an_entry_point_cannot_replace_an_own_kind(entry_points):
    entry_points("jpeg_size", "fastvideo_grpo.rewards.rules.colour_match:ColourMatch")
    with pytest.raises(ValueError, match="offered more than once"):
        create("jpeg_size")


# --- jpeg_size


def test_jpeg_size_prefers_small_files_unless_told_otherwise():
    noise = torch.randint(0, 256, (1, 1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    request = RewardRequest(["plain", "noise"], torch.cat([torch.full_like(noise, 128), noise]))
    small = create("jpeg_size").score(request)
    large = create("jpeg_size", params={"sign": 1}).score(request)
    plain, noisy = small.scores["jpeg_size"].tolist()
    assert noisy < plain < 0, "sizes are in kilobytes, negative by default"
    assert -20 < noisy < -2
    assert torch.equal(large.scores["jpeg_size"], -small.scores["jpeg_size"])
    assert small.valid.all()


def test_jpeg_size_grows_with_quality_and_averages_frames():
    noise = torch.randint(0, 256, (1, 1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    plain = torch.full_like(noise, 90)

    def size(media, quality):
        reward = create("jpeg_size", params={"quality": quality, "sign": 1})
        return reward.score(RewardRequest(["a"], media)).scores["jpeg_size"].item()

    assert size(noise, 10) < size(noise, 95)
    both = torch.cat([noise, plain], dim=1)
    assert size(both, 95) == pytest.approx((size(noise, 95) + size(plain, 95)) / 2)
    first = create("jpeg_size", params={"frames": "first", "quality": 95, "sign": 1}).score(RewardRequest(["a"], both))
    assert first.scores["jpeg_size"].item() == pytest.approx(size(noise, 95))


@pytest.mark.parametrize(
    "params", [{"quality": 0}, {"quality": 101}, {"quality": 9.5}, {"sign": 0}, {"sign": "up"}, {"frames": "last"}]
)
def test_jpeg_size_refuses_other_parameters(params):
    with pytest.raises(ValueError, match="it must be"):
        create("jpeg_size", params=params)


# --- colour_match


def painted(colour, rows=8):
    """A grey 16x16 picture whose first `rows` rows have the colour."""
    picture = np.full((16, 16, 3), 120, np.uint8)
    picture[:rows] = PALETTE[colour]
    return torch.from_numpy(picture)[None, None]


def colour_score(media, prompt, **params):
    return create("colour_match", params=params).score(RewardRequest([prompt], media)).scores["colour_match"].item()


@pytest.mark.parametrize("colour", PALETTE)
def test_colour_match_tells_the_palette_apart(colour):
    for other in PALETTE:
        assert colour_score(painted(other), f"a {colour} circle") == float(other == colour)


def test_colour_match_is_the_fraction_of_saturated_pixels():
    media = painted("red", rows=8)
    media[0, 0, :2] = torch.tensor(PALETTE["blue"], dtype=torch.uint8)
    assert colour_score(media, "a red circle") == pytest.approx(0.75)
    assert colour_score(torch.cat([painted("red"), painted("blue")], dim=1), "a red circle") == pytest.approx(0.5)


def test_colour_match_is_zero_without_enough_colour():
    media = painted("red", rows=0)
    assert colour_score(media, "a red circle") == 0.0
    media[0, 0, 0, :4] = torch.tensor(PALETTE["red"], dtype=torch.uint8)
    assert colour_score(media, "a red circle") == 0.0
    assert colour_score(media, "a red circle", min_saturated=0.01) == 1.0


def test_a_prompt_without_one_known_colour_is_invalid_not_zero():
    media = painted("red").expand(4, -1, -1, -1, -1)
    prompts = ["a circle", "a Red circle", "a reddish circle", "a red circle and a blue square"]
    result = create("colour_match").score(RewardRequest(prompts, media))
    assert result.valid.tolist() == [False, True, False, False]
    assert result.scores["colour_match"][1] == 1.0
    batch = RewardSet({"colour": {"kind": "colour_match"}}).score(RewardRequest(prompts, media))
    assert batch.valid["colour/colour_match"].tolist() == [False, True, False, False]
    assert "the prompt must name exactly one of red, green" in batch.failures[0] and "3 of 4" in batch.failures[0]
    assert colour_of("CYAN!") == list(PALETTE).index("cyan")


# --- frame_difference


def test_frame_difference_is_the_mean_change_and_flicker_wins():
    still = torch.full((1, 5, 8, 8, 3), 90, dtype=torch.uint8)
    brighter = still + 51 * torch.arange(3, dtype=torch.uint8).repeat_interleave(2)[:5].view(1, 5, 1, 1, 1)
    flicker = still.clone()
    flicker[:, ::2], flicker[:, 1::2] = 0, 255
    request = RewardRequest(["a"] * 3, torch.cat([still, brighter, flicker]))
    result = create("frame_difference").score(request)
    # `brighter` rises by 51 (a fifth of 255) in 2 of 4 steps.
    assert result.scores["frame_difference"].tolist() == pytest.approx([0, 0.1, 1])
    assert result.valid.all()


@pytest.mark.parametrize("kind", ["frame_difference", "moving_colour"])
def test_rewards_for_motion_refuse_images(kind):
    rewards = RewardSet({"motion": {"kind": kind}})
    rewards.check_frames(5)
    with pytest.raises(ValueError, match="scores videos, but the model makes 1 frame"):
        rewards.check_frames(1)
    with pytest.raises(ValueError, match="have one"):
        create(kind).score(request_of(prompt="a red circle moving left"))


# --- moving_colour


def disc_at(column, row, colour="red", radius=5.0, opacity=1.0):
    """float [32, 32, 3]: a disc on grey."""
    rows, columns = np.mgrid[0:32, 0:32]
    inside = ((columns - column) ** 2 + (rows - row) ** 2 < radius**2)[..., None]
    return np.where(inside, opacity * np.array(PALETTE[colour]) + (1 - opacity) * 120, 120.0)


def moving_score(frames, prompt="a red circle moving right", **params):
    clip = torch.from_numpy(np.stack(frames).clip(0, 255).astype(np.uint8))
    result = create("moving_colour", params=params).score(RewardRequest([prompt], clip[None]))
    assert result.valid.all()
    return result.scores["moving_colour"].item()


def travelling(frames, pixels=10.0, **how):
    """A disc that moves right by `pixels` in all."""
    return [disc_at(16 + pixels * (part - 0.5), 15, **how) for part in np.linspace(0, 1, frames)]


CLIP_LENGTHS = pytest.mark.parametrize("frames", [5, 9, 13])


@CLIP_LENGTHS
@pytest.mark.parametrize("colour", PALETTE)
def test_moving_colour_tells_directions_apart(frames, colour):
    rng = np.random.default_rng(0)
    for named, (across, down) in DIRECTIONS.items():
        radius, pixels, off = rng.uniform(4, 7), rng.uniform(8, 16), rng.uniform(-3, 3, 2)
        centres = [16 + off + pixels * (part - 0.5) * np.array([across, down]) for part in np.linspace(0, 1, frames)]
        clip = [disc_at(*centre, colour, radius) + rng.normal(0, 4, (32, 32, 3)) for centre in centres]
        for word in DIRECTIONS:
            score = moving_score(clip, f"a {colour} circle moving {word}")
            assert score > 0.95 if word == named else score < 0.01, (named, word)


def test_moving_colour_judges_the_clips_that_the_tiny_video_model_learns():
    clips, captions = moving_shapes.dataset(64, seed=3)
    media, reward = torch.from_numpy(clips), create("moving_colour")
    for turn in range(4):
        prompts = [moving_shapes.PROMPTS[caption // 4 * 4 + (caption + turn) % 4] for caption in captions]
        scores = reward.score(RewardRequest(prompts, media)).scores["moving_colour"]
        assert (scores > 0.8).all() if turn == 0 else (scores < 0.1).all()


def test_up_is_towards_the_first_row():
    clip = [disc_at(16, row) for row in (22, 19, 16, 13, 10)]
    assert moving_score(clip, "a red circle moving up") == 1.0
    assert moving_score(clip, "a red circle moving down") == 0.0


@CLIP_LENGTHS
def test_moving_colour_wants_the_colour_it_was_asked_for(frames):
    for colour in PALETTE:
        score = moving_score(travelling(frames, colour=colour), "a red circle moving right")
        assert score == (1.0 if colour == "red" else 0.0)


@CLIP_LENGTHS
def test_moving_colour_gives_part_of_the_score_for_part_of_the_way(frames):
    scores = [moving_score(travelling(frames, pixels)) for pixels in (0, 2, 4, 6, 8)]
    assert scores[0] == 0 and scores[-1] == 1.0
    assert all(0.15 < later - earlier < 0.4 for earlier, later in pairwise(scores[:-1]))
    assert moving_score(travelling(frames, 4), travel=0.1) == 1.0, "travel is the fraction of the frame that is asked for"


@CLIP_LENGTHS
def test_moving_colour_gives_nothing_for_change_that_is_no_motion(frames):
    rng = np.random.default_rng(1)
    whole, parts = np.broadcast_to(np.array(PALETTE["red"]), (32, 32, 3)), np.linspace(0, 1, frames)
    columns = np.arange(32)[None, :, None]
    clips = {
        "static": [disc_at(16, 16) + rng.normal(0, 4, (32, 32, 3)) for _ in parts],
        "noise": list(rng.integers(0, 256, (frames, 32, 32, 3)).astype(float)),
        "coloured noise": [np.where(rng.random((32, 32, 1)) < 0.2, whole, 120.0) for _ in parts],
        "empty": [np.full((32, 32, 3), 120.0)] * frames,
        "flood": [whole] * frames,
        "flood fading in": [part * whole + (1 - part) * 120 for part in parts],
        "flood from one side": [np.where(columns < 2 + 30 * part, whole, 120.0) for part in parts],
        "to and fro": [disc_at(8 if i % 2 == 0 else 24, 16) for i in range(frames)],
        "to and fro, ending away": [disc_at(8 if i % 2 == 0 else 24, 16) for i in range(frames - 1)],
        "there and back": [disc_at(20 - 12 * abs(2 * part - 1), 16) for part in parts],
        "flicker while moving": [disc_at(10 + 12 * part, 16, opacity=i % 2) for i, part in enumerate(parts)],
        "gone in one frame": [disc_at(10 + 12 * part, 16, opacity=i != 2) for i, part in enumerate(parts)],
        "leaving the frame": [disc_at(20 + 20 * part, 16) for part in parts],
    }
    for name, clip in clips.items():
        assert moving_score(clip) < 0.05, name


@CLIP_LENGTHS
def test_moving_colour_gives_little_for_jumps_slants_and_fades(frames):
    parts = np.linspace(0, 1, frames)
    one_jump = [disc_at(8 if part < 0.5 else 24, 16) for part in parts]
    assert moving_score(one_jump) == pytest.approx(1.5 / (frames - 1))
    assert moving_score(one_jump, largest_step=1) == pytest.approx(1 / (frames - 1))
    diagonal = [disc_at(11 + 10 * part, 11 + 10 * part) for part in parts]
    assert 0.3 < moving_score(diagonal) < 0.7
    assert moving_score([disc_at(11 + 10 * part, 14 + 2 * part) for part in parts]) == 1.0, "a little slant is free"
    fade = [(1 - part) * disc_at(8, 16) + part * disc_at(24, 16) for part in parts]
    assert moving_score(fade) < 0.3


def test_moving_colour_wants_a_thing_of_some_size():
    assert moving_score(travelling(9, radius=2)) < 0.6
    assert moving_score(travelling(9, radius=2), min_area=0.005) > 0.95
    assert moving_score(travelling(9, radius=7), max_area=0.1) < 0.6
    assert moving_score(travelling(9, radius=7)) == 1.0


def test_moving_colour_is_continuous_in_the_pixels():
    # From the clip to its mirror image, and out of sight, in small steps.
    clip = np.stack(travelling(9))
    for end in (clip[:, :, ::-1], np.full_like(clip, 120)):
        steps = np.linspace(0, 1, 101)
        scores = [moving_score((1 - part) * clip + part * end) for part in steps]
        assert scores[0] == 1.0 and scores[-1] == 0.0
        assert np.abs(np.diff(scores)).max() < 0.15


def test_a_prompt_without_one_colour_and_one_direction_is_invalid_not_zero():
    prompts = [
        "a red circle moving right",
        "a red circle",
        "a circle moving right",
        "a red circle moving left and right",
        "a red and a blue circle moving right",
        "a RED circle, moving Right!",
        "a red circle on the right-hand side moving upwards",
    ]
    clip = torch.from_numpy(np.stack(travelling(9)).astype(np.uint8))[None].expand(len(prompts), -1, -1, -1, -1)
    batch = RewardSet({"motion": {"kind": "moving_colour"}}).score(RewardRequest(prompts, clip, fps=8))
    assert batch.valid["motion/moving_colour"].tolist() == [True, False, False, False, False, True, True]
    assert batch.raw["motion/moving_colour"][[0, 5, 6]].tolist() == [1, 1, 1]
    assert "exactly one of left, right, up, down (4 of 7 samples masked)" in batch.failures[0]
    assert direction_of("moving UP") == "up" and direction_of("upwards") is None


@pytest.mark.parametrize(
    "params",
    [
        {"travel": 0},
        {"travel": 1.5},
        {"travel": "far"},
        {"min_area": 0},
        {"min_area": 0.4},
        {"max_area": 1.2},
        {"largest_step": 0.5},
        {"largest_step": math.inf},
    ],
)
def test_moving_colour_refuses_other_parameters(params):
    with pytest.raises(ValueError, match=f"moving_colour: .*{next(iter(params))} (is )?.*; "):
        create("moving_colour", params=params)


# --- what becomes of a score


SCORES = torch.tensor([0.4, 0.5, 0.6, math.nan])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.4, 0.5, 0.6]),
        ({"threshold": 0.5}, [0, 0, 1]),  # strictly above
        ({"invert": True}, [-0.4, -0.5, -0.6]),
        ({"affine": (10.0, -1.0)}, [3, 4, 5]),
        ({"clamp": (0.45, 0.55)}, [0.45, 0.5, 0.55]),
        ({"affine": (10.0, -1.0), "clamp": (3.5, 4.5)}, [3.5, 4, 4.5]),  # the limits are those of what affine made
        ({"affine": (10.0, -1.0), "threshold": 3.5, "invert": True}, [0, -1, -1]),
    ],
)
def test_scores_are_transformed_in_the_stated_order(settings, expected):
    scores = OutputTransform(**settings)(SCORES)
    assert scores.dtype == torch.float32 and scores[3].isnan()
    torch.testing.assert_close(scores[:3], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"affine": [1.0]}, r"outputs.quality.affine is \[1.0\]; it must be two finite numbers"),
        ({"affine": [0.0, 1.0]}, "makes all scores equal"),
        ({"clamp": [1.0, math.inf]}, "clamp is .*finite"),
        ({"clamp": [1.0, 0.0]}, "low below high"),
    ],
)
def test_transforms_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        scripted_set(good_answer(), outputs={"quality": settings})


def test_the_raw_score_is_kept_beside_what_counts():
    batch = scripted_set(good_answer(), outputs={"quality": {"affine": [2.0, 0.0], "invert": True}}).score(request_of())
    assert batch.raw["script/quality"].tolist() == [1, 2, 3] and batch.scores["script/quality"].tolist() == [-2, -4, -6]


# --- asked again


def test_a_request_that_failed_is_made_again_and_keeps_what_it_had():
    answers = iter(
        [
            RuntimeError("lost"),
            good_answer(quality=(1.0, math.nan, 3.0)),
            good_answer(quality=(7.0, 2.0, math.nan)),
        ]
    )
    rewards = scripted_set(lambda: next(answers))
    batch = rewards.score(request_of())
    assert batch.scores["script/quality"].tolist() == [1, 2, 3]
    assert batch.valid["script/quality"].all() and not batch.failures
    assert rewards.retried == {"script": 2} and not rewards.failure_counts


def test_what_is_lost_in_the_end_is_counted_not_what_the_last_attempt_lost():
    answers = iter([good_answer(quality=(1.0, math.nan, 3.0)), RuntimeError("lost"), RuntimeError("lost")])
    batch = scripted_set(lambda: next(answers)).score(request_of())
    assert batch.valid["script/quality"].tolist() == [True, False, True]
    assert batch.failures == ["reward script: RuntimeError: lost (1 of 3 samples masked)"]


def test_a_score_that_affine_makes_infinite_is_masked_and_told():
    batch = scripted_set(good_answer(), outputs={"quality": {"affine": [2e38, 0.0]}}).score(request_of())
    assert batch.valid["script/quality"].tolist() == [True, False, False]
    assert batch.failures == ["reward script/quality: affine made it infinite (2 of 3 samples masked)"]


def test_a_sample_that_cannot_be_judged_is_not_asked_for_again():
    rewards = scripted_set(good_answer(valid=(True, False, True)))
    assert rewards.score(request_of()).valid["script/quality"].tolist() == [True, False, True]
    assert not rewards.retried


def test_a_reward_that_failed_through_all_attempts_gets_one_at_a_time_until_it_answers():
    answers = [RuntimeError("lost")] * 5 + [good_answer()] + [RuntimeError("lost")] * 3
    rewards = scripted_set(lambda: answers.pop(0))
    for left in (6, 5, 4, 3):  # three attempts, then one each; the last one answers
        rewards.score(request_of())
        assert len(answers) == left
    assert not rewards.score(request_of()).valid["script/quality"].any() and not answers  # three again


def test_a_reward_is_left_alone_once_the_run_will_stop_anyway():
    asked = []

    def lost():
        asked.append(1)
        return RuntimeError("lost")

    rewards = scripted_set(lost)
    rewards.begin(failures=3)
    batches = [rewards.score(request_of()) for _ in range(4)]
    assert len(asked) == 3 + 1, "three attempts, then one: 3 failed samples are allowed, 6 are not"
    assert "not asked" in batches[2].failures[0] and not any(batch.valid["script/quality"].any() for batch in batches)
    rewards.begin(failures=3)
    rewards.score(request_of())
    assert len(asked) == 5


def test_failures_take_no_more_than_their_time(monkeypatch):
    """Other processes wait, and give up at some point: then there is no message and no checkpoint."""
    from fastvideo_grpo.rewards import reward_set

    now, asked = [0.0], []

    def slow_to_fail(good=False):
        asked.append(1)
        now[0] += 10
        return good_answer() if good else RuntimeError("lost")

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr(reward_set, "time", clock)
    rewards = scripted_set(slow_to_fail)
    rewards.begin(seconds=25)
    batches = [rewards.score(request_of()) for _ in range(3)]
    assert len(asked) == 3, "the third attempt begins within the time, and nothing after it"
    assert "its failures took too long already" in batches[2].failures[0]
    rewards.begin(seconds=15)
    assert not rewards.score(request_of()).valid["script/quality"].any()
    assert len(asked) == 4, "one that failed throughout gets one attempt"
    answers = iter([False, True])
    rewards = scripted_set(lambda: slow_to_fail(next(answers, True)))
    rewards.begin(seconds=15)
    assert all(rewards.score(request_of()).valid["script/quality"].all() for _ in range(9)), "what answers may take its time"


def test_a_set_whose_rewards_are_elsewhere_knows_them_by_name():
    rewards = RewardSet(
        {"script": {"kind": "scripted", "params": {"answer": None}, "outputs": {"motion": {"weight": 0.5, "threshold": 1.0}}}},
        elsewhere={"script": ("quality", "motion")},
    )
    assert rewards.weights == {"script/motion": 0.5} and rewards.transforms["script/motion"].threshold == 1.0
    assert rewards.rewards == {}
    with pytest.raises(RuntimeError, match="with another process"):
        rewards.score(request_of())


def test_a_request_that_hangs_costs_its_time_limit():
    release = threading.Event()

    def late():
        release.wait(30)
        return good_answer()

    rewards = RewardSet({"script": {"kind": "scripted", "params": {"answer": late}}}, timeout_s=0.2, retries=0, backoff_s=0.0)
    for _ in range(2):  # the second waits for the first, which nobody can end
        assert "TimeoutError: no answer within 0.2 s" in rewards.score(request_of()).failures[0]
    release.set()
    time.sleep(0.3)
    assert rewards.score(request_of()).valid["script/quality"].all()


def test_requests_are_scored_in_order_and_side_by_side():
    begun = threading.Barrier(2, timeout=10)  # each waits for the other: they would not meet one after the other
    order = []

    def answer(name):
        def scored():
            begun.wait()
            order.append(name)
            return good_answer()

        return scored

    models = {name: {"kind": "scripted", "params": {"answer": answer(name)}} for name in ("one", "two")}
    rewards = RewardSet(models)
    pending = [rewards.submit(request_of()) for _ in range(3)]
    for scores in reversed(pending):
        assert scores.result().valid["two/motion"].all()
    assert sorted(order) == ["one"] * 3 + ["two"] * 3


# --- the page


def test_the_examples_of_the_page_are_configurations(tmp_path):
    """docs/rewards.md: every YAML block, with the files it names in their places."""
    from fastvideo_grpo.config import files as config_files
    from fastvideo_grpo.config import values as config_values
    from fastvideo_grpo.config.keys import RewardsConfig
    from fastvideo_grpo.rewards.reward_set import check_entry

    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    blocks = re.findall(r"(?m)^(    rewards:\n(?:      .*\n)+)", page)
    assert len(blocks) == 3
    for block in blocks:
        filled = config_values.filled(RewardsConfig, config_files.parse(textwrap.dedent(block)).value["rewards"])
        assert not filled.problems and not filled.missing
        for name, entry in filled.config.models.items():
            check_entry(name, entry)
    named = set(re.findall(r"(?m)^\| `(\w+)` \|", page))
    own = {kind for kind, made in registry.REWARDS._registered.items() if made.__module__.startswith("fastvideo_grpo.")}
    assert named == own, "every reward is on the page, and no other"
