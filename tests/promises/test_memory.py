"""What a run takes: activations as estimated before it starts, and idle components off the device."""

from contextlib import contextmanager

import pytest
import torch

from fastvideo_grpo import families, memory
from tests.promises.models import GUIDANCE, MODELS, cases
from tests.trainer.memory import kept_for_backward

# Of sizes at which what is per token outweighs what is per sample.
LARGE = {"sample__height": 96, "sample__width": 96}


@pytest.mark.parametrize("model,case", cases(lambda model: GUIDANCE, lambda model, case: True))
def test_activations_are_those_that_the_estimate_counts(make_trainer, tmp_path, model, case):
    """Counted in a forward, tensor by tensor."""
    trainer = make_trainer(train=False, **model.run(**LARGE, **GUIDANCE[case]))
    prompt, config, batch = model.prompt(tmp_path), trainer.config, trainer.config.engine.micro_batch_size
    initial = trainer.pack(torch.randn(batch, *trainer.latent_shape()))
    conditioning = trainer.conditioning(prompt, batch)
    # The estimate counts all of prompts.text_length; an unpadded text is the prompt's own tokens.
    texts = [tensor for name, tensor in conditioning.items() if name.endswith("encoder_hidden_states")]
    config.prompts.text_length = max(tensor.shape[1] for tensor in texts)
    level = trainer.schedule.at(torch.zeros(batch, dtype=torch.long))
    counted = kept_for_backward(trainer, conditioning, initial, level)
    assert memory._kept_bytes(config, families.model_facts(config)) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_is_idle_leaves_the_device(make_trainer, monkeypatch, model):
    """With ``engine.offload_idle`` each of them is on the device exactly while it is used."""
    inside, used = [], []

    @contextmanager
    def resident(movable, device):
        inside.append(type(movable).__name__)
        yield
        inside.pop()

    for module in ("rewards.inline", "trainers.policy"):
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
    ((_, reward),) = trainer.rewards.rewards.items()
    watch(reward.reward, "score", "rewards")
    trainer.train()
    vae, *encoders = (type(trainer.get_module(name)).__name__ for name in components)
    assert set(used) == {
        ("network", ()),
        ("vae", (vae,)),
        ("rewards", (type(reward.reward).__name__,)),
        ("encoders", tuple(encoders)),
    }
