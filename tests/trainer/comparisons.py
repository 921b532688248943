"""What tests ask of two runs: that they are one run, to rounding or bitwise."""

from pathlib import Path

import pytest
import torch

from tests.trainer import runs

LEARNING_RATE = 1e-5  # of runs.settings
ROUNDING = 1e-5
"""Of the largest gradient: what two ways of computing one differ by (held to it in test_processes.py)."""


def assert_same_weights(two: Path, one: Path, iterations: int, updates: int = 2, rounding: float = ROUNDING) -> None:
    """The weights of two runs, the second of which recorded its gradients, agree to 1e-6 wherever a gradient says which way.

    AdamW divides a gradient by its own size: where it is nothing but rounding (below ``rounding`` of the largest), each run
    moves its weight by up to a learning rate the way that the rounding says. Those are few.
    """
    ours, theirs = runs.weights(two, iterations), runs.weights(one, iterations)
    recorded = [runs.gradients(one, update) for update in range(iterations * updates)]
    assert ours.keys() == theirs.keys() == recorded[0].keys()
    largest = [max(gradient.abs().max() for gradient in gradients.values()) for gradients in recorded]
    count = few = 0
    for name, weight in ours.items():
        difference = (weight - theirs[name]).abs()
        pairs = zip(recorded, largest, strict=True)
        says = torch.stack([gradients[name].abs() > rounding * top for gradients, top in pairs]).all(0)
        worst = difference[says].max().item() if says.any() else 0.0
        assert worst < 1e-6, f"{name}: weights differ by {worst:.1e}"
        assert difference.max() <= 2 * LEARNING_RATE * len(recorded), f"{name}: {difference.max():.1e}"
        count, few = count + weight.numel(), few + int((difference >= 1e-6).sum())
    assert few < 1e-4 * count, f"{few} of {count} weights differ by 1e-6 or more"


def assert_same_to_rounding(two: Path, one: Path, iterations: int = 3, *, ratio_one: bool = True) -> None:
    """Two recorded runs in these folders, the second of one process, are one run: samples, rewards, pictures, logged numbers
    and weights; ``ratio_one``: nothing had moved before an iteration's first update."""
    assert_same_weights(two, one, iterations)
    for a, b in zip(runs.metrics(two), runs.metrics(one), strict=True):
        if ratio_one:
            assert a["train/ratio_first_update_max_dev"] == 0.0 < a["train/ratio_max_dev"]
        assert a["train/updates"] == 2
        assert a.get("train/stored_output_max_dev", 0.0) == 0.0
        assert a["reward/pixels/brightness/mean"] == pytest.approx(b["reward/pixels/brightness/mean"], abs=1e-3)
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-2, abs=1e-5)
    for iteration in range(iterations):
        ours, theirs = runs.drawn(two, iteration), runs.drawn(one, iteration)
        assert len(ours[0]) == len(theirs[0]) > 0 and runs.largest_difference(ours[0], theirs[0]) < 1e-5
        # One pixel rounded the other way moves the mean of 64 x 64 by 2.4e-4.
        assert runs.largest_difference(ours[1], theirs[1]) < 1e-2
    pictured = sorted(int(folder.name) for folder in (one / "run" / "samples").iterdir())
    assert pictured[0] == 0 and pictured[-1] == iterations
    for iteration in pictured:
        ours, theirs = runs.pictures(two, iteration).int(), runs.pictures(one, iteration).int()
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1
        assert ours.float().std() > 1  # a constant picture would agree with anything


def assert_same_bitwise(folder: Path, reference: Path, iterations: int = 3) -> None:
    """Two runs left the same bits: weights, averages, optimiser, logged numbers."""
    averages = runs.averages(reference, iterations)
    assert averages == runs.averages(folder, iterations)
    for which in ("model", *averages):
        assert runs.same_bits(runs.weights(folder, iterations, which), runs.weights(reference, iterations, which))
    state = Path("run") / "checkpoints" / f"{iterations:06d}" / "state"
    files = sorted(path.name for path in (reference / state).iterdir())
    assert any(name.startswith("optimizer") for name in files)
    for name in files:
        assert (folder / state / name).read_bytes() == (reference / state / name).read_bytes(), name
    assert runs.metrics(folder) == runs.metrics(reference)
