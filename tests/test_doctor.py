"""`doctor` names what is missing, with the command that repairs it."""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys

from fastvideo_grpo import patching
from fastvideo_grpo.commands import doctor


def _run(capsys) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    code = doctor.run(parser.parse_args([]))
    return code, capsys.readouterr().out


def test_nothing_is_missing_after_set_up(capsys):
    code, out = _run(capsys)
    assert code == 0, out
    for word in (
        "python",
        "torch",
        "fastvideo",
        "deepspeed",
        "CPU",
        "GPU",
        "attention",
        "distributed",
        "patches",
        "disk free",
    ):
        assert f"\n{word}" in f"\n{out}"
    assert "gloo" in out
    assert out.endswith("Nothing is missing.\n")


def test_a_missing_package_and_unapplied_patches_are_named(capsys, monkeypatch):
    version = importlib.metadata.version

    def without_deepspeed(name):
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "diffusers" else version(name)

    def unpatched():
        raise patching.PatchError(f"not patched. Run `{patching.APPLY_COMMAND}`.")

    monkeypatch.setattr(importlib.metadata, "version", without_deepspeed)
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["deepspeed>=0.19", "diffusers<1", "av; extra == 'no'"]
    )
    monkeypatch.setattr(patching, "require_patched", unpatched)
    code, out = _run(capsys)
    assert code == 1
    assert "missing: deepspeed is not installed\n  repair: make env" in out
    assert "missing: diffusers is 1.0; needed is <1" in out
    assert re.search(r"missing: not patched\. Run `\S*fastvideo-grpo patch apply`\.", out)
    assert "\nav " not in out


def test_a_torch_that_does_not_import_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out = _run(capsys)
    assert code == 1
    assert "torch does not import" in out
