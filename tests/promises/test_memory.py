"""What a run takes: activations as estimated before it starts, and idle components off the device."""

import re
from contextlib import contextmanager

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from fastvideo_grpo.engines.activation_checkpointing import find_blocks
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.models.networks import fastvideo_transformer
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.planning import memory
from tests.promises.models import GUIDANCE, MODELS, cases
from tests.trainer.memory import kept_for_backward

# Of sizes at which what is per token outweighs what is per sample.
LARGE = {"sample__height": 96, "sample__width": 96}


def counted_and_estimated(trainer, prompt):
    """Bytes that a forward of a micro-batch keeps for its backward pass, tensor by tensor, and what the estimate says."""
    config, batch = trainer.config, trainer.config.engine.micro_batch_size
    initial = trainer.pack(torch.randn(batch, *trainer.latent_shape()))
    conditioning = trainer.conditioning(prompt, batch)
    # The estimate counts all of prompts.text_length; an unpadded text is the prompt's own tokens.
    texts = [tensor for name, tensor in conditioning.items() if name.endswith("encoder_hidden_states")]
    config.prompts.text_length = max(tensor.shape[1] for tensor in texts)
    level = trainer.schedule.at(torch.zeros(batch, dtype=torch.long))
    counted = kept_for_backward(trainer, conditioning, initial, level)
    return counted, memory._kept_bytes(config, model_facts(config))


@pytest.mark.parametrize("model,case", cases(lambda model: GUIDANCE, lambda model, case: True))
def test_activations_are_those_that_the_estimate_counts(make_trainer, tmp_path, model, case):
    trainer = make_trainer(train=False, **model.run(**LARGE, **GUIDANCE[case]))
    counted, estimated = counted_and_estimated(trainer, model.prompt(tmp_path))
    assert estimated == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_activations_of_adapters_are_those_that_the_estimate_counts(make_trainer, tmp_path, model):
    """A frozen layer keeps no input for the gradient of its weight."""
    settings = model.run(**LARGE, **GUIDANCE["no guidance"])
    prompt = model.prompt(tmp_path)
    trainer = make_trainer(train=False, **settings, model__lora__rank=4, model__lora__alpha=8.0)
    counted, estimated = counted_and_estimated(trainer, prompt)
    assert estimated == pytest.approx(counted, rel=0.1)
    trainer.config.model.lora = None
    assert counted < 0.9 * memory._kept_bytes(trainer.config, model_facts(trainer.config))


RECOMPUTED = {"full": 1, "every:2": 2}


@pytest.mark.parametrize("model,asked", cases(lambda model: RECOMPUTED, lambda model, asked: True))
def test_blocks_are_recomputed_as_asked_and_save_what_the_estimate_counts(make_trainer, tmp_path, model, asked):
    """What it saves is estimated, not what is left: with all blocks of a tiny network recomputed, that is outside of them."""
    settings = {**LARGE, **GUIDANCE["no guidance"]}
    plain = make_trainer(train=False, **model.run(**settings))
    trainer = make_trainer(**model.run(**settings, engine__activation_checkpointing=asked))
    names = [name for name, _ in plain.denoiser.named_modules()]
    blocks = [[name for name in names if re.fullmatch(pattern, name)] for pattern in model.blocks]
    assert all(len(of_one_kind) >= 2 for of_one_kind in blocks)
    expected = {name for of_one_kind in blocks for name in of_one_kind[:: RECOMPUTED[asked]]}
    wrapped = {name for name, module in trainer.denoiser.named_modules() if isinstance(module, CheckpointWrapper)}
    assert wrapped == expected
    prompt = model.prompt(tmp_path)
    without, kept = counted_and_estimated(plain, prompt), counted_and_estimated(trainer, prompt)
    saved, estimated = (a - b for a, b in zip(without, kept, strict=True))
    assert estimated == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize("kind", [kind for kind, model in MODELS.items() if FAMILIES[kind].fastvideo_config])
def test_all_blocks_of_the_published_network_are_found(kind):
    """As many as the estimate counts, in FastVideo's network at its real size, which is what is loaded."""
    family = FAMILIES[kind]
    published = family.configs[family.denoiser]
    found = find_blocks(fastvideo_transformer(family.fastvideo_config, published), family.blocks, family.not_recomputed)
    counts = [published.get(key, 0) for key in ("num_layers", "num_single_layers", "num_refiner_layers")]
    assert [len(names) for names in found.values()] == [count for count in counts if count]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_is_idle_leaves_the_device(make_trainer, monkeypatch, model):
    """With ``engine.offload_idle`` each of them is on the device exactly while it is used."""
    inside, used = [], []

    @contextmanager
    def resident(movable, device):
        inside.append(type(movable).__name__)
        yield
        inside.pop()

    for module in ("rewards.placement.inline", "trainers.policy"):
        monkeypatch.setattr(f"fastvideo_grpo.{module}.resident", resident)
    moved = []
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, *args, _to=torch.nn.Module.to: moved.append((type(self), args)) or _to(self, *args)
    )
    trainer = make_trainer(**model.run(engine__offload_idle=True, sample__steps=3, run__iterations=1))
    components = ["vae", *trainer.text_encoders]
    for name in components:  # where a loader put them, they do not stay
        assert any(kind is type(trainer.get_module(name)) and str(*to) == "cpu" for kind, to in moved if len(to) == 1)

    def watch(owner, name, what):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: used.append((what, tuple(inside))) or original(*a, **k))

    watch(trainer, "predict", "network")
    watch(trainer.get_module("vae"), "decode", "vae")
    watch(trainer, "encode", "encoders")
    ((_, reward),) = trainer.run.scoring.rewards.rewards.items()
    watch(reward.reward, "score", "rewards")
    trainer.train()
    vae, *encoders = (type(trainer.get_module(name)).__name__ for name in components)
    assert set(used) == {
        ("network", ()),
        ("vae", (vae,)),
        ("rewards", (type(reward.reward).__name__,)),
        ("encoders", tuple(encoders)),
    }
