"""Embeddings cached on disk: the run is the same, and the second start leaves the text encoders there."""

import json

import pytest

from fastvideo_grpo.families import FAMILIES
from fastvideo_grpo.trainers.conditioning import negative_of
from tests.promises.models import GUIDANCE, MODELS
from tests.trainer import runs


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_run_from_cached_embeddings_is_bitwise_the_run_that_encodes(make_trainer, tmp_path, model):
    """Negative prompts and images of prompts are in the cache, too."""
    common = {"sample__steps": 3, "run__iterations": 1, "engine__offload_idle": True, "prompts__embedding_dtype": "fp32"}
    settings = model.run(**common, **GUIDANCE["guidance in two passes"])
    plain = make_trainer(**settings, run__dir=tmp_path / "plain")
    plain.train()
    settings["prompts__embeddings"] = tmp_path / "embeddings"
    cached = make_trainer(**settings)
    cached.train()
    assert runs.same_bits(dict(plain.engine.state_dict()), dict(cached.engine.state_dict()))
    (index,) = (tmp_path / "embeddings").glob("*/index.json")
    negatives = {negative_of(prompt, cached.config).id for prompt in cached.prompts}
    assert len(json.loads(index.read_text())["prompts"]) == len(cached.prompts) + len(negatives)
    again = make_trainer(**{**settings, "run__iterations": 2})
    assert [again.get_module(name) for name in again.text_encoders] == [None] * len(again.text_encoders)
    again.train()
    assert again.store.iterations()[-1] == 2
    found = again._cache.get(again.prompts[0])
    assert ("image_latents" in found) == FAMILIES[model.kind].reads_images
