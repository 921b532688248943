"""Many processes equal one: every ZeRO stage against LocalEngine, exact resume, loading in partitions, a user's DeepSpeed
JSON, and what moves between ranks.

One launch of tests/workers/engines.py on two processes does the work of the quick tests; slow ones repeat it on four, which
load the states of the two, and the other way round. The tests read what was measured.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastvideo_grpo.config.keys import EngineConfig
from fastvideo_grpo.engines.deepspeed import deepspeed_config
from fastvideo_grpo.engines.local import LocalEngine
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.engines.sharded_loading import CheckpointReader, FusedWeights, WeightFilesError, fused_parts
from fastvideo_grpo.errors import ConfigError
from tests.workers.engines import BROUGHT, CONFIGURATIONS, MOVES, OPTIM

FOUR = pytest.param(4, marks=pytest.mark.slow, id="four")
TWO = pytest.param(2, id="two")


def run_worker(folder, processes, states=None):
    folder.mkdir()
    home = folder / "home"
    home.mkdir()
    results = folder / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
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
        [*command, str(worker), str(results), str(folder / "states"), *([str(states)] if states else [])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {"ranks": json.loads(results.read_text()), "home": home, "stdout": done.stdout, "states": folder / "states"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def launch(folder):
    return run_worker(folder / "two", 2)


@pytest.fixture(scope="module")
def four(folder, launch):
    return run_worker(folder / "four", 4, launch["states"])


@pytest.fixture(scope="module")
def back(folder, four):
    return run_worker(folder / "back", 2, four["states"])


@pytest.fixture(params=[TWO, FOUR])
def ranks(request):
    return request.getfixturevalue("launch" if request.param == 2 else "four")["ranks"]


@pytest.fixture(params=CONFIGURATIONS)
def found(ranks, request):
    return [rank[request.param] for rank in ranks]


def test_many_processes_equal_one_at_changing_call_counts(found):
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


def test_states_move_between_one_process_and_many(found):
    for rank in found:
        assert rank["consolidated"]
        assert rank["loaded_by_one_process"]
        assert rank["one_process_after_load"] < 1e-7
        assert rank["loads_from_one_process"]


@pytest.mark.parametrize("move", MOVES, ids=" > ".join)
@pytest.mark.parametrize(
    "run",
    [
        pytest.param("launch", id="2-2"),
        pytest.param("four", id="2-4", marks=pytest.mark.slow),
        pytest.param("back", id="4-2", marks=pytest.mark.slow),
    ],
)
def test_states_move_between_stages_precisions_and_world_sizes(request, run, move):
    for rank in request.getfixturevalue(run)["ranks"]:
        moved = rank[" > ".join(move)]
        assert moved["bitwise"]  # weights, moments, EMA and counters
        assert moved["continues"] < 1e-7
        assert moved["ema_continues"] < 1e-6


def test_buffers_keep_float32_and_their_values(found):
    assert {rank["buffer_dtype"] for rank in found} == {"torch.float32"}
    assert all(rank["buffer_kept"] for rank in found)


def test_ema_weights_cannot_be_taken_for_the_weights(found):
    assert all(rank["refused_inside_ema"] for rank in found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loading_in_partitions_takes_a_partition_and_one_parameter(ranks, precision):
    for rank in ranks:
        memory = rank["memory"][precision]
        # 8 MB for reading files of another dtype, the rest for what Python and gloo allocate.
        allowed = memory["whole"] / len(ranks) + memory["largest"] + 12e6
        assert memory["loading"] < allowed
        assert memory["ordinary"] > 1.5 * allowed  # loading it whole would be noticed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_partitioned_reference_equals_the_plain_module_and_lets_layers_go(ranks, precision):
    for rank in ranks:
        memory = rank["memory"][precision]
        assert memory["output"] < 1e-6
        assert memory["live"] < memory["whole"] / 5


def test_weights_that_are_not_finite_are_found_in_partitions_and_only_there(ranks):
    for rank in ranks:
        finite = rank["finite"]
        assert finite["behind"] > 0 and finite["padding"]
        assert not finite["damaged"]


def test_adapters_train_on_a_partitioned_base_beside_a_reference(ranks):
    for rank in ranks:
        adapters = rank["adapters"]
        assert adapters["names"]
        assert adapters["trained"]
        assert adapters["norm"][0] == pytest.approx(adapters["norm"][1], rel=1e-5)
        assert adapters["weights"] < 1e-7
        assert adapters["output"] < 1e-6
        assert adapters["reference"] < 1e-6
        assert adapters["moved"] > 1e-4
        assert adapters["saved"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "buffer",
            "ValueError: 1 buffers were built on the meta device and are in no checkpoint, so they have no values (unsaved)",
        ),
        ("shape", "unreached.weight has shape (2, 3) in the weights, (4, 3) in the model"),
        ("extra", "0 are missing (), 2 are not in the model (unreached.bias, unreached.weight)"),
        ("missing", "2 are missing (late.bias, late.weight)"),
        ("absent", "absent.safetensors cannot be read"),
        ("failing", "WeightFilesError: OSError(5, 'the disk is gone')"),  # raised on rank 0 only, while the others wait
        ("stage", "engine.zero_stage=3 only, not 2"),
        ("wrapped_as_stage_2", "the module's parameters are ZeRO-3 partitions, which only engine.kind=deepspeed"),
        ("wrapped_as_bf16", "layers.0.weight was loaded in partitions as torch.float32, but model.precision is bf16"),
    ],
)
def test_what_cannot_be_loaded_is_the_same_error_on_every_rank(launch, case, message):
    messages = [rank["refusals"][case] for rank in launch["ranks"]]
    assert message in messages[0]
    assert messages[1] == messages[0]


def test_a_brought_deepspeed_json_tunes_deepspeed_and_changes_no_result(launch):
    for rank in launch["ranks"]:
        found = rank["json"]
        assert found["norms"][1] == pytest.approx(found["norms"][0], rel=1e-5)
        assert found["weights"] < 1e-7
        assert found["reduce_bucket_size"] == 123456
        assert found["prefetch_bucket_size"] == 23456
        assert found["pin_memory"] is True
        assert found["steps_per_print"] == 50


def test_bf16_stage_0_runs_as_stage_1_which_has_masters(launch):
    assert [rank["bf16-0-none-plain"]["stage"] for rank in launch["ranks"]] == [1, 1]
    assert [rank["fp32-0-none-plain"]["stage"] for rank in launch["ranks"]] == [0, 0]


def test_nothing_outside_the_run_is_touched(launch):
    assert list(launch["home"].iterdir()) == []
    noise = [line for line in launch["stdout"].splitlines() if line and "OVERFLOW! Skipping step" not in line]
    assert noise == []


def test_gradients_are_summed_in_float32_also_in_bf16_and_offloaded(ranks):
    for rank in ranks:
        # In bfloat16 the sum would stay at 1, and the norm at the number of ranks.
        assert list(rank["gradient_sums"].values()) == pytest.approx([len(ranks) * (1 + 8 * 2**-9)] * 6, rel=1e-6)


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


def test_what_fails_on_one_rank_the_others_hear_of(launch):
    said = "[Errno 2] No such file or directory: 'nowhere/x'"
    for number, rank in enumerate(launch["ranks"]):
        assert rank["exchange"]["on_rank_0"] == ("done" if number == 0 else None)
        expected = ["FileNotFoundError", said] if number == 0 else ["UserError", f"FileNotFoundError: {said}"]
        assert rank["exchange"]["failed_on_rank_0"] == expected


def test_checkpoints_are_agreed_on_by_all_ranks(launch):
    for rank in launch["ranks"]:
        store = rank["store"]
        assert store["saved"] == [True, True, True]
        assert store["full"] is False and store["tried"] == 2
        assert store["there"] == ["000002", "000003"]
        assert store["newest"] == "000003"
        assert store["files"] == ["rank-0.bin", "rank-1.bin"]
        assert store["newest_after_damage"] == "000002"


def config(stage, offload, path=None, precision="fp32", **changes):
    engine = EngineConfig(zero_stage=stage, offload=offload, micro_batch_size=2, deepspeed_json=path)
    return deepspeed_config(replace(OPTIM, **changes), engine, precision, World())


def brought(path, changes):
    """BROUGHT with some keys changed (dotted; None takes one out), as a file."""
    values = json.loads(json.dumps(BROUGHT))
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    path.write_text(json.dumps(values))
    return path


def test_deepspeed_json_adds_what_tunes_to_what_follows_from_ours(tmp_path):
    ours = config(3, "parameters")
    found = config(3, "parameters", brought(tmp_path / "brought.json", {}))
    zero = found["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_param"] == ours["zero_optimization"]["offload_param"]  # "auto" is what is there without it
    assert {key: zero[key] for key in ("stage", "reduce_bucket_size", "overlap_comm")} == {
        "stage": 3,
        "reduce_bucket_size": 123456,
        "overlap_comm": False,
    }
    assert "auto" not in json.dumps(found)
    assert found["steps_per_print"] == 50
    assert not {"optimizer", "scheduler", "fp16", "train_batch_size"} & set(found)
    assert {key: found[key] for key in ours if key != "zero_optimization"} == {
        key: ours[key] for key in ours if key != "zero_optimization"
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_batch_size": 64},
            'train_batch_size is 64, but engine.micro_batch_size is 2, which makes 2 here: set it to "auto" or 2',
        ),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu is 1, but engine.micro_batch_size is 2"),
        (
            {"gradient_accumulation_steps": 8},
            "gradient_accumulation_steps is 8, but how much makes up an update follows from grpo",
        ),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but optim.max_grad_norm is 0.1"),
        ({"bf16.enabled": True}, "bf16.enabled is true, but model.precision is fp32"),
        ({"fp16.enabled": True}, "fp16.enabled is true, but model.precision is fp32"),
        ({"bf16.bf16_master_weights_and_grads": True}, "are float32 at every model.precision: leave it out"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 'data_types.grad_accum_dtype is "bf16"'),
        ({"zero_optimization.stage": 2}, "zero_optimization.stage is 2, but engine.zero_stage is 3"),
        (
            {"zero_optimization.offload_param.device": "none"},
            'offload_param.device is "none", but engine.offload is parameters',
        ),
        ({"zero_optimization.offload_optimizer.device": "nvme"}, 'offload_optimizer.device is "nvme"'),
        ({"zero_optimization.cpu_offload": False}, "cpu_offload is false, but engine.offload is parameters"),
        ({"zero_force_ds_cpu_optimizer": True}, "the optimiser here is torch's AdamW"),
        (
            {"optimizer.type": "Lamb"},
            'optimizer.type is "Lamb", but the optimiser here is torch\'s AdamW: leave the section out',
        ),
        ({"optimizer.params.lr": 5e-5}, "optimizer.params.lr is 5e-05, but optim.lr is 0.001"),
        ({"optimizer.params.betas": [0.8, 0.999]}, "optim.betas is [0.9, 0.95]"),
        ({"optimizer.type": "Adam", "optimizer.params.adam_w_mode": False}, "optimizer.params.adam_w_mode is false"),
        ({"optimizer.params.freeze_step": 3}, "optimizer.params.freeze_step is 3, which has no counterpart in optim.*"),
        ({"scheduler.type": "WarmupDecayLR"}, 'scheduler.type is "WarmupDecayLR"'),
        ({"scheduler.params.warmup_num_steps": 100}, "scheduler.params.warmup_num_steps is 100, but optim.warmup_steps is 3"),
        ({"scheduler.params.warmup_type": "log"}, 'set it to "linear"'),
        ({"zero_optimization": True}, "zero_optimization is true; it is an object"),
    ],
)
def test_a_contradicting_deepspeed_json_names_both_sides(tmp_path, changes, message):
    path = brought(tmp_path / "brought.json", changes)
    with pytest.raises(ConfigError) as failure:
        config(3, "parameters", path)
    assert message in str(failure.value)
    assert str(path) in str(failure.value)


def test_deepspeed_json_may_repeat_what_ours_say(tmp_path):
    same = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "bf16.enabled": True,
        "optimizer.type": "Adam",
        "optimizer.params.betas": [0.9, 0.95],
        "optimizer.params.torch_adam": True,
        "optimizer.params.adam_w_mode": True,
        "scheduler.params.warmup_num_steps": 3,
        "scheduler.params.warmup_type": "linear",
        "zero_optimization.cpu_offload": None,
        "zero_optimization.offload_param": {"device": "none", "pin_memory": True},
    }
    found = config(3, "optimizer", brought(tmp_path / "brought.json", same), precision="bf16")
    assert found["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert "offload_param" not in found["zero_optimization"]


def test_an_unreadable_deepspeed_json_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.json cannot be read"):
        config(2, "none", tmp_path / "absent.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"list\.json holds a list"):
        config(2, "none", tmp_path / "list.json")


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


def test_a_partitioned_module_needs_zero_3():
    module = nn.Linear(2, 2)
    module.weight.ds_shape = module.weight.shape  # what DeepSpeed hangs on a parameter that it has split
    with pytest.raises(ValueError, match=r"engine\.kind=deepspeed with engine\.zero_stage=3"):
        LocalEngine(module, OPTIM)


TENSORS = {
    "large": torch.linspace(-3, 3, 3_000_001),  # more than is read at once
    "matrix": torch.arange(12.0).view(4, 3),
    "half": torch.tensor([[1.5, -2.25]], dtype=torch.float16),
    "brain": torch.tensor([0.1, 7.0], dtype=torch.bfloat16),
    "count": torch.tensor([[7, -1]]),
    "flag": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def test_a_reader_gives_every_tensor_of_a_file_or_folder(tmp_path):
    save_file(TENSORS, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"large": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")  # another variant
    for place in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        reader = CheckpointReader(place)
        assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
        for name, tensor in TENSORS.items():
            read = reader.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
            for dtype in (torch.float32, torch.bfloat16):
                out = torch.empty(tensor.shape, dtype=dtype)
                reader.read_into(name, out)
                assert torch.equal(out, tensor.to(dtype))
    with pytest.raises(WeightFilesError, match="has no tensor other"):
        reader.read("other")
    with pytest.raises(ValueError, match=r"matrix has shape \(4, 3\)"):
        reader.read_into("matrix", torch.empty(3, 4).t())


def test_a_reader_follows_the_index(tmp_path):
    save_file({"matrix": TENSORS["matrix"], "half": TENSORS["half"]}, tmp_path / "one.safetensors")
    save_file({"brain": TENSORS["brain"], "matrix": torch.zeros(1)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {"matrix": "one.safetensors", "half": "one.safetensors", "brain": "two.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    reader = CheckpointReader(tmp_path)
    assert set(reader.shapes) == set(places)
    assert torch.equal(reader.read("matrix"), TENSORS["matrix"])
    index.write_text(json.dumps({"weight_map": places | {"half": "two.safetensors"}}))
    with pytest.raises(WeightFilesError, match=r"the index promises half in two\.safetensors"):
        CheckpointReader(tmp_path)
    index.write_text(json.dumps({"weight_map": places | {"half": "three.safetensors"}}))
    with pytest.raises(WeightFilesError, match=r"names 3 files, of which 1 is not there: three\.safetensors"):
        CheckpointReader(tmp_path)
    index.write_text("[]")
    with pytest.raises(WeightFilesError, match="is not an index"):
        CheckpointReader(tmp_path)
    index.unlink()
    with pytest.raises(WeightFilesError, match=r"found one\.safetensors, two\.safetensors"):
        CheckpointReader(tmp_path)  # names that no library reads


def test_a_damaged_file_is_named_before_anything_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"matrix": TENSORS["matrix"]}, path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(WeightFilesError, match=r"model\.safetensors is no whole safetensors file"):
            CheckpointReader(tmp_path)
    path.unlink()
    with pytest.raises(WeightFilesError, match="found no weights"):
        CheckpointReader(tmp_path)


def test_fused_weights_stack_tensors_and_use_every_one(tmp_path):
    save_file({name: TENSORS[name] for name in ("matrix", "half", "count", "scalar")}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    fused = FusedWeights(reader, {"both": ["matrix", "matrix"], "scalar": ["scalar"]}, ignored=["half", "count"])
    assert fused.shapes == {"both": (8, 3), "scalar": ()}
    out = torch.empty(8, 3, dtype=torch.bfloat16)
    fused.read_into("both", out)
    assert torch.equal(out, torch.cat([TENSORS["matrix"]] * 2).bfloat16())
    with pytest.raises(WeightFilesError, match=r"1 are missing \(absent\), 3 are not in the model \(count, half, scalar\)"):
        FusedWeights(reader, {"both": ["matrix", "absent"]})
    with pytest.raises(
        WeightFilesError, match=r"both cannot be stacked along the first axis from matrix \(4, 3\), half \(1, 2\)"
    ):
        FusedWeights(reader, {"both": ["matrix", "half"]}, ignored=["count", "scalar"])


def test_parts_follow_a_mapping_and_must_be_complete():
    places = {"q": ("qkv", 0, 2), "k": ("qkv", 1, 2), "norm": ("norm", None, None)}
    assert fused_parts(["k", "norm", "q"], places.__getitem__) == {"qkv": ["q", "k"], "norm": ["norm"]}
    with pytest.raises(WeightFilesError, match="qkv is made of 2 tensors, but only k"):
        fused_parts(["k", "norm"], places.__getitem__)
    with pytest.raises(WeightFilesError, match="k2 and k both map to qkv, part 1"):
        fused_parts(["k", "k2"], (places | {"k2": ("qkv", 1, 2)}).__getitem__)
