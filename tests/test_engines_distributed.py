"""Two processes equal one: every ZeRO stage against LocalEngine, exact resume, and what moves between ranks.

One launch of tests/workers/engines.py does all the work; the tests read what it measured.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastvideo_grpo.engines.deepspeed import deepspeed_config
from fastvideo_grpo.engines.parallel import World

CONFIGURATIONS = [
    "fp32-0-none",
    "fp32-1-none",
    "fp32-2-none",
    "fp32-3-none",
    "bf16-0-none",
    "bf16-2-none",
    "bf16-3-none",
    "fp32-2-optimizer",
    "fp32-3-parameters",
]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    home = folder / "home"
    home.mkdir()
    results = folder / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = Path(__file__).parent / "workers" / "engines.py"
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    source = str(Path(__file__).parents[1])
    environment |= {
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH")])),
    }
    environment.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [*command, str(worker), str(results), str(folder / "states")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {"ranks": json.loads(results.read_text()), "home": home, "stdout": done.stdout}


@pytest.fixture(params=CONFIGURATIONS)
def found(launch, request):
    return [rank[request.param] for rank in launch["ranks"]]


def test_two_processes_equal_one_at_changing_call_counts(found):
    for rank in found:
        # Losses are divided by the whole update's calls, so equality says that gradients are summed over calls and ranks.
        assert rank["weights"] < 1e-7
        assert rank["weights_after_skip"] < 1e-7
        for one, two in rank["norms"]:
            assert two == pytest.approx(one, rel=1e-5)
            assert two > 0.1  # above max_grad_norm: clipping took part


def test_nan_on_one_rank_skips_the_update_on_all(found):
    for rank in found:
        assert math.isinf(rank["poisoned_norm"])
        assert rank["poisoned_unchanged"]
        assert rank["skipped"] == [1, 3, 4]


def test_ema_weights_are_those_of_one_process_and_leave_bitwise(found):
    for rank in found:
        assert rank["ema_output"] < 1e-6
        assert rank["ema_differs"]
        assert rank["ema_restored"]
        assert rank["consolidated_ema"] < 1e-7


def test_resume_is_bitwise(found):
    for rank in found:
        assert rank["resumed_bitwise"]
        assert {"weights-00000.safetensors", "optimizer-00001.safetensors", "ema-00001.safetensors"} <= set(rank["files"])


def test_states_move_between_engines_and_world_sizes(found):
    for rank in found:
        assert rank["consolidated"]
        assert rank["loaded_by_one_process"]
        assert rank["one_process_after_load"] < 1e-7
        assert rank["loads_from_one_process"]


def test_buffers_keep_float32(found):
    assert {rank["buffer_dtype"] for rank in found} == {"torch.float32"}


def test_bf16_stage_0_runs_as_stage_1_which_has_masters(launch):
    assert [rank["bf16-0-none"]["stage"] for rank in launch["ranks"]] == [1, 1]
    assert [rank["fp32-0-none"]["stage"] for rank in launch["ranks"]] == [0, 0]


def test_nothing_outside_the_run_is_touched(launch):
    assert list(launch["home"].iterdir()) == []
    noise = [line for line in launch["stdout"].splitlines() if line and "OVERFLOW! Skipping step" not in line]
    assert noise == []


def test_exchange_sends_rows_from_owner_to_reader(launch):
    for rank in launch["ranks"]:
        assert rank["exchange"]["rows"]
        assert rank["exchange"]["dtypes"]


def test_exchange_names_a_missing_row_on_every_rank(launch):
    for rank in launch["ranks"]:
        assert "rank 1 owns" in rank["exchange"]["missing"]


def test_gathers_are_in_rank_order(launch):
    for rank in launch["ranks"]:
        first, second = rank["exchange"]["gathered"]
        assert (first[0], second[0]) == (0.0, 1.0)
        assert rank["exchange"]["sum"] == [0.2, 1.0]
        assert rank["exchange"]["all_true"] == [True, False]
        assert rank["exchange"]["broadcast"] == {"from": 1}


def test_checkpoints_are_agreed_on_by_all_ranks(launch):
    for rank in launch["ranks"]:
        store = rank["store"]
        assert store["saved"] == [True, True, True]
        assert store["full"] is False
        assert store["there"] == ["000002", "000003"]
        assert store["newest"] == "000003"
        assert store["files"] == ["rank-0.bin", "rank-1.bin"]
        assert store["newest_after_damage"] == "000002"


def config(stage, offload, path=None):
    engine = SimpleNamespace(zero_stage=stage, offload=offload, micro_batch_size=2, deepspeed_json=path)
    return deepspeed_config(SimpleNamespace(max_grad_norm=1.0), engine, "fp32", World())


def test_deepspeed_json_adds_keys_but_not_those_that_follow_from_ours(tmp_path):
    path = tmp_path / "more.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}, "dump_state": False}))
    found = config(2, "none", path)
    assert found["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert found["dump_state"] is False
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}))
    with pytest.raises(ValueError, match=r"sets bf16, zero_optimization\.stage"):
        config(2, "none", path)
    with pytest.raises(ValueError, match="cannot be read"):
        config(2, "none", tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("stage", "offload", "message"),
    [
        (4, "none", r"engine\.zero_stage is 4; allowed: 0, 1, 2, 3"),
        (2, "disk", r"engine\.offload is 'disk'; allowed"),
        (2, "parameters", r"needs engine\.zero_stage=3"),
        (0, "optimizer", r"needs engine\.zero_stage 1, 2 or 3"),
    ],
)
def test_impossible_engine_settings_name_their_key(stage, offload, message):
    with pytest.raises(ValueError, match=message):
        config(stage, offload)
