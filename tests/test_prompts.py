"""Prompt files, their order, and the cache of embeddings."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from fastvideo_grpo.checkpoints.resume import check_resumable, prompts_state
from fastvideo_grpo.config.saved import to_dict
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.models.run_config import build, load
from fastvideo_grpo.models.run_prompts import prompts_of
from fastvideo_grpo.planning import plan
from fastvideo_grpo.prompts.embeddings import EmbeddingCache, encoder_identity
from fastvideo_grpo.prompts.files import Prompt, PromptFileError, read_prompt_file, read_prompts, text_id
from fastvideo_grpo.prompts.order import PromptOrder
from fastvideo_grpo.prompts.tokenizers import TokenizerError
from fastvideo_grpo.resources import data_dir
from fastvideo_grpo.sampling import noise

TRAIN_SCRIPTS = data_dir().parent / "train_scripts"


def _write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _texts(path, content, **options):
    return [prompt.text for prompt in read_prompts(_write(path, content), **options)]


def test_text_and_jsonl_files(tmp_path):
    text = _write(tmp_path / "a.txt", "# comment\n a cat \n\na dog\n")
    assert [p.text for p in read_prompts(text)] == ["a cat", "a dog"]
    assert read_prompts(text)[0].id == "51e4674156077982"  # as ever: noise and embeddings are keyed by it
    cat, dog = read_prompts(_write(tmp_path / "a.jsonl", '{"prompt": "a cat"}\n{"prompt": "a dog", "id": 7, "style": "ink"}\n'))
    assert cat.id == read_prompts(text)[0].id and dog.id == "7" and dog.metadata == {"style": "ink"}


def test_every_form_says_the_same(tmp_path):
    """In whichever case the end of the name is written; what is null or an empty cell is not there."""
    entries = [
        {"prompt": "a red kettle, on a table", "id": "k", "source": "mine"},
        {"prompt": 'a "blue"\nboat', "negative_prompt": "fog"},
    ]
    empty = {"id": None, "negative_prompt": None, "source": None}
    written = {
        "a.jsonl": "\n".join(json.dumps(entry) for entry in entries),
        "a.JSONL": "\r\n\r\n".join(json.dumps({**empty, **entry}) for entry in entries),
        "a.json": json.dumps(entries, indent=1),
        "b.Json": json.dumps({"version": 2, "prompts": [{**empty, **entry} for entry in entries]}),
        "c.json": json.dumps({"data": entries}),
        "a.csv": 'prompt,id,source,negative_prompt\n"a red kettle, on a table",k,mine,\n"a ""blue""\nboat",,,fog\n\n',
        "a.CSV": 'id, prompt ,negative_prompt,source\r\nk,"a red kettle, on a table",,mine\r\n'
        ',"a ""blue""\nboat", fog ,\u200b\r\n,,,\r\n',
    }
    kettle, boat = read_prompts(_write(tmp_path / "a.jsonl", written["a.jsonl"]))
    assert (kettle.id, kettle.metadata, boat.id, boat.negative_prompt) == (
        "k",
        {"source": "mine"},
        text_id('a "blue"\nboat'),
        "fog",
    )
    for name, content in written.items():
        file = read_prompt_file(_write(tmp_path / name, content))
        assert (file.prompts, file.notes) == ([kettle, boat], []), name
        assert [p.metadata for p in file.prompts] == [kettle.metadata, {}], name


@pytest.mark.parametrize(
    "mark,encoding",
    [("", "utf-8"), ("\ufeff", "utf-8"), ("\ufeff", "utf-16-le"), ("\ufeff", "utf-16-be"), ("\ufeff", "utf-32-le")],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends_do_not_matter(tmp_path, mark, encoding, end):
    texts = ["a red kettle", "ein grünes Zelt 🦊", "a blue boat"]
    for name, lines in {"a.txt": texts, "a.jsonl": map(json.dumps, texts), "a.csv": ["prompt", *texts]}.items():
        assert _texts(tmp_path / name, (mark + end.join(lines) + end + end).encode(encoding)) == texts
    assert _texts(tmp_path / "a.json", (mark + json.dumps(texts, ensure_ascii=False)).encode(encoding)) == texts


def test_what_nobody_sees_is_no_prompt_and_no_part_of_one(tmp_path):
    """Lines of zero-width spaces, joiners, soft hyphens, marks in the middle of files that were put together, fillers."""
    unseen = [
        "\u200b",
        "\u200b\u200b",
        "\ufeff",
        "\u00a0 \u2060",
        "\u00ad",
        "\u200d\ufe0f",
        "\u3164",
        "\u2028",
        "\x07",
        "\u2800",
        "\u3000",
    ]
    assert _texts(
        tmp_path / "a.txt", "\n".join([*unseen, "\ufeffa blue boat\u200b", "a red cat\u00a0", "\u200b# no prompt"])
    ) == ["a blue boat", "a red cat"]
    assert _texts(tmp_path / "b.txt", "a family 👩\u200d👧, with love ❤\ufe0f\n") == ["a family 👩\u200d👧, with love ❤\ufe0f"]
    for name, content in {
        "a.jsonl": '{"prompt": "\u200b"}',
        "a.json": '[{"prompt": " "}]',
        "a.csv": "prompt,id\n\u200b,1",
    }.items():
        with pytest.raises(PromptFileError, match=name):
            read_prompts(_write(tmp_path / name, content))


def test_comments_are_counted_and_a_prompt_may_begin_with_their_sign(tmp_path):
    file = read_prompt_file(_write(tmp_path / "a.txt", "#1 fan of cats\n\\#1 fan of dogs\n\\\\# x\n# y\n"))
    assert [p.text for p in file.prompts] == ["#1 fan of dogs", "\\# x"]
    (note,) = file.notes
    assert "a.txt: 2 lines begin with # and are comments (line 1: '#1 fan of cats')" in note and "\\#" in note
    assert _texts(tmp_path / "a.jsonl", '{"prompt": "#1 fan of cats"}') == ["#1 fan of cats"]


def test_repeated_prompts_are_left_out_with_a_count_or_kept_under_ids_of_their_own(tmp_path):
    path = _write(tmp_path / "a.txt", "a cat\na dog\na cat\n a cat\n")
    file = read_prompt_file(path)
    assert [p.text for p in file.prompts] == ["a cat", "a dog"]
    assert "2 repeated prompts are left out (prompts.duplicates=keep keeps them): line 3 repeats line 1" in file.notes[0]
    kept = read_prompts(path, duplicates="keep")
    assert [p.text for p in kept] == ["a cat", "a dog", "a cat", "a cat"] and len({p.id for p in kept}) == 4
    assert kept[:2] == file.prompts
    _write(path, "a cat\na cat\na cat\na dog\n")  # ids do not depend on the order
    assert {p.id for p in read_prompts(path, duplicates="keep")} == {p.id for p in kept}
    named = '{"id": 1, "prompt": "a cat"}\n{"id": "1", "prompt": "a cat"}\n{"id": 2, "prompt": "a cat"}'
    assert [p.id for p in read_prompts(_write(tmp_path / "a.jsonl", named))] == ["1", "2"]
    measured = '{"prompt": "a cat", "a": NaN, "b": {"x": 1, "y": 2}}\n{"prompt": "a cat", "b": {"y": 2, "x": 1}, "a": NaN}'
    assert len(read_prompts(_write(tmp_path / "a.jsonl", measured))) == 1


def test_a_csv_of_one_column_needs_no_header(tmp_path):
    file = read_prompt_file(_write(tmp_path / "a.csv", 'a red kettle\n"a boat, blue"\n'))
    assert [p.text for p in file.prompts] == ["a red kettle", "a boat, blue"] and "has no header" in file.notes[0]


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("a.parquet", "x", r"end in \.txt .*\.jsonl .*\.json .*\.csv"),
        ("a.txt", "\n#x\n", "holds no prompts; .*1 line begins with #"),
        ("a.json", "", "holds no prompts"),
        ("a.csv", "prompt\n", "holds no prompts"),
        # encodings
        (
            "a.txt",
            "a cat\nein grünes Zelt".encode("latin-1"),
            r"a\.txt:2: byte 0xfc, the 7\. of the line.*'ü'.*iconv -f cp1252 -t utf-8",
        ),
        ("a.jsonl", b'{"prompt": "a \x93cat\x94"}', r"a\.jsonl:1: byte 0x93"),
        ("a.txt", "a cat\na dog".encode("utf-16-le"), r"a\.txt:1: .*UTF-16 without a byte order mark: iconv -f utf-16le"),
        ("a.txt", b"\xff\xfea\x00b", r"a\.txt:1: its byte order mark says utf-16-le"),
        ("a.txt", b"a cat\na \x00dog, that is damaged", r"a\.txt:2: there is a NUL character, byte 8"),
        ("a.txt", b"\x89PNG\r\n", "is a picture, no text"),
        ("a.csv", b"PK\x03\x04\x14\x00", "a spreadsheet, no text"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "compressed .*unpack it"),
        ("a.json", '[{"prompt": "a\\u0000b"}]', r"a\.json: entry 1: \"prompt\" holds a NUL"),
        ("a.json", '["a cat", "a \\ud83d"]', r"a\.json: entry 2: \"prompt\" holds half a character"),
        ("a.txt", "x" * 200_000, r"a\.txt:1: a prompt of 200,000 characters"),
        # keys
        ("a.jsonl", '{"prompt": "x"}\n{"promt": "y"}\n', r"a\.jsonl:2: there is no \"prompt\"; the keys found are 'promt'"),
        ("a.jsonl", '{"caption": "x", "n": 1}', "the keys found are 'caption', 'n': rename 'caption' to 'prompt'"),
        ("a.json", '[{"Prompt": "x"}]', "rename 'Prompt' to 'prompt'"),
        ("a.csv", "caption,source\nx,y\n", r"a\.csv:1: .* 'caption', 'source': rename 'caption'"),
        ("a.csv", "text\nx\ny\n", "rename 'text'"),
        ("a.csv", "prompt;source\nx;y\n", "separated by ';'"),
        ("a.csv", "sep=;\nid;prompt\nx;y\n", "separated by ';'"),
        ("a.jsonl", '{"prompt": "x", "id": ' + "7" * 5000 + "}", "thousands of digits"),
        ("a.jsonl", '{"prompt": "x", "prompt": "y"}', r"a\.jsonl:1: .*key 'prompt' twice"),
        # forms
        ("a.jsonl", "{", r"a\.jsonl:1: not valid JSON"),
        ("a.jsonl", '[\n"x"]', r"a\.jsonl:1: a list, .*name the file \.json"),
        ("a.jsonl", '"x"\n5', r"a\.jsonl:2: .*got 5"),
        ("a.json", '{"prompt": "x"}\n{"prompt": "y"}', r"a\.json:2: not valid JSON.*name it \.jsonl"),
        ("a.json", '{"a": "x", "b": "y"}', r"an object with the keys 'a', 'b'"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", '"x"', r"a\.json file is a list|a \.json file is a list"),
        ("a.csv", "prompt,id\na cat, black,1\n", r"a\.csv:2: 3 cells, but the header has 2 \(prompt, id\)"),
        ("a.csv", 'prompt,id\nx,1\n"a cat,2\ny,3\n', r"a\.csv:3: not valid CSV"),
        ("a.csv", "prompt,prompt\nx,y\n", "two columns are called 'prompt'"),
        ("a.csv", ",prompt\n0,x\n", "column 1 has no name.*index=False"),
        ("a.csv", "prompt,id\n,1\n", r"a\.csv:2: its prompt is empty"),
        ("a.csv", "a red kettle, on a table\na boat\n", "there is no column 'prompt'.*in quotes"),
        # values
        ("a.jsonl", '{"prompt": null}', r"\"prompt\" is null"),
        ("a.jsonl", '{"prompt": ["x"]}', r"\"prompt\" is \[\"x\"\]"),
        ("a.jsonl", '{"prompt": "x", "id": true}', r"a\.jsonl:1: \"id\" is True; it must be a text or a whole number"),
        ("a.jsonl", '{"prompt": "x", "id": [1, 2]}', r"\"id\" is \[1, 2\]"),
        ("a.jsonl", '{"prompt": "x", "id": 1.0}', r"\"id\" is 1\.0"),
        ("a.jsonl", '{"prompt": "x", "id": " "}', r"\"id\" is ' '"),
        # ids
        (
            "a.jsonl",
            '{"prompt": "x", "id": 1}\n{"prompt": "y", "id": "1"}',
            r"jsonl:2: .*'1' stands in line 1 already \(1 and '1' are one id\)",
        ),
        (
            "a.jsonl",
            '{"prompt": "x", "id": "a"}\n{"prompt": "y", "id": "a "}',
            r"stands in line 1 already \('a' and 'a ' are one id\)",
        ),
        (
            "a.jsonl",
            '{"prompt": "x", "negative_prompt": "a"}\n{"prompt": "x"}',
            r":2: .*line 1 already, with another negative_prompt: give",
        ),
        ("a.jsonl", '{"prompt": "x", "size": 1}\n{"prompt": "x", "size": 2}', r":2: .*line 1 already, with another size: give"),
        ("a.jsonl", '{"prompt": "x", "a": 1}\n{"prompt": "x", "a": true}', r":2: .*line 1 already, with another a: give"),
        ("a.jsonl", '{"prompt": "x", "a": [1]}\n{"prompt": "x", "a": [1.0]}', r":2: .*line 1 already, with another a: give"),
    ],
)
def test_bad_prompt_files_name_the_line_and_what_would_work(tmp_path, name, content, message):
    with pytest.raises(PromptFileError, match=message) as error:
        read_prompts(_write(tmp_path / name, content))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_key_that_is_nearly_one_that_is_read_is_told(tmp_path):
    (note,) = read_prompt_file(_write(tmp_path / "a.jsonl", '{"prompt": "x", "negativePrompt": "blur"}')).notes
    assert "line 1 has the key 'negativePrompt', which only rewards are told" in note


def test_what_is_no_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such prompt file"):
        read_prompts(tmp_path / "a.txt")
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(PromptFileError, match="is no file"):
        read_prompts(tmp_path / "b.txt")


def test_changed_metadata_stops_a_resume_and_its_order_does_not(tmp_path):
    """Rewards read it."""
    config = build(
        {
            "model": {"path": "m"},
            "prompts": {"path": "p.jsonl"},
            "run": {"dir": "r"},
            "rewards": {"models": {"a": {"kind": "jpeg_size"}}},
        }
    )

    def state(*lines):
        prompts = read_prompts(_write(tmp_path / "p.jsonl", "\n".join(lines)))
        saved = {"config": to_dict(config), "denoiser": "d", "noise": noise.VERSION, "images": {}}
        return prompts, {**saved, **prompts_state(prompts, config)}

    plain, saved_plain = state('{"prompt": "a cat"}', '{"prompt": "a dog", "style": null}')
    rich, saved = state('{"prompt": "a cat", "size": 3, "style": {"a": 1, "b": [2]}}', '{"prompt": "a dog"}')
    other_order, _ = state('{"style": {"b": [2], "a": 1}, "prompt": "a cat", "size": 3}', '{"prompt": "a dog"}')
    changed, _ = state('{"prompt": "a cat", "size": 4, "style": {"a": 1, "b": [2]}}', '{"prompt": "a dog"}')
    check_resumable(saved, config, rich, "d")
    check_resumable(saved, config, other_order, "d")
    check_resumable(saved_plain, config, plain, "d")
    for before, now in ((saved, changed), (saved, plain), (saved_plain, rich)):
        with pytest.raises(ConfigError, match="something else of its prompts, which rewards are told"):
            check_resumable(before, config, now, "d")
    with pytest.raises(ConfigError, match="holds other prompts"):
        check_resumable(saved, config, rich[::-1], "d")


def test_a_recipes_kept_out_prompts_go_when_another_list_is_trained_on(tmp_path, caplog):
    """Saved pictures and what is evaluated as heldout would be of the recipe's prompts."""
    recipe = TRAIN_SCRIPTS / "configs" / "flux_t2i_tiny.yaml"
    mine, kept_out = str(_write(tmp_path / "mine.txt", "a cat")), str(_write(tmp_path / "kept_out.txt", "a dog"))
    based = _write(tmp_path / "based.yaml", f"base: {recipe}\nprompts: {{path: {mine}}}\n")
    based_with = _write(tmp_path / "based_with.yaml", f"base: {recipe}\nprompts: {{path: {mine}, eval_path: {kept_out}}}\n")
    for file, overrides in ((recipe, [f"prompts.path={mine}"]), (based, [])):
        config = load(file, overrides)
        assert (config.prompts.path, config.prompts.eval_path) == (mine, None)
        assert "no prompts are kept out, and pictures are of" in caplog.text
        caplog.clear()
    with_both = [f"prompts.path={mine}", f"prompts.eval_path={kept_out}"]
    for config in (load(recipe, with_both), load(based_with), load(based, with_both[1:])):
        assert (config.prompts.path, config.prompts.eval_path) == (mine, kept_out)
    assert load(recipe, [f"prompts.path={mine}", "prompts.eval_path=null"]).prompts.eval_path is None
    caplog.clear()
    assert load(recipe).prompts.eval_path == load(recipe, ["run.seed=1"]).prompts.eval_path == "data/prompts/shapes_heldout.txt"
    assert not caplog.text


def test_a_start_says_what_is_left_out_of_the_prompts_and_what_encoders_cut(tmp_path, caplog):
    """As the dry run does, from the same lines; a tokenizer that cannot be read ends it before anything is loaded."""
    checkpoint = shutil.copytree(data_dir() / "tiny-flux-shapes", tmp_path / "model")
    path = _write(tmp_path / "a.txt", "#1 fan\na cat\na cat\n" + "a red circle and " * 30 + "one\n")
    config = build(
        {
            "model": {"path": str(checkpoint)},
            "prompts": {"path": str(path)},
            "run": {"dir": str(tmp_path / "run")},
            "rewards": {"models": {"a": {"kind": "jpeg_size"}}},
        }
    )
    plan.warn(config, model_facts(config))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and "1 line begins with #" in said[0] and "1 repeated prompt is left out" in said[1]
    assert said[2].startswith("1 of 2 prompts are longer than the 77 tokens that CLIP (text_encoder) reads, and cut there")
    config.prompts.eval_path = str(_write(tmp_path / "b.txt", "a cat\na dog\n"))
    caplog.clear()
    plan.warn(config, model_facts(config))
    assert "1 of the 2 prompts of prompts.eval_path are trained on, too" in caplog.text
    config.prompts.duplicates = "keep"
    assert len(prompts_of(config, path)) == 3
    (checkpoint / "tokenizer_2" / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="tokenizer_2 cannot be read"):
        plan.warn(config, model_facts(config))


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
