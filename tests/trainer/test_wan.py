"""What is particular to Wan 2.1: zeros behind a text, what it rules out. (The promises it shares with all: tests/promises.)"""

import json
import shutil

import pytest

from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.planning import plan
from fastvideo_grpo.trainers.load import trainer_class
from tests.trainer import runs


def test_cached_texts_have_their_zeros_behind_them(make_trainer, tmp_path):
    """The network reads them, it has no mask."""
    trainer = make_trainer(**runs.WAN_T2V, prompts__embeddings=tmp_path / "embeddings")
    text = trainer._cache.get(trainer.run.prompts[0])["encoder_hidden_states"]
    assert text.shape[:2] == (1, 16) and text[0, 3].any() and not text[0, 4:].any()  # a red circle </s>


def test_embeddings_cached_from_other_tokens_are_not_taken(tiny_wan, tmp_path, monkeypatch):
    """Before, transformers' T5 tokenizer made them, to which UMT5's <s> was the unknown token."""
    trainer = trainer_class("wan")
    config = _config(tiny_wan, tmp_path)
    now = trainer.embedding_cache(config, World()).folder
    monkeypatch.setattr(trainer, "encoding", {})
    assert trainer.embedding_cache(config, World()).folder != now


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"sample__vae_tiling": True}, r"vae_tiling is true.*leave it out"),
        ({"sample__guidance_scale": 5.0}, r"guidance_scale is 5.0.*set sample.cfg_scale"),
        ({"prompts__text_length": 600}, "at most 512"),
        ({"sample__width": 40}, "multiple of 16 for this model: 32 or 48"),
    ],
)
def test_what_wan_rules_out(tiny_wan, tmp_path, settings, message):
    config = _config(tiny_wan, tmp_path, **settings)
    with pytest.raises(ConfigError, match=message):
        plan.check_run(config, model_facts(config), 1)


def test_a_wan_2_2_is_refused(tiny_wan, tmp_path):
    """It has the same pipeline class, and a second network, or another VAE."""
    two = shutil.copytree(tiny_wan, tmp_path / "two")
    shutil.copytree(two / "transformer", two / "transformer_2")
    other = shutil.copytree(tiny_wan, tmp_path / "other")
    file = other / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "is_residual": True}))
    for folder in (two, other):
        config = _config(folder, tmp_path)
        with pytest.raises(ConfigError, match=r"is a Wan 2\.2"):
            plan.check_run(config, model_facts(config), 1)


def _config(checkpoint, folder, **settings):
    (folder / "empty.yaml").write_text("{}")
    return run_config.load(folder / "empty.yaml", runs.settings(folder, checkpoint, **{**runs.WAN_T2V, **settings}))
