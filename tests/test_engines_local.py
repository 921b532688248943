"""LocalEngine: the reference all other engines are compared with, so it is compared with plain torch."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastvideo_grpo.config.keys import OptimConfig
from fastvideo_grpo.engines.consolidate import weights_from_checkpoint
from fastvideo_grpo.engines.local import LocalEngine
from fastvideo_grpo.engines.shards import EngineStateError

torch.set_num_threads(1)


def optim(**changes):
    plain = OptimConfig(lr=1e-2, betas=[0.9, 0.99], weight_decay=0.1, max_grad_norm=None)
    return replace(plain, **changes)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(seed, dtype=torch.float32):
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def update(engine, seeds, factor=1.0):
    engine.accumulate(len(seeds))
    dtype = next(engine.module.parameters()).dtype
    for seed in seeds:
        engine.backward(factor * engine.module(batch(seed, dtype)).float().square().mean())
    return engine.step()


def bits(engine):
    return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in right)


def test_equals_plain_adamw_with_clipping_and_warm_up():
    engine = LocalEngine(network(), optim(max_grad_norm=0.05, warmup_steps=3))
    plain = network()
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, foreach=False)
    for number, seeds in enumerate(([1], [2, 3, 4], [5, 6], [7])):
        assert engine.lr == pytest.approx(1e-2 * min(1, (number + 1) / 3))
        norm = update(engine, seeds)
        for group in adam.param_groups:
            group["lr"] = 1e-2 * min(1, (number + 1) / 3)
        for seed in seeds:
            plain(batch(seed)).square().mean().backward()
        assert norm == float(nn.utils.clip_grad_norm_(plain.parameters(), 0.05, foreach=False))
        assert norm > 0.05
        adam.step()
        adam.zero_grad()
    assert same(bits(engine), dict(plain.named_parameters()))


def test_bf16_updates_below_its_resolution_add_up():
    torch.manual_seed(0)
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    engine = LocalEngine(module, optim(lr=1e-5, weight_decay=0.0), precision="bf16")
    for _ in range(500):
        engine.accumulate(1)
        engine.backward(engine.module(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
        engine.step()
    # bf16 next to 1 is 0.004 coarse: a single step of 1e-5 would be lost every time.
    assert float(engine.state_dict()["weight"]) == pytest.approx(1 - 500e-5, abs=1e-5)
    assert float(module.weight.detach()) == pytest.approx(0.995, abs=0.004)
    assert module.weight.dtype == torch.bfloat16


def test_bf16_casts_parameters_but_not_buffers():
    module = network()
    module.register_buffer("frequencies", torch.randn(3))
    LocalEngine(module, optim(), precision="bf16")
    assert module.frequencies.dtype == torch.float32
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_save_and_load_are_bitwise(tmp_path, precision):
    settings = optim(max_grad_norm=0.1, warmup_steps=5, ema_decay=0.9)
    engine = LocalEngine(network(), settings, precision=precision)
    for seed in range(3):
        update(engine, [seed])
    engine.save(tmp_path)
    resumed = LocalEngine(network(seed=1), settings, precision=precision)
    update(resumed, [8])  # a state of its own, which loading must replace
    resumed.load(tmp_path)
    for seed in range(3, 6):
        assert update(engine, [seed]) == update(resumed, [seed])
    assert same(bits(engine), bits(resumed))
    assert same(engine.state_dict(), resumed.state_dict())
    assert (engine.lr, engine.updates, engine.step_calls) == (resumed.lr, resumed.updates, resumed.step_calls)
    for name in engine.trainable_names:
        assert torch.equal(engine.averages["ema"].piece(name), resumed.averages["ema"].piece(name))


def test_a_state_from_before_the_first_update_loads(tmp_path):
    engine = LocalEngine(network(), optim())
    engine.save(tmp_path)
    resumed = LocalEngine(network(seed=1), optim())
    update(resumed, [8])
    resumed.load(tmp_path)
    for one in (engine, resumed):
        update(one, [1])
    assert same(bits(engine), bits(resumed))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_update(bad):
    settings = optim(max_grad_norm=1.0, warmup_steps=4, ema_decay=0.5)
    engine, other = LocalEngine(network(), settings), LocalEngine(network(), settings)
    for one in (engine, other):
        update(one, [1])
    before = bits(engine)
    averages = {name: engine.averages["ema"].piece(name).clone() for name in engine.trainable_names}
    assert update(engine, [2], factor=bad) == math.inf
    assert same(bits(engine), before)
    assert all(torch.equal(engine.averages["ema"].piece(name), averages[name]) for name in averages)
    assert (engine.skipped_updates, engine.updates, engine.step_calls) == (1, 1, 2)
    # The warm-up counts the call; moments and the next gradient know nothing of it.
    other.step_calls += 1
    for one in (engine, other):
        update(one, [3])
    assert same(bits(engine), bits(other))


def test_ema_has_its_closed_form_and_leaves_the_weights_bitwise():
    engine = LocalEngine(network(), optim(ema_decay=0.8))
    history = [engine.state_dict()]
    for seed in range(4):
        update(engine, [seed])
        history.append(engine.state_dict())
    before = bits(engine)
    with engine.averaged_weights("ema"):
        inside = bits(engine)
        with pytest.raises(RuntimeError, match="EMA weights"):
            update(engine, [9])
    assert same(bits(engine), before)
    for name, average in inside.items():
        expected = 0.8**4 * history[0][name].double()
        for age, weights in enumerate(reversed(history[1:])):
            expected += 0.2 * 0.8**age * weights[name].double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7)


def test_ema_weights_leave_after_an_error():
    engine = LocalEngine(network(), optim(ema_decay=0.8))
    update(engine, [1])
    before = bits(engine)
    with pytest.raises(KeyError), engine.averaged_weights("ema"):
        raise KeyError("from an evaluation")
    assert same(bits(engine), before)
    update(engine, [2])


def test_frozen_parameters_are_neither_changed_nor_saved(tmp_path):
    module = network()
    module[0].requires_grad_(False)
    engine = LocalEngine(module, optim(ema_decay=0.5))
    before = bits(engine)
    update(engine, [1])
    after = bits(engine)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["2.weight"], before["2.weight"])
    engine.save(tmp_path)
    assert set(weights_from_checkpoint(tmp_path)) == {"2.weight", "2.bias"}
    assert torch.equal(weights_from_checkpoint(tmp_path)["2.weight"], after["2.weight"])
    assert torch.equal(
        weights_from_checkpoint(tmp_path, "ema")["2.weight"],
        engine.averages["ema"].piece("2.weight").view(after["2.weight"].shape),
    )


def test_load_state_dict_sets_weights_and_keeps_the_moments():
    engine = LocalEngine(network(), optim(), precision="bf16")
    update(engine, [1])
    target = LocalEngine(network(seed=1), optim()).state_dict()
    engine.load_state_dict(target)
    assert same(engine.state_dict(), target)
    assert torch.equal(engine.module[0].weight, target["0.weight"].bfloat16())
    assert engine.updates == 1


def test_a_state_of_another_model_is_refused_by_name(tmp_path):
    LocalEngine(network(), optim()).save(tmp_path)
    other = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.raises(EngineStateError, match=r"2\.weight has shape \(3, 8\), the model's is \(2, 8\)"):
        LocalEngine(other, optim()).load(tmp_path)
    with pytest.raises(EngineStateError, match="1 are missing"):
        LocalEngine(nn.Sequential(*network(), nn.PReLU()), optim()).load(tmp_path)


def test_a_missing_or_cut_file_is_named(tmp_path):
    LocalEngine(network(), optim()).save(tmp_path)
    path = tmp_path / "weights-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(EngineStateError, match=r"weights-00000\.safetensors"):
        weights_from_checkpoint(tmp_path)
    with pytest.raises(EngineStateError, match="no EMA weights"):
        weights_from_checkpoint(tmp_path, "ema")
    with pytest.raises(EngineStateError, match=r"engine\.json"):
        weights_from_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="allowed: model, ema, old"):
        weights_from_checkpoint(tmp_path, "best")


def test_a_state_fits_with_and_without_activation_checkpointing(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    LocalEngine(network(), optim()).save(tmp_path)
    module = network(seed=1)
    module[0] = checkpoint_wrapper(module[0])
    engine = LocalEngine(module, optim())
    engine.load(tmp_path)
    assert same(engine.state_dict(), LocalEngine(network(), optim()).state_dict())


def test_calls_must_be_announced_and_made():
    engine = LocalEngine(network(), optim())
    with pytest.raises(ValueError, match=r"accumulate\(0\)"):
        engine.accumulate(0)
    with pytest.raises(RuntimeError, match="announce"):
        engine.backward(torch.zeros((), requires_grad=True))
    engine.accumulate(2)
    engine.backward(engine.module(batch(1)).mean())
    with pytest.raises(RuntimeError, match="1 announced calls missing"):
        engine.step()
    with pytest.raises(RuntimeError, match="middle of an update"):
        engine.save("nowhere")


def test_wrong_settings_name_their_key():
    with pytest.raises(ValueError, match=r"model\.precision is 'fp16'"):
        LocalEngine(network(), optim(), precision="fp16")
    with pytest.raises(ValueError, match=r"optim\.ema_decay is 1\.0"):
        LocalEngine(network(), optim(ema_decay=1.0))
    with pytest.raises(ValueError, match=r"optim\.lr is 0"):
        LocalEngine(network(), optim(lr=0))
    with pytest.raises(ValueError, match="no trainable parameter"):
        LocalEngine(network().requires_grad_(False), optim())
