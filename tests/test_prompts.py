"""Prompt files, their order, and the cache of embeddings."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.prompts.embeddings import EmbeddingCache, encoder_identity
from fastvideo_grpo.prompts.files import Prompt, read_prompts
from fastvideo_grpo.prompts.order import PromptOrder


def test_text_and_jsonl_files(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("# comment\n a cat \n\na dog\n")
    assert [p.text for p in read_prompts(text)] == ["a cat", "a dog"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"prompt": "a cat"}\n{"prompt": "a dog", "id": 7, "style": "ink"}\n')
    cat, dog = read_prompts(lines)
    assert cat.id == read_prompts(text)[0].id and dog.id == "7" and dog.metadata == {"style": "ink"}


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("a.csv", "x", "end in .txt"),
        ("a.txt", "\n#x\n", "holds no prompts"),
        ("a.txt", "a cat\na cat\n", r"a\.txt:2.*line 1 already"),
        ("a.jsonl", '{"prompt": "x"}\n{"promt": "y"}\n', r"a\.jsonl:2"),
        ("a.jsonl", "{", "not valid JSON"),
    ],
)
def test_bad_prompt_files_name_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_every_prompt_comes_once_an_epoch_in_another_order():
    order = PromptOrder(10, seed=0)
    drawn = [i for iteration in range(5) for i in order.draw(iteration, 4)]  # two epochs
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert PromptOrder(10, seed=0).draw(3, 4) == order.draw(3, 4) != PromptOrder(10, seed=1).draw(3, 4)
    assert len(PromptOrder(2, seed=0).draw(0, 5)) == 5  # more prompts than there are


def _encode(prompts):
    _encode.calls += len(prompts)
    return [{"text": torch.full((1, 3), float(len(p.text))), "ids": torch.tensor([[len(p.id)]])} for p in prompts]


@pytest.fixture
def cache(tmp_path):
    _encode.calls = 0
    return lambda: EmbeddingCache(tmp_path / "cache", "encoder", torch.bfloat16, World())


PROMPTS = [Prompt(str(i), "x" * i) for i in range(1, 70)]


def test_embeddings_are_encoded_once_and_come_back(cache):
    said = []
    first = cache()
    first.fill(PROMPTS, _encode, said.append)
    assert "69 prompts" in said[0] and "free there" in said[0]
    found = cache()
    assert not found.missing(PROMPTS)
    found.fill(PROMPTS, _encode, said.append)
    assert _encode.calls == 70  # one more to learn the size
    got = found.get(PROMPTS[4])
    assert got["text"].dtype == torch.bfloat16 and got["text"].tolist() == [[5.0] * 3] and got["ids"].tolist() == [[1]]


def _fill_as_rank(rank, folder):
    _encode.calls = 0
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    filled = EmbeddingCache(folder / "cache", "encoder", torch.bfloat16, World.current("cpu"))
    filled.fill(PROMPTS, _encode, lambda text: None)
    assert not filled.missing(PROMPTS)
    for prompt in PROMPTS:
        assert filled.get(prompt)["text"].tolist() == [[float(len(prompt.text))] * 3]
    (folder / f"calls-{rank}").write_text(str(_encode.calls))
    dist.destroy_process_group()


def test_two_processes_share_the_encoding_and_both_find_every_prompt(tmp_path):
    torch.multiprocessing.spawn(_fill_as_rank, (tmp_path,), nprocs=2)
    # 69 prompts dealt to two, and one more on each to learn the size.
    assert [int((tmp_path / f"calls-{rank}").read_text()) for rank in range(2)] == [36, 35]
    folder = tmp_path / "cache" / "encoder"
    index = json.loads((folder / "index.json").read_text())
    assert len(index["prompts"]) == len(PROMPTS)
    # No left-over temporaries.
    assert {path.name for path in folder.iterdir()} == {"index.json", *index["prompts"].values()}
    assert not EmbeddingCache(tmp_path / "cache", "encoder", torch.bfloat16, World()).missing(PROMPTS)


def test_an_edited_prompt_is_encoded_again_and_a_missing_one_is_an_error(cache):
    first = cache()
    first.fill(PROMPTS[:3], _encode, lambda text: None)
    edited = Prompt(PROMPTS[0].id, "another text")
    assert cache().missing([edited]) == [edited]
    with pytest.raises(KeyError, match="no embedding"):
        first.get(edited)


def test_shards_of_a_killed_run_are_found_without_the_index(cache):
    first = cache()
    first.fill(PROMPTS, _encode, lambda text: None)
    (first.folder / "index.json").unlink()
    assert not cache().missing(PROMPTS)
    index = {"prompts": {"lost": "not-there.safetensors"}}
    (first.folder / "index.json").write_text(json.dumps(index))
    assert not cache().missing(PROMPTS)


def test_too_little_disk_is_told_before_encoding(cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 50, 50))
    with pytest.raises(OSError, match="embeddings=none"):
        cache().fill(PROMPTS, _encode, lambda text: None)
    assert _encode.calls == 1


def test_encoder_identity_looks_at_what_is_loaded_and_at_nothing_else(tmp_path):
    """A download with --local-dir leaves a folder of its own beside the files, and people leave notes."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    before = encoder_identity(tmp_path, ["transformer"], {})
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / "README.md").write_text("mine")
    (folder / "old.json").mkdir()
    assert encoder_identity(tmp_path, ["transformer"], {}) == before
    (folder / "config.json").write_text('{"a": 1}')
    assert encoder_identity(tmp_path, ["transformer"], {}) != before


def test_encoder_identity_changes_with_anything_that_changes_embeddings(tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = {"w": torch.zeros(1000)}
    save_file(weights, folder / "model.safetensors")
    seen = {encoder_identity(tmp_path, ["text_encoder"], {"length": 16})}
    seen.add(encoder_identity(tmp_path, ["text_encoder"], {"length": 32}))
    weights["w"][500] = 1
    save_file(weights, folder / "model.safetensors")
    seen.add(encoder_identity(tmp_path, ["text_encoder"], {"length": 16}))
    (folder / "config.json").write_text('{"layers": 2}')
    seen.add(encoder_identity(tmp_path, ["text_encoder"], {"length": 16}))
    assert len(seen) == 4
