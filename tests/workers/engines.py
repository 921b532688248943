"""Run by test_engines_distributed.py under torchrun: `engines.py RESULTS FOLDER [STATES]`.

Every check runs on all ranks; rank 0 writes what all of them measured to the JSON file RESULTS. STATES is the FOLDER of an
earlier run on another number of processes, whose saved states are to be loaded instead of this run's; two processes then do
nothing else.
"""

import ctypes
import errno
import gc
import hashlib
import json
import math
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fastvideo_grpo.checkpoints.store import CheckpointStore
from fastvideo_grpo.config.keys import EngineConfig, LoRAConfig, OptimConfig
from fastvideo_grpo.engines.base import MOMENTS
from fastvideo_grpo.engines.consolidate import weights_from_checkpoint
from fastvideo_grpo.engines.deepspeed import DeepSpeedEngine, import_deepspeed, partitioned_reference
from fastvideo_grpo.engines.local import LocalEngine
from fastvideo_grpo.engines.lora import add_lora
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.engines.sharded_loading import CheckpointReader, FusedWeights, load_partitioned
from fastvideo_grpo.engines.shards import SavedTensors, read_engine_json
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.trainers.not_finite import check_weights

torch.set_num_threads(1)
# Precision, stage, offload, and how the module comes: plain, with activation checkpointing, or loaded in partitions.
CONFIGURATIONS = [
    "fp32-0-none-plain",
    "fp32-1-none-plain",
    "fp32-2-none-plain",
    "fp32-3-none-plain",
    "bf16-0-none-plain",
    "bf16-2-none-plain",
    "bf16-3-none-plain",
    "fp32-1-optimizer-plain",
    "fp32-2-optimizer-plain",
    "fp32-3-optimizer-plain",
    "fp32-3-parameters-plain",
    "bf16-1-optimizer-plain",
    "bf16-2-optimizer-plain",
    "bf16-3-parameters-plain",
    "fp32-2-none-checkpointed",
    "fp32-3-none-checkpointed",
    "bf16-3-none-checkpointed",
    "fp32-3-none-partitioned",
    "bf16-3-parameters-partitioned",
]
# Saved by the first, loaded by the second: other stages, offloads and precisions.
MOVES = [
    ("fp32-3-none-plain", "fp32-2-optimizer-plain"),
    ("fp32-2-none-plain", "fp32-3-none-partitioned"),
    ("fp32-0-none-plain", "bf16-3-parameters-plain"),
    ("bf16-3-parameters-partitioned", "bf16-0-none-plain"),
    ("bf16-2-optimizer-plain", "fp32-0-none-plain"),
]
NETWORK = "network.safetensors"
# A file as transformers' users have it: "auto" where their trainer fills in, and tuning.
BROUGHT = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.1,
    "steps_per_print": 50,
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": "auto", "eps": 1e-8, "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": "auto"},
        "overlap_comm": False,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": 123456,
        "stage3_prefetch_bucket_size": 23456,
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "wall_clock_breakdown": False,
}
OPTIM = OptimConfig(lr=1e-3, betas=[0.9, 0.95], weight_decay=0.01, max_grad_norm=0.1, warmup_steps=3, ema_decay=0.75)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Network(nn.Module):
    """A frozen layer (as under LoRA), one that no loss reaches, and a float32 buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 33), nn.Tanh(), nn.Linear(33, 5))
        self.layers[2].requires_grad_(False)
        self.unreached = nn.Linear(3, 2)
        self.register_buffer("frequencies", torch.randn(3))

    def forward(self, x):
        return self.layers(x)


def update(engine, calls, seed, rank=0, size=1, poison=None):
    """One update over `calls` micro-batches dealt over ranks; `poison` names the one whose loss is NaN."""
    data = torch.randn(calls, 4, 7, generator=torch.Generator().manual_seed(seed)).to(DTYPES[engine.precision])
    engine.accumulate(calls // size)
    for index in range(rank, calls, size):
        loss = engine.module(data[index]).float().square().mean() / calls
        engine.backward(loss * float("nan") if index == poison else loss)
    return engine.step()


def largest_difference(left, right):
    return max(float((left[name] - right[name]).abs().max()) for name in right)


def same(left, right):
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in right)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def whole_state(folder):
    """Weights, moments and EMA of a saved folder, whole."""
    description = read_engine_json(folder)
    names, world_size = description["parameters"], description["world_size"]
    keys = {
        "weights": list(names),
        "ema": list(names),
        "optimizer": [f"{moment}.{name}" for moment in MOMENTS for name in names],
    }
    state = {}
    for part, entries in keys.items():
        saved = SavedTensors(folder, part, world_size)
        for key in entries:
            state[f"{part}/{key}"] = saved.read(
                key, 0, math.prod(names[key.removeprefix("exp_avg.").removeprefix("exp_avg_sq.")])
            )
    return state


def make_engine(world, folder, name):
    precision, stage, offload, form = name.split("-")
    config = EngineConfig(zero_stage=int(stage), offload=offload, micro_batch_size=4)
    if form == "partitioned":
        with torch.device("meta"):
            module = Network()
        load_partitioned(module, lambda: CheckpointReader(folder / NETWORK), OPTIM, config, precision=precision, world=world)
    else:
        module = Network()
    if form == "checkpointed":
        for index in (0, 2):
            module.layers[index] = checkpoint_wrapper(module.layers[index])
    return DeepSpeedEngine(module, OPTIM, config, precision=precision, world=world)


def refused(call):
    try:
        call()
    except RuntimeError as error:
        return "EMA weights" in str(error)
    return False


def check_engine(world, root, name):
    precision = name.split("-")[0]
    folder = root / name
    per_rank = world.size // 2  # numbers of calls that the ranks can share

    def make():
        return make_engine(world, root, name)

    dealt = {"rank": world.rank, "size": world.size}
    found = {}
    reference, engine = LocalEngine(Network(), OPTIM, precision=precision), make()
    found["stage"] = engine.zero_stage
    found["buffer_dtype"] = str(dict(engine.module.named_buffers())["module.frequencies"].dtype)
    found["buffer_kept"] = torch.equal(dict(engine.module.named_buffers())["module.frequencies"], Network().frequencies)
    found["norms"] = []
    for seed, calls in enumerate((2, 6, 4)):
        calls *= per_rank
        found["norms"].append((update(reference, calls, seed), update(engine, calls, seed, **dealt)))
    found["weights"] = largest_difference(engine.state_dict(), reference.state_dict())

    before = engine.state_dict()
    found["poisoned_norm"] = update(engine, 4, 7, poison=1, **dealt)
    found["poisoned_unchanged"] = same(engine.state_dict(), before)
    found["skipped"] = [engine.skipped_updates, engine.updates, engine.step_calls]
    update(reference, 4, 7, poison=1)
    update(reference, 2 * per_rank, 8)
    update(engine, 2 * per_rank, 8, **dealt)
    found["weights_after_skip"] = largest_difference(engine.state_dict(), reference.state_dict())

    x = torch.ones(1, 7, dtype=DTYPES[precision])
    with torch.no_grad():
        plain = engine.module(x)
        with engine.averaged_weights("ema"):
            averaged = engine.module(x)
            found["refused_inside_ema"] = refused(engine.state_dict) and refused(lambda: engine.save(folder))
        with reference.averaged_weights("ema"):
            expected = reference.module(x)
        found["ema_output"] = float((averaged - expected).abs().max())
        found["ema_differs"] = not torch.equal(averaged, plain)
        found["ema_restored"] = torch.equal(engine.module(x), plain)

    if world.rank == 0:
        for part in ("saved", "single", "continued", "resumed", "local", "from local"):
            (folder / part).mkdir(parents=True)
    world.barrier()
    engine.save(folder / "saved")
    world.barrier()
    found["consolidated"] = same(weights_from_checkpoint(folder / "saved"), engine.state_dict())
    found["consolidated_ema"] = largest_difference(
        weights_from_checkpoint(folder / "saved", "ema"),
        {
            name: reference.averages["ema"].piece(name).view(reference.state_dict()[name].shape)
            for name in reference.trainable_names
        },
    )
    single = LocalEngine(Network(), OPTIM, precision=precision)
    single.load(folder / "saved")
    if world.rank == 0:
        single.save(folder / "single")
    world.barrier()
    found["loaded_by_one_process"] = same(whole_state(folder / "single"), whole_state(folder / "saved"))
    resumed = make()
    update(resumed, 2 * per_rank, 99, **dealt)  # a state of its own, which loading must replace
    resumed.load(folder / "saved")
    for one, part in ((engine, "continued"), (resumed, "resumed")):
        update(one, 4, 9, **dealt)
        one.save(folder / part)
    update(single, 4, 9)
    found["one_process_after_load"] = largest_difference(single.state_dict(), engine.state_dict())
    world.barrier()
    found["resumed_bitwise"] = hashes(folder / "continued") == hashes(folder / "resumed")
    found["files"] = list(hashes(folder / "continued"))
    if world.rank == 0:
        single.save(folder / "local")
    world.barrier()
    resumed.load(folder / "local")
    resumed.save(folder / "from local")
    world.barrier()
    found["loads_from_one_process"] = same(whole_state(folder / "from local"), whole_state(folder / "local"))
    return found


def check_move(world, source, root, name, target):
    """Load a state of another engine, ZeRO stage, precision or world size; save it again, and go on from it."""
    precision = target.split("-")[0]
    folder = root / f"{name} to {target}"
    engine = make_engine(world, root, target)
    update(engine, world.size, 99, rank=world.rank, size=world.size)  # a state of its own, which loading must replace
    engine.load(source)
    if world.rank == 0:
        folder.mkdir()
    world.barrier()
    engine.save(folder)
    world.barrier()
    counters = [{key: read_engine_json(f)[key] for key in ("step_calls", "updates", "averages")} for f in (source, folder)]
    found = {"bitwise": same(whole_state(folder), whole_state(source)) and counters[0] == counters[1]}
    single = LocalEngine(Network(), OPTIM, precision=precision)
    single.load(source)
    update(single, 4, 9)
    update(engine, 4, 9, rank=world.rank, size=world.size)
    found["continues"] = largest_difference(engine.state_dict(), single.state_dict())
    with torch.no_grad(), engine.averaged_weights("ema"), single.averaged_weights("ema"):
        x = torch.ones(1, 7, dtype=DTYPES[precision])
        found["ema_continues"] = float((engine.module(x) - single.module(x)).abs().max())
    return found


def check_gradient_precision(world, stage, offload):
    """The sum over backward passes in bf16, of addends that bfloat16 would lose: 1 + 8 * 2^-9 on each rank."""
    config = EngineConfig(zero_stage=stage, offload=offload, micro_batch_size=1)
    optim = replace(OPTIM, max_grad_norm=None)
    module = nn.Linear(8, 8, bias=False)
    engine = DeepSpeedEngine(module, optim, config, precision="bf16", world=world)
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    engine.accumulate(9)
    for factor in [1.0] + [2.0**-9] * 8:
        engine.backward(engine.module(x).float().sum() * factor)
    return float(engine.step()) / 8


class Tower(nn.Module):
    """About 100 MB with no layer above 4 MB; half of its layers are three tensors in the checkpoint."""

    def __init__(self, precision):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(512, 1536) for _ in range(16 if precision == "fp32" else 32))
        self.mlp = nn.ModuleList(nn.Linear(1024, 1023) for _ in range(12 if precision == "fp32" else 24))
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("table", torch.arange(5.0), persistent=False)

    def forward(self, x):
        for qkv in self.qkv:
            query, key, value = qkv(x).chunk(3, dim=-1)
            x = (query + key * value).tanh()
        x = torch.cat([x, x], dim=-1)
        for mlp in self.mlp:
            x = nn.functional.pad(mlp(x).tanh(), (0, 1))
        return x + self.offset + self.table.sum()


def tower_parts(precision):
    with torch.device("meta"):
        names = list(Tower(precision).state_dict())
    return {
        name: [name.replace("qkv", part) for part in ("q", "k", "v")] if name.startswith("qkv") else [name] for name in names
    }


def write_tower(folder, precision):
    """The checkpoint of a Tower as diffusers would have it: q, k and v apart, two files and an index."""
    torch.manual_seed(1)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Tower(precision).state_dict().items()}
    tensors = {}
    for name, keys in tower_parts(precision).items():
        whole = (torch.rand(shapes[name]) - 0.5) / 32
        tensors |= dict(zip(keys, whole.chunk(len(keys)) if len(keys) > 1 else [whole], strict=True))
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    keys = list(tensors)
    files = {"part-1.safetensors": keys[::2], "part-2.safetensors": keys[1::2]}
    for file, inside in files.items():
        save_file({key: tensors[key] for key in inside}, folder / file)
    index = {"weight_map": {key: file for file, inside in files.items() for key in inside}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


class PeakMemory:
    """Growth of this process's own memory (mapped files do not count) at its highest, in bytes."""

    def __enter__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed but not given back would hide growth
        self.start = self.peak = self.now()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stopped.set()
        self.thread.join()
        self.growth = max(self.peak, self.now()) - self.start

    def watch(self):
        while not self.stopped.is_set():
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)

    @staticmethod
    def now():
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def check_memory(world, folder, precision):
    """Loading a Tower in partitions, and calling it as a frozen reference."""
    config = EngineConfig(zero_stage=3, offload="none", micro_batch_size=4, deepspeed_json=folder / "small.json")
    if world.rank == 0:
        folder.mkdir()
        write_tower(folder, precision)
        # DeepSpeed's own limits are larger than the Tower: all of it would count as a layer in flight.
        small = {"stage3_prefetch_bucket_size": 1_000_000, "stage3_max_live_parameters": 4_000_000}
        config.deepspeed_json.write_text(json.dumps({"zero_optimization": small}))
    world.barrier()
    table = torch.arange(5.0)
    with torch.device("meta"):
        module = Tower(precision)

    def weights():
        return FusedWeights(CheckpointReader(folder), tower_parts(precision))

    with PeakMemory() as loading:
        load_partitioned(module, weights, OPTIM, config, precision=precision, world=world, buffers={"table": table})
    sizes = [parameter.ds_numel * parameter.dtype.itemsize for parameter in module.parameters()]
    found = {"whole": sum(sizes), "largest": max(sizes), "loading": loading.growth}

    reference = partitioned_reference(module, OPTIM, config, precision=precision, world=world)
    live = []
    for layer in [*module.qkv, *module.mlp]:
        layer.register_forward_hook(lambda *_: live.append(sum(p.numel() * p.dtype.itemsize for p in module.parameters())))
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(world.rank)).to(DTYPES[precision])
    with torch.no_grad():
        outputs = [reference(x) for _ in range(3)]  # the first call is traced, later ones prefetch
    found["live"] = max(live)

    with PeakMemory() as ordinary:
        reader = CheckpointReader(folder)
        state = {}
        for name, keys in tower_parts(precision).items():
            whole = torch.cat([reader.read(key) for key in keys]) if len(keys) > 1 else reader.read(*keys)
            state[name] = whole.to(torch.float32 if name == "offset" else DTYPES[precision])
    found["ordinary"] = ordinary.growth
    with torch.device("meta"):
        plain = Tower(precision)
    plain.load_state_dict(state, assign=True)
    plain.table = table
    with torch.no_grad():
        expected = plain(x)
    found["output"] = max(float((output - expected).abs().max()) for output in outputs)
    return found


def check_adapters(world, folder):
    """LoRA on a partitioned base, beside a partitioned reference, against one process."""
    config = EngineConfig(zero_stage=3, offload="none", micro_batch_size=4)
    lora = LoRAConfig(rank=2, alpha=4, targets=["layers.0", "layers.2"])

    def partitioned():
        with torch.device("meta"):
            module = Network()
        return load_partitioned(
            module, lambda: CheckpointReader(folder / NETWORK), OPTIM, config, precision="fp32", world=world
        )

    plain, module = Network(), partitioned()
    found = {"names": add_lora(plain, lora, 5) == add_lora(module, lora, 5)}
    single = LocalEngine(plain, OPTIM)
    engine = DeepSpeedEngine(module, OPTIM, config, precision="fp32", world=world)
    reference = partitioned_reference(partitioned(), OPTIM, config, precision="fp32", world=world)
    x = torch.linspace(-1, 1, 14).view(2, 7)
    for seed in range(3):
        found["norm"] = [update(single, 4, seed), update(engine, 4, seed, rank=world.rank, size=world.size)]
        with torch.no_grad():
            found["reference"] = float((reference(x) - Network()(x)).abs().max())
    with torch.no_grad():
        found["moved"] = float((engine.module(x) - reference(x)).abs().max())
        found["output"] = float((engine.module(x) - single.module(x)).abs().max())
    found["trained"] = engine.trainable_names == single.trainable_names == [n for n in engine.trainable_names if "lora_" in n]
    found["weights"] = largest_difference(engine.state_dict(), single.state_dict())
    if world.rank == 0:
        (folder / "adapters").mkdir()
    world.barrier()
    engine.save(folder / "adapters")
    world.barrier()
    single.load(folder / "adapters")
    found["saved"] = same(single.state_dict(), engine.state_dict())
    return found


def check_finite_weights(world, folder):
    """Whether weights in partitions pass, with NaN behind the parameters' ends, and with infinity in one on the last rank."""
    with torch.device("meta"):
        module = Network()
    config = EngineConfig(zero_stage=3, offload="none", micro_batch_size=4)
    load_partitioned(module, lambda: CheckpointReader(folder / NETWORK), OPTIM, config, precision="fp32", world=world)

    def passes():
        try:
            check_weights({"transformer": module}, folder, world)
        except UserError:
            return False
        return True

    behind = 0
    for parameter in module.parameters():
        held = max(0, parameter.ds_numel - world.rank * len(parameter.ds_tensor))
        behind += max(0, len(parameter.ds_tensor) - held)
        parameter.ds_tensor[held:] = torch.nan
    found = {"behind": world.all_gather_object(behind)[-1], "padding": passes()}
    if world.rank == world.size - 1:
        module.layers[2].weight.ds_tensor[0] = torch.inf
    return {**found, "damaged": passes()}


def check_refusals(world, folder):
    """What load_partitioned says on this rank."""
    config = EngineConfig(zero_stage=3, offload="none", micro_batch_size=4)

    class Buffered(Network):
        def __init__(self):
            super().__init__()
            self.register_buffer("unsaved", torch.zeros(2), persistent=False)

    class Other(Network):
        def __init__(self):
            super().__init__()
            self.unreached = nn.Linear(3, 4)

    class Fewer(Network):
        def __init__(self):
            super().__init__()
            del self.unreached

    class More(Network):
        def __init__(self):
            super().__init__()
            self.late = nn.Linear(1, 1)

    class Failing(CheckpointReader):
        def read_into(self, name, out):
            if name == "layers.2.weight":
                raise OSError(errno.EIO, "the disk is gone")
            super().read_into(name, out)

    def message(make, source=CheckpointReader, **changes):
        with torch.device("meta"):
            module = make()
        try:
            load_partitioned(
                module,
                lambda: source(folder / NETWORK),
                OPTIM,
                replace(config, **changes),
                precision="fp32",
                world=world,
            )
        except (UserError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    def engine_message(stage, precision):
        with torch.device("meta"):
            module = Network()
        load_partitioned(module, lambda: CheckpointReader(folder / NETWORK), OPTIM, config, precision="fp32", world=world)
        try:
            DeepSpeedEngine(module, OPTIM, replace(config, zero_stage=stage), precision=precision, world=world)
        except ValueError as error:
            return str(error)
        return "no error"

    return {
        "wrapped_as_stage_2": engine_message(2, "fp32"),
        "wrapped_as_bf16": engine_message(3, "bf16"),
        "buffer": message(Buffered),
        "shape": message(Other),
        "extra": message(Fewer),
        "missing": message(More),
        "absent": message(Network, lambda path: CheckpointReader(path.with_name("absent.safetensors"))),
        "failing": message(Network, Failing),
        "stage": message(Network, zero_stage=2),
    }


def check_json(world, folder):
    """A DeepSpeed configuration as people bring it reaches DeepSpeed where it tunes."""
    path = folder / "deepspeed.json"
    if world.rank == 0:
        path.write_text(json.dumps(BROUGHT))
    world.barrier()
    config = EngineConfig(zero_stage=3, offload="parameters", micro_batch_size=4, deepspeed_json=path)
    engine = DeepSpeedEngine(Network(), OPTIM, config, precision="bf16", world=world)
    single = LocalEngine(Network(), OPTIM, precision="bf16")
    norms = [update(single, 4, 1), update(engine, 4, 1, rank=world.rank, size=world.size)]
    zero = engine.module._config.zero_config
    return {
        "norms": norms,
        "weights": largest_difference(engine.state_dict(), single.state_dict()),
        "reduce_bucket_size": engine.module.optimizer.reduce_bucket_size,
        "prefetch_bucket_size": int(zero.prefetch_bucket_size),
        "sub_group_size": int(engine.module.optimizer.sub_group_size),
        "pin_memory": zero.offload_optimizer.pin_memory,
        "steps_per_print": engine.module.steps_per_print(),
    }


def check_exchange(world):
    rows = {
        ("latent", 0): torch.arange(6.0).view(2, 3).t(),
        ("latent", 1): torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        ("flag", 0): torch.tensor(True),
        ("empty", 1): torch.zeros(0, 4),
        ("count", 1): torch.tensor([[7]], dtype=torch.int64),
    }
    owner = {key: key[1] for key in rows}
    keys = list(rows)
    wanted = [[keys[4], keys[1], keys[0], keys[3]], [keys[2], keys[0], keys[1], keys[0]]]
    mine = {key: row for key, row in rows.items() if owner[key] == world.rank}
    got = world.exchange(mine, wanted, owner)
    found = {
        "rows": list(got) == list(dict.fromkeys(wanted[world.rank])) and all(torch.equal(got[key], rows[key]) for key in got),
        "dtypes": all(got[key].dtype == rows[key].dtype for key in got),
    }
    try:
        world.exchange({} if world.rank == 1 else mine, wanted, owner)
        found["missing"] = "no error"
    except ValueError as error:
        found["missing"] = str(error)
    gathered = world.all_gather_rows(torch.tensor([[world.rank, 0.1]], dtype=torch.bfloat16))
    found["gathered"] = gathered.float().tolist()
    found["sum"] = world.all_reduce_sum(torch.tensor([0.1, float(world.rank)], dtype=torch.float64)).tolist()
    found["all_true"] = [world.all_true(True), world.all_true(world.rank == 0)]
    found["broadcast"] = world.broadcast_object({"from": world.rank}, source=1)
    found["on_rank_0"] = world.on_rank_0(lambda: "done")
    try:
        world.on_rank_0((Path("nowhere") / "x").read_bytes)
    except Exception as error:
        found["failed_on_rank_0"] = type(error).__name__, str(error)
    return found


def check_store(world, folder):
    store, calls = CheckpointStore(folder, 3, world), []

    def write(target):
        (target / f"rank-{world.rank}.bin").write_bytes(bytes([world.rank]) * 1000)
        return {"note": "kept"} if world.rank == 0 else {}

    def full_on_one_rank(target):
        write(target)
        calls.append(target)
        if world.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return {}

    found = {"saved": [store.save(iteration, write) for iteration in (1, 2, 3)]}
    found["full"] = store.save(4, full_on_one_rank)  # again without the first one, which the fourth would have replaced
    found["tried"] = len(calls)
    found["there"] = sorted(entry.name for entry in folder.iterdir())
    found["newest"] = store.newest().name
    found["files"] = sorted(store.load_trainer_json(store.newest())["checksums"])
    world.barrier()
    if world.rank == 0:
        (folder / "000003" / "rank-1.bin").write_bytes(b"damaged")
    world.barrier()
    found["newest_after_damage"] = store.newest().name
    return found


def main():
    results, folder = Path(sys.argv[1]), Path(sys.argv[2])
    states = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    world = World.current(device="cpu")
    if world.rank == 0:
        folder.mkdir()
        save_file(Network().state_dict(), folder / NETWORK)
    world.barrier()
    import_deepspeed(world)  # once, so that no measurement of memory holds it
    found = {}
    if states is None:
        found |= {"exchange": check_exchange(world), "store": check_store(world, folder / "store")}
        found |= {"refusals": check_refusals(world, folder), "json": check_json(world, folder)}
    if states is None or world.size > 2:
        found["memory"] = {precision: check_memory(world, folder / f"tower-{precision}", precision) for precision in DTYPES}
        found["adapters"] = check_adapters(world, folder)
        found["finite"] = check_finite_weights(world, folder)
        found["gradient_sums"] = {
            f"{stage}, {offload}": check_gradient_precision(world, stage, offload)
            for stage in (1, 2, 3)
            for offload in ("none", "optimizer")
        }
        found |= {name: check_engine(world, folder, name) for name in CONFIGURATIONS}
    for source, target in MOVES:
        found[f"{source} > {target}"] = check_move(world, (states or folder) / source / "saved", folder, source, target)
    every = world.all_gather_object(found)
    if world.rank == 0:
        results.write_text(json.dumps(every))


if __name__ == "__main__":
    main()
