"""Promise 1 with compiled blocks (``model.compile``): graphs without gradients round otherwise than those with, so that the
rollout must run those of the update."""

import shutil

import pytest
import torch

from fastvideo_grpo.engines import compiled_blocks
from tests.promises.models import GUIDANCE, MODELS, cases

SHORT = {
    "model__compile": "blocks",
    "grpo__prompts_per_iteration": 2,
    "grpo__updates_per_iteration": 2,
    "sample__steps": 3,
    "optim__lr": 1e-3,
    "run__iterations": 2,
    "run__save_every": 2,
}
LORA = {"model__lora__rank": 4, "model__lora__alpha": 8.0, "optim__lr": 1e-2}
FLAVOURS = {
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


@pytest.fixture(autouse=True)
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


def check(trainer):
    trainer.train()
    lines = trainer.run.log.read()
    assert len(lines) == 2
    for line in lines:
        assert line["train/ratio_first_update_max_dev"] == 0.0 < line["train/ratio_max_dev"]
        assert line["train/updates"] == 2 and line["train/skipped_updates"] == 0
    assert lines[0]["perf/compilations"] > 0
    return lines


def quick(model, case):
    """FastVideo's networks and diffusers', with what is recomputed and without."""
    return case == {"flux": next(iter(FLAVOURS)), "stable_diffusion": list(FLAVOURS)[1]}.get(model.kind)


@pytest.mark.parametrize("model,case", cases(lambda model: FLAVOURS, quick))
def test_ratios_are_one_where_graphs_without_gradients_round_otherwise(make_trainer, monkeypatch, model, case):
    monkeypatch.setattr(compiled_blocks, "BACKEND", rounds_by_gradients)
    check(make_trainer(**model.run(**{**SHORT, **FLAVOURS[case]})))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("model,case", cases(lambda model: ("bf16",), lambda model, case: True, AS_TORCH_COMPILES))
def test_ratios_are_one_as_torch_compiles(make_trainer, model, case):
    """In bf16, where its two kinds of graphs round differently; prompts of other lengths need no other graph."""
    lines = check(make_trainer(**model.run(**SHORT, model__precision="bf16")))
    assert lines[1]["perf/compilations"] == 0
