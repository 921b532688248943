"""``fastvideo-grpo measure-family``: what it counts is what families have, and it tells where its factors do not fit."""

from dataclasses import replace

import pytest

from fastvideo_grpo import cli
from fastvideo_grpo.commands.measure_family import as_written
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.family import Activations
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.planning.activation_counting import FamilyCounter
from fastvideo_grpo.planning.memory import kept_by_forward
from fastvideo_grpo.trainers.load import trainer_class

QUICK = "wan"  # cross-attention and an MLP of its own width: all factors but a refiner's
KINDS = [
    kind if kind == QUICK else pytest.param(kind, marks=pytest.mark.slow)
    for kind in FAMILIES.names()
    if FAMILIES[kind].fastvideo_config
]


def said(capsys):
    """The lines to paste, as what they are."""
    return eval(f"dict({capsys.readouterr().out})", {"Activations": Activations})


@pytest.mark.parametrize("kind", KINDS)
def test_families_have_what_is_counted(kind, capsys):
    """To 1 % of what the published network keeps, without and with adapters."""
    precision = ["--precision", "bf16"] if kind == QUICK else []
    assert cli.main(["measure-family", kind, *precision]) == 0
    family, found = FAMILIES[kind], said(capsys)
    facts = ModelFacts(family.name, family.configs, family.denoiser)
    for name in ("activations", "lora_activations"):
        for dtype, counted in found[name].items():
            config = FamilyCounter(kind, trainer_class, print).settings(dtype, lora=name.startswith("lora"), check=True)
            own = getattr(family, name)[dtype]
            assert kept_by_forward(own, config, facts) == pytest.approx(kept_by_forward(counted, config, facts), rel=0.01)
            assert own.forward == pytest.approx(counted.forward, rel=0.05)
    of_clips = ("clip_decode", "clip_decode_kept") if FamilyCounter(kind, trainer_class, print).makes_clips else ()
    for name in ("decode", "decode_kept", *of_clips):
        assert getattr(family, name) == pytest.approx(found[name], rel=0.01)


@pytest.mark.slow
def test_whole_flux_with_adapters_keeps_what_a_gpu_took():
    """The published network at the size that was measured on an H200 (720 x 720, rank 128): what was there beside it, 25.1 GiB,
    and what is counted are the peak of 36.9 GiB."""
    counter = FamilyCounter("flux", trainer_class, print)
    config = counter.settings("bf16", lora=True, rank=128)
    config.sample.height = config.sample.width = 720
    config.prompts.text_length = 512
    counted = counter.kept_bytes(config, {}) / 2**30
    assert 25.1 + counted == pytest.approx(36.9, rel=0.1)
    estimated = kept_by_forward(counter.family.lora_activations["bf16"], config, counter.published) / 2**30
    assert estimated == pytest.approx(counted, rel=0.01)


def test_factors_that_do_not_fit_are_told(monkeypatch, capsys):
    def off(self, precision, *, lora):
        own = (self.family.lora_activations if lora else self.family.activations)[precision]
        return replace(own, double=1.1 * own.double)

    monkeypatch.setattr(FamilyCounter, "activations", off)
    assert cli.main(["measure-family", QUICK, "--precision", "bf16"]) == 1
    told = capsys.readouterr().err
    assert "TOO FAR" in told and "2 of 6 figures are too far off at other sizes" in told


def test_a_family_whose_passes_are_counted_has_its_decoder_measured(capsys):
    assert cli.main(["measure-family", "stable_diffusion", "--precision", "fp32"]) == 0
    said_, told = capsys.readouterr()
    family = FAMILIES["stable_diffusion"]
    found = eval(f"dict({said_})")
    assert found == pytest.approx({"decode": family.decode, "decode_kept": family.decode_kept}, rel=0.01)
    assert "pass_bytes" in told


def test_an_unknown_model_is_told_with_those_that_are_known(capsys):
    assert cli.main(["measure-family", "fluxx"]) == 1
    assert "unknown model 'fluxx'" in capsys.readouterr().err


def test_what_is_usual_is_not_written():
    written = "Activations(30, 0, (6, 4), 29, mlp=2, text=5)"
    assert as_written(FAMILIES["wan"].activations["bf16"]) == written
    assert eval(written) == FAMILIES["wan"].activations["bf16"]
