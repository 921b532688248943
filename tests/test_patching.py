"""The patches to FastVideo: all or nothing, reversible, and never over somebody else's work."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastvideo_grpo import patching
from fastvideo_grpo.commands import patch as command

ROOT = Path(__file__).resolve().parent.parent

ONE = "a = 1\nb = 2\nc = 3\nd = 4\n"
TWO = "first\n\nlast\n"
PATCH_ONE = """Why: for the test.

--- a/fastvideo/one.py
+++ b/fastvideo/one.py
@@ -1,3 +1,4 @@
 a = 1
-b = 2
+b = 20
+b2 = 21
 c = 3
"""
# An empty context line without its blank, as editors leave it.
PATCH_TWO = "--- a/fastvideo/sub/two.py\n+++ b/fastvideo/sub/two.py\n@@ -1,3 +1,3 @@\n first\n\n-last\n+end\n"
# The second patch on one file counts its lines after the first.
PATCH_THREE = "--- a/fastvideo/one.py\n+++ b/fastvideo/one.py\n@@ -4,2 +4,2 @@\n c = 3\n-d = 4\n+d = 40\n"


@pytest.fixture
def patches(tmp_path, monkeypatch):
    folder = tmp_path / "patches"
    folder.mkdir()
    (folder / "0001-one.patch").write_text(PATCH_ONE)
    (folder / "0002-two.patch").write_text(PATCH_TWO)
    (folder / "0003-three.patch").write_text(PATCH_THREE)
    monkeypatch.setattr(patching, "patches_dir", lambda: folder)
    return folder


@pytest.fixture
def tree(tmp_path, patches):
    root = tmp_path / "site"
    (root / "fastvideo" / "sub").mkdir(parents=True)
    (root / "fastvideo" / "__init__.py").write_text("raise AssertionError('imported')\n")
    (root / "fastvideo" / "version.py").write_text('__version__ = "0.2.1"\n')
    (root / "fastvideo" / "one.py").write_text(ONE)
    (root / "fastvideo" / "sub" / "two.py").write_text(TWO)
    patching.write_manifest(root)
    return root


def _bytes(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _states(root: Path) -> list[str]:
    return [item.state for item in patching.status(root)]


def test_apply_twice_then_revert_gives_back_the_same_bytes(tree):
    before = _bytes(tree)
    assert _states(tree) == ["original", "original"]
    assert patching.apply(tree) == ["fastvideo/one.py", "fastvideo/sub/two.py"]
    assert _states(tree) == ["patched", "patched"]
    assert (tree / "fastvideo/one.py").read_text() == "a = 1\nb = 20\nb2 = 21\nc = 3\nd = 40\n"
    assert (tree / "fastvideo/sub/two.py").read_text() == "first\n\nend\n"
    after = _bytes(tree)
    assert patching.apply(tree) == []
    assert _bytes(tree) == after
    assert patching.revert(tree) == ["fastvideo/one.py", "fastvideo/sub/two.py"]
    assert _bytes(tree) == before
    assert patching.revert(tree) == []


def test_hard_links_and_modes_are_respected(tree, tmp_path):
    cached = tmp_path / "cached.py"
    (tree / "fastvideo/one.py").chmod(0o640)
    os.link(tree / "fastvideo/one.py", cached)
    patching.apply(tree)
    assert cached.read_text() == ONE
    assert (tree / "fastvideo/one.py").stat().st_mode & 0o777 == 0o640
    patching.revert(tree)
    assert cached.read_text() == ONE


def test_a_file_changed_by_somebody_else_is_refused_and_nothing_is_written(tree):
    (tree / "fastvideo/sub/two.py").write_text("mine\n")
    before = _bytes(tree)
    for action in (patching.apply, patching.revert):
        with pytest.raises(
            patching.PatchError, match=r"two\.py is neither.*force-reinstall --no-deps fastvideo==0\.2\.1"
        ):
            action(tree)
        assert _bytes(tree) == before


def test_a_patched_file_changed_by_hand_is_refused(tree):
    patching.apply(tree)
    with (tree / "fastvideo/one.py").open("a") as file:
        file.write("e = 5\n")
    before = _bytes(tree)
    with pytest.raises(patching.PatchError, match=r"one\.py is neither"):
        patching.revert(tree)
    assert _bytes(tree) == before


def test_a_missing_file_is_named(tree):
    (tree / "fastvideo/one.py").unlink()
    with pytest.raises(patching.PatchError, match=r"one\.py is missing"):
        patching.apply(tree)


def test_another_version_is_refused(tree):
    (tree / "fastvideo" / "version.py").write_text('__version__ = "0.3.0"\n')
    with pytest.raises(patching.PatchError, match=r"is 0\.3\.0; the patches are for 0\.2\.1"):
        patching.apply(tree)


def test_a_folder_without_fastvideo_is_refused(tmp_path, patches, tree):
    with pytest.raises(patching.PatchError, match="a folder that contains fastvideo/"):
        patching.apply(tmp_path / "elsewhere")


def test_a_patch_that_does_not_fit_leaves_every_file_alone(tree, patches):
    before = _bytes(tree)
    (patches / "0002-two.patch").write_text(PATCH_TWO.replace(" first", " other"))
    with pytest.raises(
        patching.PatchError, match=r"0002-two\.patch on fastvideo/sub/two\.py: line 1 should be 'other'"
    ):
        patching.apply(tree)
    assert _bytes(tree) == before


def test_a_manifest_that_does_not_fit_the_patches_leaves_every_file_alone(tree, patches):
    before = _bytes(tree)
    (patches / "0002-two.patch").write_text(PATCH_TWO.replace("+end", "+other end"))
    with pytest.raises(patching.PatchError, match="patch manifest"):
        patching.apply(tree)
    assert _bytes(tree) == before


def test_a_failing_rename_puts_back_the_files_already_replaced(tree, monkeypatch):
    replace, calls = os.replace, []

    def fails_on_the_second_file(source, target):
        if Path(target).name == "two.py":
            calls.append(target)
            raise PermissionError(13, "Permission denied", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_on_the_second_file)
    with pytest.raises(patching.PatchError, match="left as it was"):
        patching.apply(tree)
    assert calls
    assert _states(tree) == ["original", "original"]
    assert not list(tree.rglob("*.py.*.new"))


def test_a_kill_between_two_renames_is_repaired_by_the_next_apply(tree):
    patching.apply(tree)
    (tree / "fastvideo/one.py").write_text(ONE)  # as if the second rename had not come
    assert patching.apply(tree) == ["fastvideo/one.py"]
    assert _states(tree) == ["patched", "patched"]


def test_a_newer_set_of_patches_replaces_an_older_one(tree, patches):
    before = _bytes(tree)
    patching.apply(tree)
    (patches / "0001-one.patch").write_text(PATCH_ONE.replace("b2 = 21", "b2 = 22"))
    (patches / "0002-two.patch").unlink()
    patching.write_manifest(tree)
    assert _states(tree) == ["outdated", "outdated"]
    patching.apply(tree)
    assert "b2 = 22" in (tree / "fastvideo/one.py").read_text()
    assert (tree / "fastvideo/sub/two.py").read_text() == TWO
    patching.revert(tree)
    assert _bytes(tree) == before


@pytest.mark.parametrize(
    "text,error",
    [
        ("only a head\n", "changes nothing"),
        (PATCH_ONE.replace("+++ b/fastvideo/one.py", "+++ b/fastvideo/three.py"), "expected the same file"),
        (PATCH_ONE.replace("-1,3", "-1,5"), "ends too early"),
        (PATCH_ONE + "more\n", "belongs to no hunk"),
    ],
)
def test_a_damaged_patch_is_named(tree, patches, text, error):
    (patches / "0001-one.patch").write_text(text)
    with pytest.raises(patching.PatchError, match=rf"0001-one\.patch.*{error}"):
        patching.apply(tree)


def test_require_patched_names_the_command_and_does_not_import(tree, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tree)])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "PathFinder" in repr(finder)])
    monkeypatch.delitem(sys.modules, "fastvideo", raising=False)
    with pytest.raises(patching.PatchError, match=r"not patched.*Run `fastvideo-grpo patch apply`"):
        patching.require_patched()
    patching.apply()
    patching.require_patched()
    (tree / "fastvideo" / "version.py").write_text('__version__ = "0.2.0"\n')
    with pytest.raises(patching.PatchError, match=r"is 0\.2\.0; .*`fastvideo-grpo patch apply`"):
        patching.require_patched()
    shutil.rmtree(tree / "fastvideo")
    with pytest.raises(patching.PatchError, match=r"not installed.*`fastvideo-grpo patch apply`"):
        patching.require_patched()


def _run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


def test_the_command(tree, capsys):
    assert _run("check", "--to", str(tree)) == 1
    assert f"patch apply --to {tree}" in capsys.readouterr().out
    assert _run("apply", "--to", str(tree)) == 0
    assert "patched fastvideo/one.py" in capsys.readouterr().out
    assert _run("apply", "--to", str(tree)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert _run("check", "--to", str(tree)) == 0
    assert _run("revert", "--to", str(tree)) == 0
    (tree / "fastvideo/one.py").write_text("mine\n")
    assert _run("apply", "--to", str(tree)) == 1
    assert capsys.readouterr().err.startswith("error: ")


# ---- the real patches


def test_the_installed_fastvideo_is_patched():
    patching.require_patched()


def test_the_patches_fit_fastvideo_and_go_back(tmp_path):
    """On a copy of the installed files: originals from what was kept at set-up."""
    installed = patching.find_fastvideo()
    manifest = json.loads((ROOT / "patches" / "manifest.json").read_text())
    for path in [*manifest["files"], "fastvideo/version.py"]:
        kept = installed / "fastvideo" / ".fastvideo_grpo" / "originals" / path
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept if kept.is_file() else installed / path, target)
    before = _bytes(tmp_path)
    assert set(patching.apply(tmp_path)) == set(manifest["files"])
    for path in manifest["files"]:
        compile((tmp_path / path).read_bytes(), path, "exec")
        assert (tmp_path / path).read_bytes() == (installed / path).read_bytes()
    patching.revert(tmp_path)
    assert _bytes(tmp_path) == before


def test_every_patch_says_why_and_when_it_can_go():
    for patch in sorted((ROOT / "patches").glob("*.patch")):
        head = patch.read_text().split("\n--- a/")[0]
        for word in ("Why:", "Upstream file", "What upstream would need:", "When it can go:"):
            assert word in head, f"{patch.name} lacks {word!r}"


def test_the_wheel_ships_the_patches_and_finds_them(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    ]
    subprocess.run([sys.executable, *command], check=True)
    (wheel,) = tmp_path.glob("fastvideo_grpo-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    for patch in (ROOT / "patches").iterdir():
        assert f"fastvideo_grpo/patches/{patch.name}" in names
    assert not any(name.startswith(("tests/", "patches/")) for name in names)
    code = "from fastvideo_grpo import resources; print(resources.patches_dir())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "installed", check=True, capture_output=True, text=True
    )
    assert Path(found.stdout.strip()) == tmp_path / "installed" / "fastvideo_grpo" / "patches"
