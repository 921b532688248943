"""Files that build on others, and rewards that are replaced or removed by a file or on the command line."""

from pathlib import Path

import pytest

from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.planning import plan

RECIPE = Path(__file__).parent.parent / "train_scripts/configs/flux_t2i_released.yaml"
MINIMAL = """
model: {path: model}
prompts: {path: prompts.txt}
rewards:
  models:
    hps: {kind: hps, checkpoint: w.pt, params: {tokenizer: t}, outputs: {hps: {weight: 0.5}}}
    size: {kind: jpeg_size}
run: {dir: runs/x}
"""


@pytest.fixture
def load(tmp_path):
    """load(text of a file over MINIMAL, words): the configuration."""
    (tmp_path / "base.yaml").write_text(MINIMAL)

    def load(text, *words):
        (tmp_path / "given.yaml").write_text(f"base: base.yaml\n{text}")
        return run_config.load(tmp_path / "given.yaml", list(words))

    return load


def kinds(config):
    return {name: reward.kind for name, reward in config.rewards.models.items()}


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["hps=null"], {"size": "jpeg_size"}),
        (["hps=null", "size.params.quality=50"], {"size": "jpeg_size"}),
        (["hps=null", "look.kind=colour_match"], {"size": "jpeg_size", "look": "colour_match"}),
        (["hps=null", "hps.kind=colour_match"], {"hps": "colour_match", "size": "jpeg_size"}),
        (["hps={kind: colour_match}"], {"hps": "colour_match", "size": "jpeg_size"}),
        (["hps.kind=colour_match"], {"hps": "colour_match", "size": "jpeg_size"}),
        (["=null", "look.kind=colour_match"], {"look": "colour_match"}),
    ],
)
def test_rewards_are_removed_and_replaced_on_the_command_line(load, words, left):
    config = load("", *(f"rewards.models{'' if word.startswith('=') else '.'}{word}" for word in words))
    assert kinds(config) == left
    if "hps" in left:
        hps = config.rewards.models["hps"]
        assert (hps.checkpoint, hps.params, hps.outputs) == (None, {}, {}), "of the kind that was there before"


@pytest.mark.parametrize(
    ("models", "left"),
    [
        ("hps: null", {"size": "jpeg_size"}),
        ("hps: ~", {"size": "jpeg_size"}),
        ("hps: null, look: {kind: colour_match}", {"size": "jpeg_size", "look": "colour_match"}),
        ("hps: {kind: colour_match}", {"hps": "colour_match", "size": "jpeg_size"}),
    ],
)
def test_so_they_are_in_a_file_with_a_base(load, models, left):
    assert kinds(load(f"rewards: {{models: {{{models}}}}}")) == left


def test_the_same_kind_keeps_what_is_not_said_anew(load):
    hps = load("rewards: {models: {hps: {kind: hps, outputs: {hps: {weight: 0.7}}}}}").rewards.models["hps"]
    assert (hps.checkpoint, hps.params, hps.outputs["hps"].weight) == ("w.pt", {"tokenizer": "t"}, 0.7)
    hps = load("", "rewards.models.hps={checkpoint: other.pt}", "rewards.models.hps.outputs=null").rewards.models["hps"]
    assert (hps.kind, hps.checkpoint, hps.params, hps.outputs) == ("hps", "other.pt", {"tokenizer": "t"}, {})


def test_another_kind_takes_what_comes_with_it_in_any_order(load):
    words = ["rewards.models.hps.checkpoint=folder", "rewards.models.hps.kind=clip", "rewards.models.hps.params.batch_size=2"]
    for order in (words, words[::-1]):
        clip = load("", *order).rewards.models["hps"]
        assert (clip.kind, clip.checkpoint, clip.params, clip.outputs) == ("clip", "folder", {"batch_size": 2}, {})


def test_outputs_are_removed_too(load):
    assert load("", "rewards.models.hps.outputs.hps=null").rewards.models["hps"].outputs == {}


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (
            "",
            ["rewards.models.hpz=null"],
            r"rewards.models.hpz=null removes what is not there .did you mean .hps..[)]; there are: hps, size",
        ),
        (
            "rewards: {models: {clip: null}}",
            [],
            r"rewards.models.clip=null .*given.yaml, line 2. removes what is not there; there are: hps, size",
        ),
        ("", ["rewards.models.hps.outputs.x=null"], "there are: hps"),
        ("", ["rewards.models.hps=null", "rewards.models.size=null"], "rewards.models is empty; name at least one reward"),
        ("", ["rewards.models=null"], "rewards.models is empty; name at least one reward"),
    ],
)
def test_what_cannot_be_removed_is_told(load, text, words, message):
    with pytest.raises(ConfigError, match=message):
        load(text, *words)


def test_a_recipes_reward_is_replaced_as_the_readme_says():
    prompts = f"prompts.path={RECIPE.parents[2] / 'data/prompts/shapes_train.txt'}"
    config = run_config.load(RECIPE, ["rewards.models.hps=null", "rewards.models.size.kind=jpeg_size"])
    assert kinds(config) == {"size": "jpeg_size"}
    config = run_config.load(RECIPE, [prompts, "rewards.models.hps.kind=clip"])
    with pytest.raises(ConfigError, match=r"rewards.models.hps: reward 'clip' needs a checkpoint"):
        plan.check_run(config, model_facts(config, published_if_missing=True), 16, here=False)


def test_base_files(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "first.yaml").write_text(MINIMAL + "sample: {steps: 5, shift: 2}\n")
    (tmp_path / "below" / "second.yaml").write_text("base: first.yaml\nsample: {steps: 6}\n")
    (tmp_path / "third.yaml").write_text("base: below/second.yaml\n")
    monkeypatch.chdir(tmp_path / "below")
    config = run_config.load("../third.yaml", ["sample.shift=4"])
    assert (config.sample.steps, config.sample.shift) == (6, 4)
    monkeypatch.setenv("CONFIGS", str(tmp_path / "below"))
    (tmp_path / "third.yaml").write_text("base: $CONFIGS/second.yaml\n")
    assert run_config.load("../third.yaml").sample.steps == 6


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere.yaml", "base is 'nowhere.yaml' .*a.yaml, line 1.; there is no such file"),
        ("b.yml", "there is no such file: .*b.yml .did you mean .*b.yaml"),
        ("nowhere/b.yaml", "there is no folder .*nowhere"),
        ("b.yaml", r"base goes round in a circle: .*a.yaml -> .*b.yaml -> .*a.yaml; remove one of them"),
        ("a.yaml", "base goes round in a circle"),
        (".", "that is a folder"),
        ("[b.yaml]", "it must be a file"),
        ("$NOWHERE/b.yaml", r"the variable \$NOWHERE is not set"),
        ("c.yaml", "c.yaml, line 1, column 5: not valid YAML"),
        ("d.yaml", r"unknown key sample.stepz .*d.yaml, line 2."),
    ],
)
def test_a_base_that_cannot_be_is_told_in_a_line(tmp_path, monkeypatch, base, message):
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    (tmp_path / "c.yaml").write_text("a: [")
    (tmp_path / "d.yaml").write_text("sample:\n  stepz: 3\n")
    (tmp_path / "a.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ConfigError, match=message) as error:
        run_config.load(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)
