"""Texts of a configuration are what was written: on the command line, in files, and in the config.yaml that a run leaves."""

import random

import pytest

from fastvideo_grpo import cli
from fastvideo_grpo.config import files as config_files
from fastvideo_grpo.config import loading as config_loading
from fastvideo_grpo.config import saved as config_saved
from fastvideo_grpo.config.keys import Config, LoRAConfig, RewardConfig
from fastvideo_grpo.config.paths import as_typed, expanded
from fastvideo_grpo.config.values import keys
from fastvideo_grpo.errors import ConfigError, UserError
from fastvideo_grpo.models import run_config

MINIMAL = """
model: {path: model}
prompts: {path: prompts.txt}
sample: {cfg_scale: 2}
rewards: {models: {size: {kind: jpeg_size}}}
run: {dir: runs/x}
"""
NASTY = (
    *(
        "no",
        "yes",
        "on",
        "off",
        "true",
        "null",
        "Null",
        "~",
        "",
        " ",
        "???",
        "none",
        "y",
        "n",
        "=",
        "<<",
        "-",
        "?",
        ":",
        "|",
        ">",
    ),
    *(
        "0123",
        "1e5",
        "1e-5",
        "1E5",
        ".5",
        "1.",
        "0x1F",
        "0b1",
        "0o17",
        "1_000",
        "20241127_093000",
        "2024-11-27",
        "1:30",
        "12:30:45",
    ),
    *("2024-11-27 09:30:00", ".inf", "-.inf", ".nan", "nan", "+1", "-0", "123456789012345678901234567890"),
    *(
        "a: b",
        "a:b",
        "#x",
        "x #y",
        "bad hands #1, blurry",
        "a=b",
        "[a]",
        "[1,",
        "{a: 1}",
        "{",
        "}",
        "${x}",
        "${",
        "$x",
        "\\${x}",
    ),
    *(
        "'q'",
        '"q"',
        "it's",
        '"',
        "'",
        "&a",
        "*a",
        "!!str x",
        "!x",
        "%x",
        "@x",
        "`x`",
        "- a",
        "? a",
        "---",
        "...",
        "a\\nb",
        "\\",
    ),
    *(
        " leading",
        "trailing ",
        "  two  spaces  ",
        "tab\there",
        "line\nbreak",
        "line\n\nbreaks\n",
        "\n",
        "\r",
        "a\r\nb",
        "\x85",
        "\u2028",
    ),
    *(
        "\x07",
        "\x7f",
        "\ufeff",
        "\u200b",
        "\xa0",
        "caf\xe9",
        "caf\xe9",
        "低质量, 模糊",
        "🙂",
        "x" * 300,
        "word " * 60,
    ),
)


@pytest.fixture
def load(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    return lambda *overrides: run_config.load(file, list(overrides))


@pytest.fixture
def load_file(tmp_path):
    def load(text):
        (tmp_path / "given.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return run_config.load(tmp_path / "given.yaml")

    return load


@pytest.mark.parametrize(
    "text", ["no", "bad hands #1, blurry", "", "null", "0123", "${x}", "${", "a=b=c", " x ", '"quoted"', "???"]
)
def test_a_text_on_the_command_line_is_what_stands_behind_the_first_equals_sign(load, text):
    assert load(f"sample.negative_prompt={text}").sample.negative_prompt == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caf\udce9", "the byte 0xe9, which is not UTF-8"),
        ("a\0b", "a NUL character"),
        ("half \ud83d", "half a character"),
    ],
)
def test_a_text_that_no_tokenizer_takes_is_told_where_it_comes_from(load, load_file, capsys, text, message):
    with pytest.raises(ConfigError, match=f"sample.negative_prompt is .*: a text cannot hold {message}"):
        load(f"sample.negative_prompt={text}")
    written = text.encode("ascii", "backslashreplace").decode().replace("\0", "\\0")
    with pytest.raises(ConfigError, match=rf"sample.negative_prompt is .*line 1\): a text cannot hold {message}"):
        load_file(f'sample: {{negative_prompt: "{written}"}}')
    for command in (["sample", "runs/x"], ["check-reward", "x.yaml"]):
        with pytest.raises(SystemExit):
            cli.parse([*command, "--prompt", text])
        assert f"holds {message}" in capsys.readouterr().err


def test_so_are_paths_and_optional_texts_which_null_unsets(load):
    assert load("run.dir=20241127_093000").run.dir == "20241127_093000" and load("run.dir=0123").run.dir == "0123"
    assert load("run.dir=2024-11-27").run.dir == "2024-11-27"
    reward = load(*(f"rewards.models.size.{key}=007" for key in ("url", "checkpoint", "python", "device"))).rewards.models[
        "size"
    ]
    assert (reward.url, reward.checkpoint, reward.python, reward.device) == ("007",) * 4
    assert load("prompts.eval_path=1e5").prompts.eval_path == "1e5"
    assert load("prompts.eval_path=x", "prompts.eval_path=null").prompts.eval_path is None
    assert load("rewards.models.size.url=null").rewards.models["size"].url is None


def test_sections_lists_and_free_settings_stay_yaml(load):
    config = load("grpo.best_of={top: 1, bottom: 1}", "model.lora={rank: 4, targets: [to_q, 'no']}", "optim.betas=[0.8, 0.9]")
    assert (config.grpo.best_of.top, config.model.lora.targets, config.optim.betas) == (1, ["to_q", "no"], [0.8, 0.9])
    params = (
        load("rewards.models.size.params={quality: 50, sign: 1}", "rewards.models.size.params.sign=-1")
        .rewards.models["size"]
        .params
    )
    assert params == {"quality": 50, "sign": -1}
    # Where YAML 1.1 has octal, sexagesimal and underscored numbers, nobody means them.
    words = ["rewards.models.size.params.a=0123", "rewards.models.size.params.b=1:30", "rewards.models.size.params.c=2024_11"]
    assert load(*words).rewards.models["size"].params == {"a": "0123", "b": "1:30", "c": "2024_11"}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr=fast", "optim.lr is 'fast'; it must be a number"),
        ("optim.lr=", "optim.lr is ''; it must be a number"),
        ("grpo.group_size=010", "grpo.group_size is '010'; it must be a whole number"),
        ("grpo.group_size=1e3", "it must be a whole number"),
        ("run.seed=" + "9" * 5000, "it must be a whole number"),
        ("run.threads=x", "run.threads is 'x'; it must be a whole number, or null for none"),
        ("run.deterministic=2", "run.deterministic is '2'; it must be true or false"),
        ("optim.betas=[1,", r"optim.betas=\[1,: not valid YAML"),
        ("optim.betas=0.9", r"optim.betas is '0.9'; it must be a list, for example \[0.5, 1\]"),
        ("optim.betas=[a, 1]", "optim.betas.0 is 'a'; it must be a number"),
        ("model.lora.targets=[to_q, no]", 'model.lora.targets.1 is no, which YAML reads as a truth value.*write "no"'),
        ("model=5", "model is '5'; it must be a section"),
        ("sample=null", "sample is 'null'; it must be a section"),
        ("model.lora=", "model.lora= is empty"),
        ("sample.steps.x=3", "sample.steps is .*; it must be a whole number"),
        ("rewards.models.size=5", "rewards.models.size is '5'; it must be a section"),
        ("rewards.models.size.params=5", "it must be {name: value, ...}"),
        ("rewards.models.size.params.quality=", "is empty"),
        ("rewards.models.size.params.x=!!python/name:os.system", "the tag !!python/name:os.system is not for configurations"),
        ("=3", "unknown key"),
        ("run..dir=3", "unknown key run."),
        ("rewards.async_=true", "unknown key rewards.async_: did you mean rewards.async"),
    ],
)
def test_what_a_key_cannot_be_is_told_in_a_line(load, word, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(word)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sample: {negative_prompt: no}",
            r'negative_prompt is no \(.*given.yaml, line 1\), which YAML reads as a truth.*write "no"',
        ),
        ("run:\n  dir: 0123", r'run.dir is 0123 \(.*line 2\), which YAML reads as a number.*write "0123"'),
        ("run: {dir: 20241127_093000}", 'write "20241127_093000"'),
        ("run: {dir: 1e5}", 'write "1e5"'),
        ("run: {dir: 2024-11-27}", 'reads as a date.*write "2024-11-27"'),
        ("run: {dir: ~}", 'reads as nothing.*write "~"'),
        ("sample:\n  negative_prompt:\n", r'sample.negative_prompt is left empty \(.*line 2\).*write ""'),
        ("prompts: {eval_path: yes}", 'write "yes"'),
        ("rewards: {models: {a: {kind: jpeg_size, url: 5}}}", 'rewards.models.a.url is 5 .*write "5"'),
        ("engine: {activation_checkpointing: off}", 'write "off"'),
        ("sample: {negative_prompt: [a]}", "it must be a text"),
        ("sample: {stepz: 5}", r"unknown key sample.stepz \(.*line 1\): did you mean sample.steps"),
        ("sample: {steps: many}", r"sample.steps is 'many' \(.*line 1\); it must be a whole number"),
        ("sample: null", "sample is 'null' .*it must be a section"),
    ],
)
def test_a_file_says_where_a_value_is_not_what_its_key_wants(load_file, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_file(text)
    assert "\n" not in str(error.value)


def test_choices_that_yaml_reads_as_something_else_are_taken_as_written(load_file):
    with pytest.raises(ConfigError, match=r"run\.wandb is 'off' .did you mean 'offline'..; allowed: disabled, offline, online"):
        load_file(MINIMAL.replace("{dir: runs/x}", "{dir: runs/x, wandb: off}"))


def test_a_section_with_nothing_in_it_is_none_given(load_file):
    assert load_file(MINIMAL + "grpo:\noptim:\n  # lr: 1\n").optim.lr == 1e-5


@pytest.mark.parametrize(
    "text",
    [
        *(
            "key: : :",
            "{",
            "[1,",
            "- 1\n- 2",
            "5",
            "foo",
            "\tx: 1",
            "run:\n\tdir: x",
            "run: {dir: a}\nrun: {dir: b}",
            "a: b\n---\nc: d",
        ),
        *(
            "a: !!python/object/apply:os.system ['x']",
            "x: &a [*a]",
            "x: &a {<<: *a}",
            "a: *x",
            "? [a]\n: 5",
            "!!binary x",
        ),
        *(
            "%YAML 9.9\n---\na: b",
            "run: {seed: !!bool x}",
            "run: {seed: !!float ''}",
            "<<: 5",
            "1: 2",
            "\x00\x01\x7fELF",
            "a: \x07",
        ),
        *(b"run: {dir: caf\xe9}", "run: {dir: x}".encode("utf-16-le"), b"\xff\xfe\x00", bytes(range(256)), b"\x80\x02}q\x00."),
        *(
            "base: [a]",
            "base: 5",
            "base: ''",
            "base: nothing.yaml",
            "base: given.yaml",
            "base: .",
            "run: 5",
            "rewards: {models: [a]}",
        ),
    ],
)
def test_no_file_is_a_traceback(load_file, tmp_path, capsys, text):
    with pytest.raises(ConfigError) as error:
        load_file(text)
    assert "\n" not in str(error.value) and ("given.yaml" in str(error.value) or "missing" in str(error.value))
    assert cli.main(["train", str(tmp_path / "given.yaml"), "--dry-run"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_no_depth_is_a_traceback():
    with pytest.raises(ConfigError, match=r"deep.yaml: not valid YAML: nested too deeply"):
        config_files.parse("[" * 1500, "deep.yaml")


def test_random_bytes_and_mangled_files_are_told_in_a_line_or_read(load_file):
    chance = random.Random(0)
    for _ in range(300):
        text = bytearray(MINIMAL.encode())
        for _ in range(chance.randrange(1, 6)):
            text[chance.randrange(len(text))] = chance.choice(b"{}[]:,-#&*!|>'\"%@`\t\n \\~?=0\x00\xff")
        try:
            load_file(bytes(text))
        except UserError as error:
            assert len(str(error)) < 2000
    for _ in range(100):
        with pytest.raises(UserError):
            load_file(chance.randbytes(chance.randrange(1, 60)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_first_key(load_file, encoding):
    assert load_file(MINIMAL.encode(encoding)) == load_file(MINIMAL)


def test_what_is_no_file_is_told(tmp_path):
    (tmp_path / "config.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"is a folder, but a YAML file is needed; its configuration is .*config.yaml"):
        run_config.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such configuration file: .*confg.yaml .did you mean .*config.yaml"):
        run_config.load(tmp_path / "confg.yaml")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        run_config.load(tmp_path / "nowhere" / "config.yaml")


@pytest.mark.parametrize("text", NASTY)
def test_a_text_comes_back_from_the_configuration_that_a_run_leaves(load, tmp_path, text):
    config = load()
    config.sample.negative_prompt = text
    config.model.lora = LoRAConfig(targets=["to_q", text])
    config.rewards.models[text or "empty"] = RewardConfig(
        "jpeg_size", url=text, params={text: [text, {text: None}]}
    )
    written = tmp_path / "config.yaml"
    written.write_bytes(config_saved.to_yaml(config).encode())
    filled = config_loading.filled(config_files.read(written)[0][1])
    assert config_saved.to_dict(filled) == config_saved.to_dict(config)


@pytest.mark.parametrize("text", [text for text in NASTY if text])
def test_so_do_paths(load, tmp_path, text):
    assert expanded(as_typed(text)) in (text, f"./{text}")
    config = load()
    config.run.dir, config.model.path, config.prompts.embeddings = f"a/{text}", f"$/{text}$HOME", f"{text}/b"
    config.rewards.models["size"].checkpoint = f"$${text}"
    config.rewards.models["hps"] = RewardConfig(
        "hps", checkpoint="x", params={"tokenizer": f"$A/{text}", "x": "$B"}
    )
    written = tmp_path / "config.yaml"
    written.write_bytes(config_saved.to_yaml(config).encode())
    again = config_loading.filled(config_files.read(written)[0][1])
    again.prompts.embeddings = again.prompts.embeddings.removeprefix("./") if text.startswith("~") else again.prompts.embeddings
    assert config_saved.to_dict(again) == config_saved.to_dict(config)


def test_every_type_of_the_configuration_is_one_that_is_known():
    def sorts(cls):
        for _, key in keys(cls).values():
            yield key.sort
            if key.sort in ("section", "names"):
                yield from sorts(key.of)

    assert {*sorts(Config)} == {"section", "names", "free", "list", "text", "whole", "number", "truth"}
