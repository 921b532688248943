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
    named = set(re.findall(r"`([\w/]+\.py)`", prose))
    assert len(named) > 10
    assert [f for f in sorted(named) if not (architecture.PACKAGE / f).is_file() and not (ROOT / f).is_file()] == []


def test_sampling_and_grpo_import_torch_alone(architecture):
    """Of the heavy libraries; and of this package only what is below them."""
    edges = architecture.graph()
    assert edges["sampling/"] == {"loading": {"extensions.py"}, "use": set()}
    assert edges["grpo/"] == {"loading": {"extensions.py", "sampling/"}, "use": set()}
    heavy = re.compile(r"^\s*(import|from) (fastvideo|diffusers|transformers|deepspeed)\b", re.MULTILINE)
    for part in ("sampling", "grpo"):
        for file in (architecture.PACKAGE / part).rglob("*.py"):
            assert not heavy.search(file.read_text()), file


def test_nothing_is_imported_in_a_circle(architecture):
    """No file by way of others, and no part, imports inside functions and for type checkers included."""
    assert architecture.circles(architecture.file_edges()) == []
    assert architecture.circles(architecture.part_edges()) == []


@pytest.fixture
def tree(architecture, tmp_path, monkeypatch):
    """``tree({"a.py": text, ...})``: a package of these files, which ``architecture`` looks at from then on."""
    monkeypatch.setattr(architecture, "ROOT", tmp_path)
    monkeypatch.setattr(architecture, "PACKAGE", tmp_path / "fastvideo_grpo")

    def write(texts):
        for name, text in {"__init__.py": "", **texts}.items():
            file = architecture.PACKAGE / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return write


@pytest.mark.parametrize(
    "back",
    [
        "from fastvideo_grpo.a import x",
        "from fastvideo_grpo import a",
        "import fastvideo_grpo.a",
        "def f():\n    from fastvideo_grpo.a import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fastvideo_grpo.a import x",
        "from .a import x",
        "from . import a",
        "def f():\n    from .a import x",
    ],
)
def test_a_circle_is_found_however_it_is_imported(architecture, tree, back):
    tree({"a.py": "from fastvideo_grpo.b import y", "b.py": "from fastvideo_grpo.c import z", "c.py": back, "d.py": "import a"})
    assert architecture.circles(architecture.file_edges()) == [["a.py", "b.py", "c.py"]]
    assert architecture.circles(architecture.part_edges()) == [["a.py", "b.py", "c.py"]]


def test_a_circle_is_found_inside_a_folder_and_between_folders(architecture, tree):
    tree(
        {
            "wan/__init__.py": "from .family import WAN",
            "wan/family.py": "from . import sizes",
            "wan/sizes.py": "from fastvideo_grpo.wan import WAN",
            "one/up.py": "from ..two.down import x",
            "one/down.py": "",
            "two/up.py": "from ..one.down import x",
            "two/down.py": "import json",
        }
    )
    assert architecture.circles(architecture.file_edges()) == [["wan/__init__.py", "wan/family.py", "wan/sizes.py"]]
    assert architecture.circles(architecture.part_edges()) == [["one/", "two/"]]


def test_files_in_one_direction_are_no_circle(architecture, tree):
    """A file that is imported by two others, and one by itself; a folder's own files."""
    tree(
        {
            "x.py": "from fastvideo_grpo.y import a\nfrom fastvideo_grpo import p",
            "y.py": "from fastvideo_grpo.p.q import b",
            "p/__init__.py": "from .q import b",
            "p/q.py": "from fastvideo_grpo.p import q",
        }
    )
    assert architecture.file_edges()["x.py"] == {"y.py", "p/__init__.py"}
    assert architecture.circles(architecture.file_edges()) == architecture.circles(architecture.part_edges()) == []


def test_a_models_name_stands_in_its_folder(architecture):
    """Who else may know it is listed with the reason; a model that is added adds nothing there."""
    assert architecture.who_knows().keys() == architecture.MAY_KNOW.keys()


def test_a_name_is_found_in_code_and_not_in_words_around_it(architecture, tmp_path):
    names = architecture.model_names()
    file = tmp_path / "some.py"
    file.write_text('"""wan, of flux."""\nfrom a import WanPipeline  # flux\nwanted = "SWAN: Wan Stable-Diffusion"\n')
    words = "\n".join(architecture.code_words(file))
    assert [model for model, called in names.items() if called.search(words)] == ["stable_diffusion", "wan"]
    classes = {"FluxTransformer2DModel": "flux", "AutoencoderKLWan": "wan", "AutoencoderKLHunyuanVideo": "hunyuan_video"}
    for code, model in classes.items():
        assert [name for name, called in names.items() if called.search(code)] == [model]
    file.write_text('wanted = "wandb"\nWANDB = swan.influx\n')
    assert not any(called.search("\n".join(architecture.code_words(file))) for called in names.values())
