"""docs/architecture.md says what is so: places of a trajectory's way exist, imports go downwards, sizes are about right."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AGAIN = "python docs/architecture.py"


@pytest.fixture(scope="module")
def architecture():
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(architecture):
    return architecture.DOCUMENT.read_text()


def test_every_place_of_the_way_exists(architecture):
    for stop in (*architecture.ROLLOUT, *architecture.STEP, *architecture.UPDATE):
        code = (architecture.PACKAGE / stop.file).read_text()
        for name in stop.names:
            assert re.search(rf"^ *(def|class) {name}\b", code, re.MULTILINE), f"{stop.file} has no {name}"


@pytest.mark.parametrize("table", ["walk", "names", "imports"])
def test_tables_are_what_the_code_says(architecture, text, table):
    assert architecture.TABLES[table]() in text, AGAIN


def test_sizes_are_within_a_tenth(architecture, text):
    def sizes(table):
        return {row[1]: int(row[2]) for row in re.finditer(r"^\| `?([\w./]+)`? \| \d+ \| (\d+) \|", table, re.MULTILINE)}

    said, found = sizes(text), sizes(architecture.sizes_table())
    assert said.keys() == found.keys(), AGAIN
    assert [part for part, lines in found.items() if abs(said[part] - lines) > max(10, lines / 10)] == [], AGAIN


def test_every_file_that_is_named_exists(architecture, text):
    prose = re.sub(r"<!-- (\w+): by.*?<!-- end of \1 -->", "", text, flags=re.DOTALL)
    named = set(re.findall(r"`([\w/]+\.py)`", prose)) - {"docs/architecture.py", "tests/test_architecture_docs.py"}
    assert len(named) > 8
    assert [file for file in sorted(named) if not (architecture.PACKAGE / file).is_file()] == []


def test_sampling_and_grpo_import_torch_alone(architecture):
    """Of the heavy libraries; and of this package only what is below them."""
    edges = architecture.graph()
    assert edges["sampling/"] == {"loading": {"extensions.py"}, "use": set()}
    assert edges["grpo/"] == {"loading": {"extensions.py", "sampling/"}, "use": set()}
    heavy = re.compile(r"^\s*(import|from) (fastvideo|diffusers|transformers|deepspeed)\b", re.MULTILINE)
    for part in ("sampling", "grpo"):
        for file in (architecture.PACKAGE / part).rglob("*.py"):
            assert not heavy.search(file.read_text()), file


def test_a_models_name_stands_in_its_folder(architecture):
    """Who else may know it is listed with the reason; a model that is added adds nothing there."""
    assert architecture.who_knows().keys() == architecture.MAY_KNOW.keys()


def test_a_name_is_found_in_code_and_not_in_words_around_it(architecture, tmp_path):
    names = architecture.model_names()
    file = tmp_path / "some.py"
    file.write_text('"""wan, of flux."""\nfrom a import WanPipeline  # flux\nwanted = "SWAN: Wan Stable-Diffusion"\n')
    words = "\n".join(architecture.code_words(file))
    assert [model for model, called in names.items() if called.search(words)] == ["stable_diffusion", "wan"]
    file.write_text('wanted = "wandb"\nWANDB = swan.influx\n')
    assert not any(called.search("\n".join(architecture.code_words(file))) for called in names.values())
