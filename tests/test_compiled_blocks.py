"""Compiling blocks: what it needs, what rules it out, and what is told of it."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from fastvideo_grpo import cli
from fastvideo_grpo.engines import compiled_blocks
from fastvideo_grpo.engines.compiled_blocks import CACHE_VARIABLE, Compilations, cache_folder, check_compiler, compile_blocks
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.trainers import load

DATA = Path(__file__).parents[1] / "data"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.nn.functional.silu(self.linear(x))


@pytest.fixture
def network(monkeypatch, tmp_path):
    """Three blocks, compiled by something that compiles nothing; nothing was compiled before."""
    monkeypatch.setattr(compiled_blocks, "BACKEND", "eager")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):  # restored after the test
        yield nn.Sequential(Block(), Block(), Block())
    torch._dynamo.reset()


def call(network, tokens):
    network(torch.randn(2, tokens, 4, requires_grad=True))


FOUND = {"Block": ["0", "1", "2"]}


def test_blocks_of_a_class_share_a_graph_and_another_size_is_named(network):
    compile_blocks(network, FOUND, dynamic=False)
    compilations = Compilations()
    call(network, 5)
    (first,) = compilations.new()
    assert first.function == "forward of test_compiled_blocks.py" and first.reason is None and first.seconds > 0
    call(network, 5)
    assert compilations.new() == []
    call(network, 7)
    (second,) = compilations.new()
    assert "size mismatch" in second.reason and "expected 5, actual 7" in second.reason


def test_texts_of_other_lengths_need_no_other_graph(network):
    compile_blocks(network, FOUND, dynamic=True)
    compilations = Compilations()
    for tokens in (5, 7, 12, 5):
        call(network, tokens)
    assert len(compilations.new()) == 1


def test_more_graphs_than_torch_keeps_end_the_run_instead_of_rounding_otherwise(network, monkeypatch):
    monkeypatch.setattr(compiled_blocks, "_GRAPHS_OF_A_FUNCTION", 2)
    compile_blocks(network, FOUND, dynamic=False)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for tokens in range(2, 6):
            call(network, tokens)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler no-such-compiler here.*apt-get install g\+\+"):
        check_compiler(torch.device("cpu"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    check_compiler(torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton is not installed"):
        check_compiler(torch.device("cuda"))


def test_a_run_asks_for_the_compiler_before_it_loads_anything(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(load, "load_trainer", lambda *args: pytest.fail("loaded"))
    settings = [f"model.path={DATA / 'tiny-sd-shapes'}", "model.kind=stable_diffusion", "prompts.text_length=77"]
    settings += ["sample.height=32", "sample.width=32", "sample.noise_level=1", "rewards.models.size.kind=jpeg_size"]
    settings += [f"prompts.path={DATA / 'prompts' / 'shapes_train.txt'}", f"run.dir={tmp_path / 'run'}", "model.compile=blocks"]
    (tmp_path / "run.yaml").write_text("{}")
    assert cli.main(["train", str(tmp_path / "run.yaml"), *settings]) == 1
    assert "no C++ compiler no-such-compiler here" in capsys.readouterr().err


def test_graphs_are_kept_in_the_cache_of_the_user(monkeypatch, tmp_path):
    """Also where a library has imported torch's compiler, which then writes its folder below /tmp into the variable."""
    monkeypatch.setenv(CACHE_VARIABLE, default_cache_dir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        compile_blocks(nn.Sequential(), {}, dynamic=False)
    assert os.environ[CACHE_VARIABLE] == str(cache_folder()) == str(tmp_path / "fastvideo_grpo" / "compiled")
    monkeypatch.setenv(CACHE_VARIABLE, "/elsewhere")
    assert str(cache_folder()) == "/elsewhere"
