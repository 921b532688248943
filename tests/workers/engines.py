"""Run by test_engines_distributed.py on two processes; writes what it measured to the JSON file named on the command
line.

Every check runs on both ranks; rank 0 writes, and what a rank finds wrong is gathered first.
"""

import errno
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from fastvideo_grpo.checkpoints.store import CheckpointStore
from fastvideo_grpo.engines.consolidate import weights_from_checkpoint
from fastvideo_grpo.engines.deepspeed import DeepSpeedEngine
from fastvideo_grpo.engines.local import LocalEngine
from fastvideo_grpo.engines.parallel import World

torch.set_num_threads(1)
CONFIGURATIONS = [
    ("fp32", 0, "none"),
    ("fp32", 1, "none"),
    ("fp32", 2, "none"),
    ("fp32", 3, "none"),
    ("bf16", 0, "none"),
    ("bf16", 2, "none"),
    ("bf16", 3, "none"),
    ("fp32", 2, "optimizer"),
    ("fp32", 3, "parameters"),
]
OPTIM = SimpleNamespace(lr=1e-3, betas=[0.9, 0.95], weight_decay=0.01, max_grad_norm=0.1, warmup_steps=3, ema_decay=0.75)
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


def check_engine(world, folder, precision, stage, offload):
    config = SimpleNamespace(zero_stage=stage, offload=offload, micro_batch_size=4)

    def make():
        return DeepSpeedEngine(Network(), OPTIM, config, precision=precision, world=world)

    dealt = {"rank": world.rank, "size": world.size}
    found = {}
    reference, engine = LocalEngine(Network(), OPTIM, precision=precision), make()
    found["stage"] = engine.zero_stage
    found["buffer_dtype"] = str(dict(engine.module.named_buffers())["module.frequencies"].dtype)
    found["norms"] = []
    for seed, calls in enumerate((2, 6, 4)):
        found["norms"].append((update(reference, calls, seed), update(engine, calls, seed, **dealt)))
    found["weights"] = largest_difference(engine.state_dict(), reference.state_dict())

    before = engine.state_dict()
    found["poisoned_norm"] = update(engine, 4, 7, poison=1, **dealt)
    found["poisoned_unchanged"] = same(engine.state_dict(), before)
    found["skipped"] = [engine.skipped_updates, engine.updates, engine.step_calls]
    update(reference, 4, 7, poison=1)
    update(reference, 2, 8)
    update(engine, 2, 8, **dealt)
    found["weights_after_skip"] = largest_difference(engine.state_dict(), reference.state_dict())

    x = torch.ones(1, 7, dtype=DTYPES[precision])
    with torch.no_grad():
        plain = engine.module(x)
        with engine.ema_weights():
            averaged = engine.module(x)
        with reference.ema_weights():
            expected = reference.module(x)
        found["ema_output"] = float((averaged - expected).abs().max())
        found["ema_differs"] = not torch.equal(averaged, plain)
        found["ema_restored"] = torch.equal(engine.module(x), plain)

    if world.rank == 0:
        for name in ("saved", "continued", "resumed", "local"):
            (folder / name).mkdir(parents=True)
    world.barrier()
    engine.save(folder / "saved")
    world.barrier()
    found["consolidated"] = same(weights_from_checkpoint(folder / "saved"), engine.state_dict())
    found["consolidated_ema"] = largest_difference(
        weights_from_checkpoint(folder / "saved", "ema"),
        {name: reference.ema.piece(name).view(reference.state_dict()[name].shape) for name in reference.trainable_names},
    )
    single = LocalEngine(Network(), OPTIM, precision=precision)
    single.load(folder / "saved")
    found["loaded_by_one_process"] = same(single.state_dict(), engine.state_dict())
    resumed = make()
    update(resumed, 2, 99, **dealt)  # a state of its own, which loading must replace
    resumed.load(folder / "saved")
    for one, name in ((engine, "continued"), (resumed, "resumed")):
        update(one, 4, 9, **dealt)
        one.save(folder / name)
    update(single, 4, 9)
    found["one_process_after_load"] = largest_difference(single.state_dict(), engine.state_dict())
    world.barrier()
    found["resumed_bitwise"] = hashes(folder / "continued") == hashes(folder / "resumed")
    found["files"] = list(hashes(folder / "continued"))
    if world.rank == 0:
        single.save(folder / "local")
    world.barrier()
    resumed.load(folder / "local")
    found["loads_from_one_process"] = same(resumed.state_dict(), weights_from_checkpoint(folder / "local"))
    return found


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
    return found


def check_store(world, folder):
    store = CheckpointStore(folder, 2, world)

    def write(target):
        (target / f"rank-{world.rank}.bin").write_bytes(bytes([world.rank]) * 1000)
        return {"note": "kept"} if world.rank == 0 else {}

    def full_on_one_rank(target):
        write(target)
        if world.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return {}

    found = {"saved": [store.save(iteration, write) for iteration in (1, 2, 3)]}
    found["full"] = store.save(4, full_on_one_rank)
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
    world = World.current(device="cpu")
    found = {"exchange": check_exchange(world), "store": check_store(world, folder / "store")}
    for precision, stage, offload in CONFIGURATIONS:
        name = f"{precision}-{stage}-{offload}"
        found[name] = check_engine(world, folder / name, precision, stage, offload)
    every = world.all_gather_object(found)
    if world.rank == 0:
        results.write_text(json.dumps(every))


if __name__ == "__main__":
    main()
