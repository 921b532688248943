"""Tokens are those of the checkpoint's files, and prompts that a text encoder does not read to their end are counted."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.planning import plan
from fastvideo_grpo.prompts.cut import TextReader, cut_texts, describe_cut
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.prompts.tokenizers import PROBES, TokenizerError, check_vocabulary, load_tokenizer
from fastvideo_grpo.resources import data_dir
from fastvideo_grpo.tiny.tokenizer_files import (
    UMT5_SPECIAL,
    VIDEO_WORDS,
    write_clip_tokenizer,
    write_llama_tokenizer,
    write_t5_tokenizer,
)

UNUSUAL = (*PROBES, "", " ", "é" * 100, "<s> <unk> </s> <pad> <|endoftext|> <|eot_id|> <extra_id_3>", "٣ ⅷ ☕\ufe0f \U0010fffd")


def _write(kind, folder):
    if kind == "clip":
        write_clip_tokenizer(folder)
    elif kind == "llama":
        write_llama_tokenizer(folder, VIDEO_WORDS, "a text")
    else:
        write_t5_tokenizer(folder, VIDEO_WORDS, **({"special": UMT5_SPECIAL} if kind == "umt5" else {}))
    return folder


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    """kind -> (folder, loaded tokenizer)."""
    folders = {kind: _write(kind, tmp_path_factory.mktemp("tokenizers") / kind) for kind in ("clip", "llama", "t5", "umt5")}
    return {kind: (folder, load_tokenizer(folder)) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", ["llama", "t5", "umt5"])
def test_tokens_are_those_of_the_tokenizer_json(tokenizer_of, kind):
    """transformers' own class of them makes others of UMT5's <unk>, and of all that is declared a Llama."""
    folder, tokenizer = tokenizer_of[kind]
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in UNUSUAL:
        assert tokenizer(text)["input_ids"] == written.encode(text).ids, text
    if kind == "umt5":
        assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<s>", "<unk>"]) == [0, 1, 2, 3]
        assert tokenizer("漢")["input_ids"][-2:] == [3, 1]


def test_clips_slower_files_do_without_a_tokenizer_json(tokenizer_of):
    _, tokenizer = tokenizer_of["clip"]
    ids = tokenizer("A red  Circle é", padding="max_length", max_length=77)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[:4] == ["<|startoftext|>", "a</w>", "red</w>", "circle</w>"] and tokens[6:] == ["<|endoftext|>"] * 71


def _edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda folder: shutil.rmtree(folder), "there is no tokenizer in"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"version":'), "cannot be read: EOF while parsing"),
        (lambda folder: (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1"), "cannot be read"),
        (lambda folder: _edit(folder / "tokenizer_config.json", bos_token="<new>"), "not of one tokenizer"),
    ],
)
def test_files_that_are_damaged_or_disagree_are_told(tokenizer_of, tmp_path, spoil, message):
    folder = shutil.copytree(tokenizer_of["umt5"][0], tmp_path / "tokenizer")
    spoil(folder)
    with pytest.raises(TokenizerError, match=message) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value)


def test_llama_is_read_from_its_tokenizer_json_alone(tokenizer_of):
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        load_tokenizer(tokenizer_of["clip"][0], from_json=True)


def test_a_tokenizer_of_another_model_is_told(tokenizer_of, tmp_path):
    folder, tokenizer = tokenizer_of["umt5"]
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 32}))
    with pytest.raises(TokenizerError, match="knows 32: one of them is another model's"):
        check_vocabulary(tokenizer, folder, tmp_path)


@pytest.mark.parametrize("kind", ["clip", "llama", "t5", "umt5"])
def test_texts_that_are_cut_are_found_whatever_they_are_written_in(tokenizer_of, kind):
    """At the very limit, and with characters that are several tokens each: what is taken as short by its characters is."""
    _, tokenizer = tokenizer_of[kind]
    texts = [text for text in (*UNUSUAL, "é", "a" * 14, "a red circle " * 5, "&amp;" * 4, "👩‍👩‍👧" * 2) if text]
    for longest in (3, 7, 12, 16, 40):
        reader = TextReader("it", "text_encoder", "tokenizer", longest)
        lengths = [len(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
        assert cut_texts(texts, reader, tokenizer) == [(n, length) for n, length in enumerate(lengths) if length > longest]
        for n, length in enumerate(lengths):
            shown = tokenizer(texts[n], max_length=longest, truncation=True)["input_ids"]
            assert (len(shown) < length) == (length > longest)


def test_the_line_of_texts_that_are_cut(tokenizer_of):
    texts = ["a red circle", "a red circle and a blue square " * 8]
    reader = TextReader("CLIP", "text_encoder", "tokenizer", 16)
    told = []
    cut = cut_texts(texts, reader, tokenizer_of["clip"][1], lambda done, total: told.append((done, total)))
    line = describe_cut(texts, cut, reader)
    assert "1 of 2 prompts are longer than the 16 tokens that CLIP (text_encoder) reads" in line
    assert "shorten them. The first has 58: 'a red circle and a blue square a red circle and a blue sq...'" in line
    assert told == [(1, 1)]  # the other is short by its characters
    assert "raise prompts.text_length" in describe_cut(texts, cut, TextReader("T5", "t", "t", 16, key="prompts.text_length"))


def _config(folder, kind, **sections):
    values = {
        "model": {"kind": kind, "path": str(folder)},
        "prompts": {"path": "unread.txt", **sections.pop("prompts", {})},
        "rewards": {"models": {"size": {"kind": "jpeg_size"}}},
        "run": {"dir": str(folder / "run")},
    }
    return run_config.build({**values, **sections})


def test_prompts_and_negative_prompts_are_counted_for_each_encoder():
    """By the committed tiny FLUX, nothing of which is loaded but the tokenizers."""
    folder = data_dir() / "tiny-flux-shapes"
    config = _config(folder, "flux", prompts={"text_length": 16}, sample={"cfg_scale": 2.0})
    prompts = [
        Prompt("0", "a red circle"),
        Prompt("1", "a blue square " * 6),
        Prompt("2", "a " * 90, negative_prompt="a " * 30),
    ]
    lines = plan.cut_by_encoders(config, prompts)
    assert [line.split(" reads")[0] for line in lines] == [
        "1 of 3 prompts are longer than the 77 tokens that CLIP (text_encoder)",
        "2 of 3 prompts are longer than the 16 tokens that T5 (text_encoder_2)",
        "1 of 2 negative prompts are longer than the 16 tokens that T5 (text_encoder_2)",
    ]
    config.sample.cfg_scale = 1.0
    assert len(plan.cut_by_encoders(config, prompts)) == 2


def test_every_family_says_how_its_encoders_read():
    for family in FAMILIES.usable().values():
        facts = ModelFacts("published", family.configs, family.denoiser)
        readers = family.text_readers(_config(Path("nowhere"), family.kind), facts)
        assert {reader.encoder for reader in readers} == {name for name in family.folders if name.startswith("text_encoder")}
        assert {reader.tokenizer for reader in readers} == {name for name in family.folders if name.startswith("tokenizer")}
