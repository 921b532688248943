"""What tests ask of two runs: that they are one run, to rounding or bitwise."""

from pathlib import Path

import pytest

from tests.trainer import runs


def assert_same_to_rounding(two: Path, one: Path, iterations: int = 3) -> None:
    """Two recorded runs in these folders are one run: samples, rewards, pictures, logged numbers and weights."""
    assert runs.largest_difference(runs.weights(two, iterations), runs.weights(one, iterations)) < 1e-6
    for a, b in zip(runs.metrics(two), runs.metrics(one), strict=True):
        assert a["train/ratio_first_update_max_dev"] == 0.0
        assert a["train/ratio_max_dev"] > 0.0 and a["train/updates"] == 2
        assert a["reward/pixels/brightness/mean"] == pytest.approx(b["reward/pixels/brightness/mean"], abs=1e-3)
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-2, abs=1e-5)
    for iteration in range(iterations):
        ours, theirs = runs.drawn(two, iteration), runs.drawn(one, iteration)
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            assert len(a) == len(b) > 0 and runs.largest_difference(a, b) < 1e-5
        # One pixel rounded the other way moves the mean of 64 x 64 by 2.4e-4.
        assert runs.largest_difference(ours[2], theirs[2]) < 1e-2
    for iteration in range(iterations + 1):
        ours, theirs = runs.pictures(two, iteration).int(), runs.pictures(one, iteration).int()
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1
        assert ours.float().std() > 1  # a constant picture would agree with anything


def assert_same_bitwise(folder: Path, reference: Path, iterations: int = 3) -> None:
    """Two runs left the same bits: weights, EMA, optimiser, logged numbers."""
    for which in ("model", "ema"):
        assert runs.same_bits(runs.weights(folder, iterations, which), runs.weights(reference, iterations, which))
    state = Path("run") / "checkpoints" / f"{iterations:06d}" / "state"
    files = sorted(path.name for path in (reference / state).iterdir())
    assert any(name.startswith("optimizer") for name in files)
    for name in files:
        assert (folder / state / name).read_bytes() == (reference / state / name).read_bytes(), name
    assert runs.metrics(folder) == runs.metrics(reference)
