"""Clips: which frames are looked at, both decoders, and what an mp4 gives back."""

import importlib.util

import pytest
import torch

from fastvideo_grpo.rewards.media import clips
from fastvideo_grpo.rewards.media.clips import frame_indices, mp4_round_trip, read_clip
from fastvideo_grpo.tracking.pictures import encode_mp4

needs_decord = pytest.mark.skipif(not importlib.util.find_spec("decord"), reason="decord is not installed")


def moving_square(frames=17, height=96, width=160):
    """uint8 [frames, height, width, 3]: a bright square that moves to the right on a dark gradient."""
    clip = torch.zeros(frames, height, width, 3, dtype=torch.uint8)
    clip[..., 2] = torch.linspace(0, 120, width).to(torch.uint8)
    for index in range(frames):
        clip[index, 32:64, 4 * index : 4 * index + 32] = torch.tensor([230, 200, 40], dtype=torch.uint8)
    return clip


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    path.write_bytes(encode_mp4(moving_square(height=256, width=256), 8))
    return path


# --- frames


@pytest.mark.parametrize(
    ("count", "source_fps", "fps", "frames"),
    [
        (53, 8, 2, 14),  # 13.25
        (53, 8, 8, 52),  # 53, but an even number of the clip's frames
        (53, 8, 4, 26),  # 26.5
        (52, 8, 2, 12),  # 13: between 6 and 7 pairs, the even number of them
        (60, 8, 2, 16),  # 15: between 7 and 8 pairs
        (17, 8, 2, 4),  # 4.25
        (9, 24, 2, 4),  # 0.75: at least 4
        (3, 8, 2, 2),  # no more than there are
        (2, 8, 2, 2),
        (5000, 24, 24, 768),  # at most
    ],
)
def test_the_number_of_frames_is_the_released_codes(count, source_fps, fps, frames):
    indices = frame_indices(count, source_fps, fps)
    assert len(indices) == frames
    assert indices[0] == 0 and indices[-1] == count - 1 and indices == sorted(set(indices))


def test_frames_are_evenly_spaced():
    assert frame_indices(17, 8, 2) == [0, 5, 11, 16]
    assert frame_indices(53, 8, 2) == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52]


@pytest.mark.parametrize(
    ("count", "source_fps", "fps", "message"), [(1, 8, 2, "1 frame"), (9, 0, 2, "clip's"), (9, 8, 0, "fps is 0")]
)
def test_clips_that_cannot_be_sampled_are_refused(count, source_fps, fps, message):
    with pytest.raises(ValueError, match=message):
        frame_indices(count, source_fps, fps)


# --- files


@needs_decord
def test_decord_and_pyav_give_the_same_frames(mp4):
    by_decord, by_av = clips._read_with_decord(mp4), clips._read_with_av(mp4)
    assert torch.equal(by_decord.frames, by_av.frames) and by_decord.fps == by_av.fps == 8


@pytest.mark.parametrize("decord", [pytest.param(True, marks=needs_decord), False])
def test_a_file_is_read_by_decord_where_it_exists_else_by_pyav(mp4, tmp_path, monkeypatch, decord):
    if not decord:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    other = "_read_with_av" if decord else "_read_with_decord"
    monkeypatch.setattr(clips, other, lambda path: pytest.fail(f"{other} was used"))
    clip = read_clip(mp4)
    assert clip.frames.shape == (17, 256, 256, 3) and clip.frames.dtype == torch.uint8 and clip.fps == 8

    with pytest.raises(FileNotFoundError, match="absent"):
        read_clip(tmp_path / "absent.mp4")
    content = mp4.read_bytes()
    for name, data in (("cut", content[:1000]), ("empty", b""), ("text", b"hello")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} .{len(data)} bytes. cannot be read as a video"):
            read_clip(tmp_path / name)


# --- mp4


def test_a_clip_comes_back_from_an_mp4_alike_but_not_equal():
    clip = moving_square()
    back = mp4_round_trip(clip, 8)
    assert back.frames.shape == clip.shape and back.fps == 8
    difference = (back.frames.float() - clip.float()).abs()
    assert 0 < difference.mean() < 6
    # Frames keep their order: each is nearest to its own.
    distances = torch.stack([(back.frames.float() - frame.float()).square().mean(dim=(1, 2, 3)) for frame in clip])
    assert distances.argmin(dim=1).tolist() == list(range(len(clip)))


def test_sides_become_multiples_of_16_as_in_the_released_code():
    assert mp4_round_trip(moving_square(4, 100, 150), 8).frames.shape == (4, 112, 160, 3)


def test_a_rate_that_is_not_above_0_is_refused():
    with pytest.raises(ValueError, match="fps is 0"):
        mp4_round_trip(moving_square(4), 0)
