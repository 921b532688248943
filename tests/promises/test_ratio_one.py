"""Promise 1: before the first optimiser step of an iteration every ratio is exactly 1, bitwise in float32."""

import pkgutil
import shutil

import pytest
import torch

from fastvideo_grpo.engines import compiled_blocks
from fastvideo_grpo.models.registry import FAMILIES
from tests.promises.models import GUIDANCE, MODELS, cases

LORA = {"model__lora__rank": 4, "model__lora__alpha": 8.0, "optim__lr": 1e-2}
# Of each micro-batch the first is masked: of two micro-batches two samples share row 1, two row 2 and none row 0.
THREE_MASKED = {
    "engine__micro_batch_size": 3,
    "grpo__group_size": 6,
    "rewards__models__pixels__kind": "test_first_masked",
    "rewards__max_invalid_fraction": 0.5,
}
FLAVOURS = {
    "no guidance": GUIDANCE["no guidance"],
    "no guidance, 1 sample": {**GUIDANCE["no guidance"], "engine__micro_batch_size": 1},
    "no guidance, 4 samples": {**GUIDANCE["no guidance"], "engine__micro_batch_size": 4},
    "guidance in two passes": GUIDANCE["guidance in two passes"],
    "guidance in one pass, full checkpointing": {
        **GUIDANCE["guidance in one pass"],
        "engine__activation_checkpointing": "full",
    },
    "guidance in one pass, LoRA, every second block, 1 sample": {
        **GUIDANCE["guidance in one pass"],
        **LORA,
        "engine__activation_checkpointing": "every:2",
        "engine__micro_batch_size": 1,
    },
    "guidance in one pass, gradients of the prompt's alone": {
        **GUIDANCE["guidance in one pass"],
        "grpo__cfg_gradients": "conditional",
    },
    "best of": {"grpo__best_of__top": 1, "grpo__best_of__bottom": 2},
    # Of 3 samples, whose elements are no multiple of what a kernel takes at once where the network has such tensors.
    "3 samples, some masked": THREE_MASKED,
    "best of the scored, 3 samples": {**THREE_MASKED, "grpo__best_of__top": 1, "grpo__best_of__bottom": 2},
    "best of the scored, 3 samples, 3 threads": {
        **THREE_MASKED,
        "grpo__best_of__top": 1,
        "grpo__best_of__bottom": 2,
        "run__threads": 3,
    },
    "pairs, 3 threads": {"grpo__objective": "dpo", "run__threads": 3},
    "KL, idle offload": {"grpo__kl_weight": 0.1, "engine__offload_idle": True},
    "KL, LoRA, 4 samples": {"grpo__kl_weight": 0.1, **LORA, "engine__micro_batch_size": 4},
    "timesteps per group, noise per sample": {"grpo__timesteps__per": "group", "sample__init_noise": "per_sample"},
}
SHORT = {
    "grpo__prompts_per_iteration": 2,
    "grpo__updates_per_iteration": 2,
    "sample__steps": 3,
    "optim__lr": 1e-3,
    "run__iterations": 2,
    "run__save_every": 2,
}
QUICK = ("no guidance", "guidance in one pass, LoRA, every second block, 1 sample")


def all_are_one(trainer):
    """Train, and look at the ratios of both iterations; returns what was logged."""
    trainer.train()
    lines = trainer.run.log.read()
    assert len(lines) == 2
    for line in lines:
        assert line["train/ratio_first_update_max_dev"] == 0.0 < line["train/ratio_max_dev"]
        assert line["train/updates"] == 2 and line["train/skipped_updates"] == 0
    return lines


def flavours(model):
    return [*FLAVOURS, *model.flavours]


def quick(model, case):
    """FLUX is asked most of it here, the others what is particular to a network, and the rest in `make test-all`."""
    if "3 " in case:  # where kernels round by row (a tiny UNet on AVX-512); for all models: by a network that always does
        return model.kind == "stable_diffusion" and "threads" not in case
    of_flux = model.kind == "flux" and case not in ("guidance in two passes", "KL, LoRA, 4 samples")
    return of_flux or case in QUICK or case in model.flavours


@pytest.mark.parametrize("model,case", cases(flavours, quick))
def test_every_ratio_is_one_before_the_first_optimiser_step(make_trainer, model, case):
    """From the second update of an iteration on, ratios differ from one."""
    all_are_one(make_trainer(**model.run(**{**SHORT, **{**FLAVOURS, **model.flavours}[case]})))


BY_ROW = {
    "some masked": (THREE_MASKED, False),
    "best of": ({**THREE_MASKED, "grpo__best_of__top": 1, "grpo__best_of__bottom": 2}, True),
    "best of, guidance in one pass, full checkpointing": (
        {
            **THREE_MASKED,
            **GUIDANCE["guidance in one pass"],
            "grpo__best_of__top": 1,
            "grpo__best_of__bottom": 2,
            "engine__activation_checkpointing": "full",
        },
        True,
    ),
    "pairs": ({"grpo__objective": "dpo"}, True),
}


@pytest.mark.parametrize(
    "model,case",
    cases(lambda model: BY_ROW, lambda model, case: case == "best of" or (model.kind == "hunyuan_video" and "pass" in case)),
)
def test_ratios_are_one_where_the_network_rounds_differently_in_each_row(make_trainer, monkeypatch, model, case):
    """As kernels may. Samples that are chosen keep their rows; where they cannot, each passes through the network alone."""
    kind = pkgutil.resolve_name(FAMILIES[model.kind].trainer)
    network_output = kind.network_output

    def by_row(self, sample, level, conditioning):
        output = network_output(self, sample, level, conditioning).float()
        return output + 1e-3 * torch.arange(len(output)).view(-1, *[1] * (output.ndim - 1))

    monkeypatch.setattr(kind, "network_output", by_row)
    settings, apart = BY_ROW[case]
    common = {"sample__steps": 3, "optim__lr": 1e-3, "run__iterations": 1, "grpo__updates_per_iteration": 2}
    trainer = make_trainer(**model.run(**{**common, **settings}))
    assert trainer.rows_apart == apart
    trainer.train()
    (line,) = trainer.run.log.read()
    assert line["train/ratio_first_update_max_dev"] == 0.0 < line["train/ratio_max_dev"] and line["train/updates"] == 2


@pytest.mark.parametrize("model,case", cases(lambda model: ("bf16",), lambda model, case: model.kind != "skyreels_i2v"))
def test_in_bf16_it_is_one_to_1e_6_and_every_float32_master_moves(make_trainer, model, case):
    precision = {"model__precision": "bf16", "model__vae_precision": "bf16"}
    common = {"sample__steps": 3, "optim__lr": 1e-3, "run__iterations": 1, "grpo__updates_per_iteration": 2}
    trainer = make_trainer(**model.run(**common, **precision))
    for part in (trainer.denoiser, trainer.get_module("vae")):
        assert all(p.dtype == torch.bfloat16 for p in part.parameters())
    before = {name: weight.clone() for name, weight in trainer.engine.state_dict().items()}
    trainer.train()
    (line,) = trainer.run.log.read()
    assert line["train/ratio_first_update_max_dev"] <= 1e-6 < line["train/ratio_max_dev"]
    after = dict(trainer.engine.state_dict())
    assert after.keys() == {name for name, _ in trainer.denoiser.named_parameters()}
    assert all(weight.dtype == torch.float32 for weight in after.values())
    assert not [name for name, weight in before.items() if torch.equal(weight, after[name])]


COMPILED = {
    "guidance in one pass, LoRA, KL, every second block": {
        **GUIDANCE["guidance in one pass"],
        **LORA,
        "grpo__kl_weight": 0.1,
        "engine__activation_checkpointing": "every:2",
    },
    "guidance in two passes, KL, 4 samples": {
        **GUIDANCE["guidance in two passes"],
        "grpo__kl_weight": 0.1,
        "engine__micro_batch_size": 4,
    },
    "guidance in two passes, gradients of the prompt's alone, 1 sample": {
        **GUIDANCE["guidance in two passes"],
        "grpo__cfg_gradients": "conditional",
        "engine__micro_batch_size": 1,
    },
}


# Compiling for a CPU takes minutes: a network of images with texts of one length, and one of clips with texts of any.
AS_TORCH_COMPILES = [MODELS["flux"], MODELS["hunyuan_video"]]


@pytest.fixture
def fresh_compiler(tmp_path_factory, monkeypatch):
    """Nothing is compiled yet, and what is stays with the tests."""
    monkeypatch.setenv(compiled_blocks.CACHE_VARIABLE, str(tmp_path_factory.getbasetemp() / "compiled"))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):  # restored after the test
        yield
    torch._dynamo.reset()


def rounds_by_gradients(graph, inputs):
    """A compiler whose graphs give other digits without gradients than with them."""

    def run(*arguments):
        outputs = graph(*arguments)
        if torch.is_grad_enabled():
            return outputs
        return tuple(out * 1.001 if isinstance(out, torch.Tensor) and out.is_floating_point() else out for out in outputs)

    return run


def networks(trainer):
    """Those that are called: what is trained, and what KL compares with where it is another."""
    return [network for network in (trainer.denoiser, trainer._reference) if network is not None]


def quick_compiled(model, case):
    """FastVideo's networks and diffusers', with what is recomputed and without."""
    return case == {"flux": next(iter(COMPILED)), "stable_diffusion": list(COMPILED)[1]}.get(model.kind)


@pytest.mark.parametrize("model,case", cases(lambda model: COMPILED, quick_compiled))
def test_ratios_are_one_where_graphs_without_gradients_round_otherwise(
    fresh_compiler, make_trainer, monkeypatch, model, case
):
    """So that the rollout must run those of the update. A reference of its own is compiled, too."""
    monkeypatch.setattr(compiled_blocks, "BACKEND", rounds_by_gradients)
    trainer = make_trainer(**model.run(**{**SHORT, **COMPILED[case]}, model__compile="blocks"))
    compiled = [sum(part._compiled_call_impl is not None for part in network.modules()) for network in networks(trainer)]
    assert compiled[0] > 0 and set(compiled) == {compiled[0]}
    lines = all_are_one(trainer)
    assert lines[0]["perf/compilations"] > 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("model,case", cases(lambda model: ("bf16",), lambda model, case: True, AS_TORCH_COMPILES))
def test_ratios_are_one_as_torch_compiles(fresh_compiler, make_trainer, model, case):
    """In bf16, where its two kinds of graphs round differently; prompts of other lengths need no other graph."""
    lines = all_are_one(make_trainer(**model.run(**SHORT, model__precision="bf16", model__compile="blocks")))
    assert lines[0]["perf/compilations"] > 0
    assert lines[1]["perf/compilations"] == 0
