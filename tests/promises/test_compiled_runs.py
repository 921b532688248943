"""Promises 3 and 4 with compiled blocks (``model.compile``): killed and resumed bitwise, and spread over processes to rounding.

By torch's own compiler, so slow: tracing takes half a minute in each process. Ratios of compiled runs: test_ratio_one.py.
"""

import shutil

import pytest

from tests.promises import test_processes, test_resume
from tests.promises.models import MODELS
from tests.trainer import runs
from tests.trainer.comparisons import assert_same_bitwise, assert_same_to_rounding

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]
COMPILED = {"model__compile": "blocks"}
KIND = "flux"


@pytest.fixture(scope="module", autouse=True)
def graphs(tmp_path_factory):
    """The first process keeps its graphs for the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("graphs")))
        yield


@pytest.fixture(scope="module")
def recorded(tiny_checkpoint, tmp_path_factory):
    return runs.once(tmp_path_factory, tiny_checkpoint, record=True)


@pytest.mark.parametrize("way", ["one process", "ZeRO 2", "ZeRO 2, shared tokens"])
def test_killed_and_resumed_is_bitwise_never_killed(recorded, tiny_checkpoint, tmp_path, way):
    processes, sharing, settings = test_resume.way_of(MODELS[KIND], f"{way}, in an update")
    settings = {**settings, **COMPILED}
    overrides = runs.settings(tmp_path, tiny_checkpoint(KIND), **settings)
    kill = runs.Kill("engine.backward", (test_resume.BACKWARDS + 2) // (processes // sharing))
    assert runs.run(overrides, processes=processes, kill=kill) == [-9] * processes
    assert runs.run(overrides, processes=processes) == [0] * processes
    assert "after iteration 1" in runs.output(tmp_path)
    assert_same_bitwise(tmp_path, recorded(settings, processes), test_resume.ITERATIONS)


@pytest.mark.parametrize("case", ["ZeRO 0", "ZeRO 1", "ZeRO 2, full checkpointing", "ZeRO 2, shared tokens", "ZeRO 2, LoRA"])
def test_processes_give_the_samples_and_weights_of_one(recorded, tiny_checkpoint, tmp_path, case):
    processes, settings, of_one = test_processes.settings_of(MODELS[KIND], case)
    overrides = runs.settings(tmp_path, tiny_checkpoint(KIND), **settings, **COMPILED)
    assert runs.run(overrides, processes=processes, record=True) == [0] * processes
    assert_same_to_rounding(tmp_path, recorded({**of_one, **COMPILED}), settings["run__iterations"])
    assert all(line["train/ratio_first_update_max_dev"] == 0.0 for line in runs.metrics(tmp_path))
