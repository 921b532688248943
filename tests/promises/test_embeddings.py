"""Embeddings: from the tokens of the checkpoint's files; cached on disk, with which the run is the same and the second start
leaves the text encoders there."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.prompts.cut import cut_texts
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.prompts.tokenizers import PROBES
from fastvideo_grpo.trainers.conditioning import negative_of
from tests.promises.models import GUIDANCE, MODELS
from tests.trainer import runs


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_run_from_cached_embeddings_is_bitwise_the_run_that_encodes(make_trainer, tmp_path, model):
    """Negative prompts and images of prompts are in the cache, too."""
    short = {"sample__steps": 3, "grpo__prompts_per_iteration": 2, "run__iterations": 1}
    caching = {"engine__offload_idle": True, "prompts__embedding_dtype": "fp32"}
    settings = model.run(**short, **caching, **GUIDANCE["guidance in two passes"])
    plain = make_trainer(**settings, run__dir=tmp_path / "plain")
    plain.train()
    settings["prompts__embeddings"] = tmp_path / "embeddings"
    cached = make_trainer(**settings)
    cached.train()
    assert runs.same_bits(dict(plain.engine.state_dict()), dict(cached.engine.state_dict()))
    (index,) = (tmp_path / "embeddings").glob("*/index.json")
    negatives = {negative_of(prompt, cached.config).id for prompt in cached.run.prompts}
    assert len(json.loads(index.read_text())["prompts"]) == len(cached.run.prompts) + len(negatives)
    again = make_trainer(**{**settings, "run__iterations": 2})
    assert [again.get_module(name) for name in again.text_encoders] == [None] * len(again.text_encoders)
    again.train()
    assert again.run.store.iterations()[-1] == 2
    found = again._cache.get(again.run.prompts[0])
    assert ("image_latents" in found) == FAMILIES[model.kind].reads_images


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_encoders_are_shown_the_tokens_of_their_files_and_what_they_do_not_see_is_counted(make_trainer, monkeypatch, model):
    """Template, cleaning and special tokens included, up to the very limit of each encoder."""
    trainer = make_trainer(**model.run(prompts__text_length=16))
    texts = [*PROBES, "a cat &amp;" * 4, *(" ".join(["a"] * count) for count in (13, 14, 15, 16, 17, 74, 75, 76))]
    given, call = {}, PreTrainedTokenizerBase.__call__

    def recorded(tokenizer, text, *args, **kwargs):
        found = call(tokenizer, text, *args, **kwargs)
        given.setdefault(id(tokenizer), []).append((text if isinstance(text, str) else text[0], kwargs["max_length"], found))
        return found

    with monkeypatch.context() as patch, torch.no_grad(), trainer.forward_context():
        patch.setattr(PreTrainedTokenizerBase, "__call__", recorded)
        trainer.encode([Prompt(str(n), text) for n, text in enumerate(texts)])
    readers = FAMILIES[model.kind].text_readers(trainer.config, trainer.facts)
    assert [reader.encoder for reader in readers] == list(trainer.text_encoders)
    for reader in readers:
        tokenizer = trainer.get_module(reader.tokenizer)
        file = trainer.checkpoint / reader.tokenizer / "tokenizer.json"
        written = Tokenizer.from_file(str(file)) if file.is_file() else tokenizer.backend_tokenizer
        written.no_truncation()
        written.no_padding()
        not_seen = []
        for n, (text, longest, found) in enumerate(given[id(tokenizer)]):
            whole, shown = written.encode(text).ids, found["input_ids"][0][found["attention_mask"][0] > 0].tolist()
            if len(whole) > longest:
                not_seen.append(n)
            else:
                assert shown == whole, text
        assert 0 < len(not_seen) < len(texts)
        assert [n for n, _ in cut_texts(texts, reader, reader.load_tokenizer(trainer.checkpoint))] == not_seen
