"""What an iteration's updates report: NaN shows, rows that only fill a micro-batch do not."""

import math

import pytest
import torch

from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.tracking.statistics import UpdateStatistics

NAN = float("nan")


def _summary(*added):
    statistics = UpdateStatistics()
    for ratios, weights, first in added:
        ratios = torch.tensor(ratios)
        info = {"ratio": ratios, "clipped": ((ratios - 1).abs() > 0.1).float()}
        statistics.add(torch.tensor(0.5), info, torch.tensor(weights), first=first)
    return statistics.summary(World())


@pytest.mark.parametrize("order", [1, -1])
def test_a_ratio_that_is_nan_shows(order):
    added = [([1.0, NAN], [1.0, 1.0], True), ([1.0, 1.5], [1.0, 1.0], True)][::order]
    summary = _summary(*added)
    assert math.isnan(summary["train/ratio_first_update_max_dev"]) and math.isnan(summary["train/ratio_max_dev"])


def test_a_nan_of_a_later_update_is_no_deviation_of_the_first():
    summary = _summary(([1.0], [1.0], True), ([NAN], [1.0], False))
    assert summary["train/ratio_first_update_max_dev"] == 0.0 and math.isnan(summary["train/ratio_max_dev"])


def test_rows_that_only_fill_do_not_count():
    summary = _summary(([1.0, NAN], [1.0, 0.0], True), ([7.0, 1.25], [0.0, 1.0], False))
    assert summary["train/ratio_first_update_max_dev"] == 0.0 and summary["train/ratio_max_dev"] == 0.25
    assert summary["train/clip_fraction"] == 0.5 and summary["train/loss"] == 1.0


def test_without_updates_there_is_no_ratio():
    summary = _summary()
    assert summary["train/ratio_first_update_max_dev"] is None and summary["train/ratio_max_dev"] is None


def test_a_rank_whose_rows_all_only_fill_hides_nothing():
    class Two(World):
        def all_gather_object(self, value):
            return [value, ({}, 0.0, 0.0, None, None)]

    statistics = UpdateStatistics()
    statistics.add(torch.tensor(0.5), {"ratio": torch.tensor([NAN])}, torch.tensor([1.0]), first=True)
    assert math.isnan(statistics.summary(Two())["train/ratio_first_update_max_dev"])
