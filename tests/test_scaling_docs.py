"""docs/scaling.md says what benchmarks/scaling_table.py says now, and names only what exists."""

import re
from pathlib import Path

import pytest

from benchmarks import scaling_table
from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.config.values import known_keys

ROOT = Path(__file__).parents[1]
IMPORTING = ("lora", "time")  # FastVideo, which takes long: adapters and operations are counted on its layers
TEXT = (ROOT / "docs" / "scaling.md").read_text()


def _table(part):
    start, end = scaling_table.between_markers(TEXT, part)
    return TEXT[start:end]


@pytest.mark.parametrize("part", [name for name in scaling_table.PARTS if name not in IMPORTING])
def test_tables_are_what_the_estimate_says(part):
    assert _table(part) == scaling_table.PARTS[part](), "python benchmarks/scaling_table.py --write docs/scaling.md"


@pytest.mark.slow
@pytest.mark.parametrize("part", IMPORTING)
def test_tables_that_take_long_are_what_is_worked_out(part):
    assert _table(part) == scaling_table.PARTS[part](), "python benchmarks/scaling_table.py --write docs/scaling.md"


def test_every_key_that_is_named_exists():
    sections = "|".join(name for name in known_keys(Config) if "." not in name)
    named = set(re.findall(rf"`(?:(?:{sections})\.[a-z0-9_.]+)", TEXT))
    assert len(named) > 15
    assert {key.strip("`") for key in named} <= set(known_keys(Config))


def test_every_file_that_is_named_exists():
    files = set(re.findall(r"(?:benchmarks|train_scripts|tests|fastvideo_grpo|docs)/[\w/.-]+\.(?:py|sh|sbatch|md)", TEXT))
    assert len(files) > 5
    assert [file for file in sorted(files) if not (ROOT / file).is_file()] == []


def test_a_card_that_fits_leaves_the_stated_margin():
    assert scaling_table.smallest_card(scaling_table.usable(80)) == "80"
    assert scaling_table.usable(80) == 68 * 2**30  # 10 % and 4 GB
    assert scaling_table.smallest_card(scaling_table.usable(141) + 1) == "-"


def test_markers_that_are_missing_are_told():
    with pytest.raises(ValueError, match="markers"):
        scaling_table.between_markers("no markers", "full")
