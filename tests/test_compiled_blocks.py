"""Compiling blocks: what it needs, what rules it out, and what is told of it."""

import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastvideo_grpo.engines import compiled_blocks
from fastvideo_grpo.engines.compiled_blocks import Compilations, cache_folder, compile_blocks, prepare_compiler
from fastvideo_grpo.errors import ConfigError


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
    monkeypatch.setenv(compiled_blocks.CACHE_VARIABLE, str(tmp_path))
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


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(compiled_blocks.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler no-such-compiler here.*apt-get install g\+\+"):
        prepare_compiler(torch.device("cpu"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    prepare_compiler(torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton is not installed"):
        prepare_compiler(torch.device("cuda"))


def test_graphs_are_kept_in_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv(compiled_blocks.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fastvideo_grpo" / "compiled"
    code = (
        "import torch; from fastvideo_grpo.engines.compiled_blocks import prepare_compiler; "
        "prepare_compiler(torch.device('cpu')); "
        "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(cache_folder())
    monkeypatch.setenv(compiled_blocks.CACHE_VARIABLE, "/elsewhere")
    assert str(cache_folder()) == "/elsewhere"
