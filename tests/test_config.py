"""The configuration: every wrong key and value stops at once and says what would work."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from fastvideo_grpo import cli
from fastvideo_grpo.config import reference as config_reference
from fastvideo_grpo.config import saved as config_saved
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.grpo.objectives import OBJECTIVES
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.models.flux.tiny import write_flux
from fastvideo_grpo.models.hunyuan_video.tiny import write_hunyuan_video
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.models.run_config import load as load_config
from fastvideo_grpo.planning import plan
from fastvideo_grpo.planning.run_steps import RunSteps, evaluations_per_sample

ROOT = Path(__file__).parent.parent
MINIMAL = """
model: {path: model}
prompts: {path: prompts.txt}
rewards: {models: {size: {kind: jpeg_size}}}
run: {dir: runs/x}
"""


@pytest.fixture
def load(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    return lambda *overrides: load_config(file, list(overrides))


def test_yaml_then_overrides(load):
    config = load("grpo.group_size=8", "optim.lr=3e-4", "model.lora.rank=4", "run.iterations=7")
    assert (config.grpo.group_size, config.optim.lr, config.run.iterations) == (8, 3e-4, 7)
    assert config.model.lora.rank == 4 and config.model.lora.alpha == 256 and load().model.lora is None


@pytest.mark.parametrize(
    "override,message",
    [
        ("grpo.grup_size=8", "unknown key grpo.grup_size: did you mean grpo.group_size"),
        ("rewards.models.size.outputs.jpeg_size.wieght=1", "keys here: weight, threshold"),
        ("rewards.models.size.knd=x", "keys here: kind, checkpoint, params, placement, .*, outputs"),
        ("nothing=1", "keys here: model, prompts"),
        ("rewards.async=maybe", "rewards.async is 'maybe'; it must be true or false .score while later micro-batches"),
        ("grpo.group_size=many", "grpo.group_size is 'many'; it must be a whole number .samples of each prompt"),
        ("grpo.group_size=1", "grpo.group_size is 1; it must be at least 2"),
        ("optim.lr=0", "optim.lr is 0.0; it must be above 0"),
        ("optim.lr=nan", "finite"),
        ("grpo.timesteps.fraction=1.5", "at most 1"),
        ("model.kind=fluxx", "allowed: flux"),
        ("sample.transition=euler", "allowed: cps, ddim, diffusion_sde, flow_sde, ode"),
        ("sample.transition=ode", "no log-prob"),
        ("grpo.timesteps.strategy=all", "must be 1.0"),
        ("grpo.best_of={top: 8, bottom: 8}", "at least 16"),
        ("optim.betas=[0.9]", "two numbers"),
        ("optim.ema_decay=1.0", "never moves"),
        ("engine.offload=optimizer", "engine.kind=deepspeed"),
        ("rewards.models.size.outputs={jpeg_size: {weight: 0}}", "at least one must count"),
    ],
)
def test_wrong_keys_and_values_stop_with_a_way_out(load, override, message):
    with pytest.raises(ConfigError, match=message):
        load(override)


def test_missing_keys_are_named_with_their_meaning(tmp_path):
    (tmp_path / "x.yaml").write_text("run: {dir: x}")
    with pytest.raises(ConfigError, match=r"missing: model.path .checkpoint folder.*; prompts.path"):
        load_config(tmp_path / "x.yaml")


def test_no_rewards(tmp_path):
    (tmp_path / "x.yaml").write_text(MINIMAL.replace("{size: {kind: jpeg_size}}", "{}"))
    with pytest.raises(ConfigError, match="name at least one reward"):
        load_config(tmp_path / "x.yaml")


def test_all_problems_of_values_are_told_at_once(load):
    with pytest.raises(ConfigError) as error:
        load("optim.lr=-1", "sample.steps=1", "model.precision=fp16")
    assert all(key in str(error.value) for key in ("optim.lr", "sample.steps", "model.precision"))


def test_override_without_equals_sign_and_missing_file(load, tmp_path):
    with pytest.raises(ConfigError, match="key=value"):
        load("run.iterations")
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")


def test_base_is_read_first(tmp_path):
    (tmp_path / "base.yaml").write_text(MINIMAL)
    (tmp_path / "more.yaml").write_text("base: base.yaml\ngrpo: {group_size: 6}\n")
    config = load_config(tmp_path / "more.yaml")
    assert config.grpo.group_size == 6 and config.model.path == "model"


def test_written_yaml_reads_back_equal(load, tmp_path):
    config = load("model.lora.rank=4", "grpo.best_of={top: 2, bottom: 3}")
    (tmp_path / "written.yaml").write_text(config_saved.to_yaml(config))
    assert load_config(tmp_path / "written.yaml") == config


def test_the_reference_says_what_models_and_objectives_have_where_a_key_is_left_out():
    page = config_reference.reference(FAMILIES).splitlines()
    for registry in (FAMILIES, OBJECTIVES):
        for name, thing in registry.usable().items():
            for section, values in getattr(thing, "defaults", {}).items():
                for key, value in values.items():
                    row = [line for line in page if line.startswith(f"| `{section}.{key}")]
                    shown = value.values() if isinstance(value, dict) else [value]
                    assert all(any(name in line and f": {one}" in line for line in row) for one in shown), (name, section, key)


def test_reference_page_is_current():
    page = (ROOT / "docs" / "configuration.md").read_text()
    printed = config_reference.HEAD + config_reference.reference(FAMILIES)
    assert printed == page, "run: python docs/configuration.py"


# --- plan -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_flux(tmp_path_factory.mktemp("plan") / "flux")


@pytest.fixture
def run_config(load, checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    fixed = [f"model.path={checkpoint}", f"prompts.path={tmp_path / 'prompts.txt'}", "prompts.text_length=16"]

    def make(*overrides):
        return load(*fixed, *overrides)

    return make


def _check(config, ranks=1):
    plan.check_run(config, model_facts(config), ranks)


def test_a_good_configuration_passes(run_config):
    _check(run_config())


@pytest.mark.parametrize(
    "overrides,ranks,message",
    [
        (["sample.height=100"], 1, "sample.height is 100; it must be a multiple of 16 for this model: 96 or 112"),
        ([], 2, "set engine.kind=deepspeed"),
        (["engine.micro_batch_size=5"], 1, "engine.micro_batch_size=4 or 6"),
        (["engine.kind=deepspeed"], 7, "cannot be dealt evenly to 7 processes.*grpo.prompts_per_iteration=28 or 56"),
        (["grpo.updates_per_iteration=5"], 1, "grpo.updates_per_iteration=4 or 8"),
        (["model.attention=flash", "model.precision=fp32"], 1, "bf16"),
        (["model.attention=flash"], 1, "flash-attn is not installed"),
        (["prompts.path=nowhere.txt"], 1, "prompts.path: no such prompt file"),
        (["prompts.text_length=600"], 1, "at most 512"),
        (["sample.frames=5"], 1, "sample.frames is 5, but flux makes images; use 1"),
        (["sample.transition=ddim"], 1, "for predictions of noise, but flux predicts velocity; use cps or flow_sde"),
        (["grpo.cfg_gradients=conditional"], 1, "no guidance"),
        (["engine.sequence_parallel=2"], 1, "needs engine.kind=deepspeed"),
        (["engine.kind=deepspeed", "engine.sequence_parallel=3"], 6, "must divide the 6 processes and the model's 4 .*: 1, 2"),
        (["engine.kind=deepspeed", "engine.sequence_parallel=4"], 6, "must divide the 6 processes"),
        (["engine.activation_checkpointing=every:0"], 1, "allowed: none, full, every:K"),
        (["engine.activation_checkpointing=every:²"], 1, "allowed: none, full, every:K"),
        (["engine.activation_checkpointing=every:" + "9" * 5000], 1, "allowed: none, full, every:K"),
        (["rewards.models..kind=jpeg_size"], 1, "rewards.models has the name ''"),
        (["model.lora.targets=[]"], 1, "model.lora.targets names no layer"),
        (["engine.activation_checkpointing=True"], 1, "allowed: none, full, every:K"),
        (["rewards.models.size.kind=jpg_size"], 1, "jpeg_size"),
        (["rewards.models.size.params={qality: 3}"], 1, "quality"),
        (["rewards.models.size.outputs={score: {weight: 1}}"], 1, "jpeg_size"),
    ],
)
def test_what_the_model_and_the_processes_rule_out(run_config, overrides, ranks, message):
    with pytest.raises(ConfigError, match=message):
        _check(run_config(*overrides), ranks)


@pytest.fixture(scope="module")
def video_checkpoint(tmp_path_factory):
    return write_hunyuan_video(tmp_path_factory.mktemp("plan") / "hunyuan-video")


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["sample.width=40"], "sample.width is 40; it must be a multiple of 16 for this model: 32 or 48"),
        (["engine.kind=deepspeed", "engine.sequence_parallel=3"], "must divide the 1 processes and the model's 4"),
        (["sample.transition=ddim"], "hunyuan_video predicts velocity"),
        (["model.kind=flux"], "holds a HunyuanVideoPipeline.*set model.kind=hunyuan_video"),
        (["rewards.models.size.kind=moving_colour", "sample.frames=5"], None),
    ],
)
def test_what_a_video_model_rules_out(run_config, video_checkpoint, overrides, message):
    settings = [f"model.path={video_checkpoint}", "model.kind=hunyuan_video", "sample.height=32", "sample.width=32", *overrides]
    if message is None:
        _check(run_config(*settings))
        return
    with pytest.raises(ConfigError, match=message):
        _check(run_config(*settings))


@pytest.mark.parametrize(
    ("ratio", "frames", "message"),
    [(4, 6, "4k . 1 for this model: 5 or 9"), (2, 4, "2k . 1 for this model: 3 or 5"), (2, 3, None)],
)
def test_how_many_frames_is_the_models_vae_to_say(run_config, video_checkpoint, ratio, frames, message):
    settings = [f"model.path={video_checkpoint}", "model.kind=hunyuan_video", "sample.height=32", "sample.width=32"]
    config = run_config(*settings, f"sample.frames={frames}")
    facts = model_facts(config)
    facts.vae["temporal_compression_ratio"] = ratio
    problems = list(FAMILIES["hunyuan_video"].problems(config, facts))
    if message is None:
        assert not problems
    else:
        assert re.match(f"sample.frames is {frames}; it must be {message}", *problems)


def test_a_deepspeed_json_is_compared_before_anything_is_loaded(run_config, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}')
    settings = ["engine.kind=deepspeed", f"engine.deepspeed_json={file}"]
    _check(run_config(*settings, "engine.zero_stage=3"), 2)
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage.*engine\.zero_stage"):
        _check(run_config(*settings, "engine.zero_stage=2"), 2)


def test_blocks_are_not_compiled_where_weights_are_gathered_inside_them(run_config):
    settings = ["engine.kind=deepspeed", "model.compile=blocks"]
    with pytest.raises(ConfigError, match=r"engine\.zero_stage=3.*use engine\.zero_stage=2, or compile=none"):
        run_config(*settings, "engine.zero_stage=3")
    run_config(*settings, "engine.zero_stage=2")
    run_config("model.compile=blocks", "engine.zero_stage=3")  # one process, without DeepSpeed


def test_a_reward_may_not_take_longer_than_the_other_processes_wait(run_config):
    settings = ["engine.kind=deepspeed", "rewards.timeout_s=600", "rewards.retries=2", "rewards.backoff_s=0.5"]
    with pytest.raises(ConfigError, match=r"1801.5 s for a micro-batch.*run.timeout_minutes to at least 36"):
        run_config(*settings, "run.timeout_minutes=30")
    run_config(*settings, "run.timeout_minutes=36")
    run_config(*settings[1:], "run.timeout_minutes=30")  # one process


def test_a_run_may_go_on_with_its_reward_behind_a_server(run_config):
    from fastvideo_grpo.config.saved import changed_on_resume, to_dict

    before = run_config("rewards.models.size.params.quality=50", "rewards.async=true")
    same = ["rewards.models.size.placement=process", "rewards.models.size.params.quality=50"]
    assert changed_on_resume(to_dict(before), run_config(*same)) == []
    other = run_config("rewards.models.size.params.quality=60")
    assert changed_on_resume(to_dict(before), other) == ["rewards.models.size.params.quality"]
    served = run_config("rewards.models.size.placement=http", "rewards.models.size.url=http://127.0.0.1:8800")
    assert changed_on_resume(to_dict(before), served) == [] == changed_on_resume(to_dict(served), before)


def test_too_little_memory_is_a_warning_with_ways_out(run_config, monkeypatch, caplog):
    config = run_config("sample.height=64", "sample.width=64")
    facts = model_facts(config)
    with caplog.at_level("WARNING", "fastvideo_grpo"):
        plan.warn_of_memory(config, facts, 1)
        assert not caplog.records
        monkeypatch.setattr("os.sysconf", lambda name: 1000)  # pages and their size: a megabyte
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        plan.warn_of_memory(config, facts, 1)
    assert "engine.activation_checkpointing=full" in caplog.text and "1.0 MiB for it" in caplog.text


def test_too_little_host_memory_is_a_warning_on_gpus_too(run_config, monkeypatch, caplog):
    config = run_config("sample.height=64", "sample.width=64", "engine.offload_idle=true")
    facts = model_facts(config)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=2**40))
    with caplog.at_level("WARNING", "fastvideo_grpo"):
        plan.warn_of_memory(config, facts, 1)
        assert not caplog.records
        monkeypatch.setattr("os.sysconf", lambda name: 100)
        plan.warn_of_memory(config, facts, 1)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "of host memory" in message and "trajectories" in message and "VAE" in message and "grpo.group_size" in message


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["placement=http", "url=http://127.0.0.1:9"], r"rewards.models.size: no reward server answers at http://127.0.0.1:9"),
        (["placement=http"], r"rewards.models.size.url is missing"),
        (["placement=process", "python=no/such/python"], r"rewards.models.size: python is 'no/such/python'"),
    ],
)
def test_where_a_reward_runs_is_looked_at_before_the_model_is_loaded(run_config, settings, text):
    config = run_config(*(f"rewards.models.size.{setting}" for setting in settings))
    with pytest.raises(ConfigError, match=text):
        plan.check_run(config, model_facts(config), 1)
    if "url is missing" not in text:
        plan.check_run(config, model_facts(config), 1, here=False)


def test_wrong_checkpoints_are_named(run_config, checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist.*fastvideo-grpo tiny flux"):
        model_facts(run_config(f"model.path={tmp_path / 'nothing'}"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ConfigError, match=r"holds a StableDiffusionPipeline.*needs a FluxPipeline"):
        model_facts(run_config(f"model.path={other}"))
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ConfigError, match=r"lacks the folders transformer, vae"):
        model_facts(run_config(f"model.path={other}"))


# --- recipes ----------------------------------------------------------------------------------------------------------

PROCESSES = {
    "flux_t2i_awm": 8,
    "flux_t2i_flowgrpo": 32,
    "flux_t2i_mixgrpo": 32,
    "flux_t2i_mixgrpo_flash": 32,
    "flux_t2i_mixgrpo_flash_star": 32,
    "flux_t2i_nft": 8,
    "flux_t2i_paper": 32,
    "flux_t2i_paper_hps_clip": 32,
    "flux_t2i_paper_lora": 8,
    "flux_t2i_released": 16,
    "flux_t2i_released_8gpu": 8,
    "flux_t2i_released_hps_clip": 16,
    "flux_t2i_released_lora": 8,
    "flux_t2i_tiny": 1,
    "flux_t2i_tiny_lora": 1,
    "hunyuan_t2i_paper": 32,
    "hunyuan_t2i_released": 16,
    "hunyuan_t2i_released_8gpu": 8,
    "hunyuan_t2i_released_lora": 8,
    "hunyuan_t2i_tiny": 1,
    "hunyuan_t2i_tiny_lora": 1,
    "hunyuan_t2v_paper_mq": 64,
    "hunyuan_t2v_paper_vq": 64,
    "hunyuan_t2v_paper_vq_mq": 64,
    "hunyuan_t2v_paper_vq_zero3": 64,
    "hunyuan_t2v_released_mq": 32,
    "hunyuan_t2v_released_mq_8gpu": 8,
    "hunyuan_t2v_released_mq_lora": 8,
    "hunyuan_t2v_released_vq": 32,
    "hunyuan_t2v_released_vq_8gpu": 8,
    "hunyuan_t2v_released_vq_lora": 8,
    "hunyuan_t2v_tiny": 1,
    "hunyuan_t2v_tiny_lora": 1,
    "skyreels_i2v_paper": 32,
    "skyreels_i2v_released": 32,
    "skyreels_i2v_released_8gpu": 8,
    "skyreels_i2v_tiny": 1,
    "skyreels_i2v_tiny_lora": 1,
    "stable_diffusion_t2i_paper": 8,
    "stable_diffusion_t2i_paper_hps_clip": 8,
    "stable_diffusion_t2i_released": 8,
    "stable_diffusion_t2i_released_lora": 8,
    "stable_diffusion_t2i_tiny": 1,
    "stable_diffusion_t2i_tiny_lora": 1,
    "wan_t2v_flashgrpo": 96,
    "wan_t2v_paper": 32,
    "wan_t2v_released": 32,
    "wan_t2v_released_image": 8,
    "wan_t2v_tiny": 1,
    "wan_t2v_tiny_lora": 1,
}
SIZES = {
    "flux_t2i": ("11.901 B parameters", "latents 16x90x90, 2025 tokens, 512 text tokens"),
    "hunyuan_t2i": ("12.821 B parameters", "latents 16x1x90x90, 2025 tokens, 256 text tokens"),
    "hunyuan_t2v": ("12.821 B parameters", "latents 16x14x60x60, 12600 tokens, 256 text tokens"),
    "skyreels_i2v": ("12.821 B parameters", "latents 16x14x50x80, 14000 tokens, 256 text tokens"),
    "stable_diffusion": ("0.860 B parameters", "latents 4x64x64, 4096 tokens, 77 text tokens"),
    "flux_t2i_flowgrpo": ("0.179 B trained (LoRA rank 64)", "latents 16x64x64, 1024 tokens, 128 text tokens, 6 steps"),
    "flux_t2i_nft": ("0.179 B trained (LoRA rank 64)", "clean samples with noise at 2 of 8 levels a sample"),
    "flux_t2i_awm": ("0.179 B trained (LoRA rank 64)", "clean samples with noise at 4 of 10 levels a sample"),
    "wan_t2v": ("1.419 B parameters", "noise level 0.3, shift 3.0), guidance 5 in one pass"),
    "wan_t2v_flashgrpo": ("11.796 M trained (LoRA rank 16)", "latents 16x21x60x104, 32760 tokens, 512 text tokens, 20 steps"),
}


def test_every_recipe_is_listed_here():
    assert {path.stem for path in (ROOT / "train_scripts" / "configs").glob("*.yaml")} == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_every_recipe_is_checked_at_its_real_size_on_the_meta_device(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(ROOT / "train_scripts" / "configs" / f"{name}.yaml")
    facts = model_facts(config, published_if_missing=True)
    plan.check_run(config, facts, PROCESSES[name], here=False)
    text = plan.describe(config, facts, PROCESSES[name])
    if "tiny" not in name:
        assert all(size in text for size in SIZES.get(name, SIZES["_".join(name.split("_")[:2])]))
        assert name in SIZES or ("LoRA rank 128" in text) == ("lora" in name)
        assert config.run.dir == f"runs/{name}"


@pytest.mark.parametrize("name", [name for name in PROCESSES if name.startswith("hunyuan_t2v") and "tiny" not in name])
def test_the_video_recipes_train_on_what_their_name_says(name):
    config = load_config(ROOT / "train_scripts" / "configs" / f"{name}.yaml")
    reward, parts = config.rewards.models["videoalign"], name.split("_")
    counted = {output for output, settings in reward.outputs.items() if settings.weight > 0}
    assert (reward.kind, reward.checkpoint) == ("videoalign", "checkpoints/VideoReward")
    assert counted == {output for output in ("VQ", "MQ") if output.lower() in parts}
    paper = "paper" in parts
    base, template = "checkpoints/Qwen2-VL-2B-Instruct", "checkpoints/VideoAlign"
    assert reward.params == {"base": base, "template": template, "fps": 4 if paper else 2, "mp4": True}
    sample, grpo = config.sample, config.grpo
    assert (sample.steps, sample.noise_level, sample.shift, sample.fps) == (25 if paper else 16, 0.3 if paper else 0.25, 5, 8)
    assert (grpo.prompts_per_iteration, grpo.group_size, grpo.updates_per_iteration) == ((32, 12, 4) if paper else (32, 24, 2))
    assert grpo.best_of is None if paper else (grpo.best_of.top, grpo.best_of.bottom) == (4, 4)


@pytest.mark.parametrize("name", [name for name in PROCESSES if name.startswith("skyreels_i2v") and "tiny" not in name])
def test_the_image_to_video_recipes_train_on_motion_with_guidance(name):
    config = load_config(ROOT / "train_scripts" / "configs" / f"{name}.yaml")
    reward, paper, sample, grpo = config.rewards.models["videoalign"], "paper" in name, config.sample, config.grpo
    assert {output: settings.weight for output, settings in reward.outputs.items()} == {"MQ": 1.0, "VQ": 0.0, "TA": 0.0}
    assert (sample.height, sample.width, sample.frames, sample.fps) == (400, 640, 53, 8)
    assert (sample.steps, sample.shift, sample.noise_level) == (25 if paper else 16, 7, 0.3)
    assert (sample.cfg_scale, sample.guidance_scale) == (5.0, 1.0)
    assert (grpo.prompts_per_iteration, grpo.group_size, grpo.updates_per_iteration) == (32, 8, 1)


@pytest.mark.parametrize("name", [name for name in PROCESSES if name.startswith("stable_diffusion") and "tiny" not in name])
def test_the_stable_diffusion_recipes_have_the_numbers_they_name(name):
    config = load_config(ROOT / "train_scripts" / "configs" / f"{name}.yaml")
    paper, sample, grpo = "paper" in name, config.sample, config.grpo
    assert (sample.height, sample.width, sample.steps, sample.transition) == (512, 512, 50, "ddim")
    assert (sample.noise_level, sample.cfg_scale, grpo.cfg_gradients, grpo.clip_range) == (1.0, 5.0, "both", 1e-4)
    assert (grpo.prompts_per_iteration, grpo.group_size, grpo.updates_per_iteration) == ((32, 12, 1) if paper else (32, 16, 2))
    times = ("random", 0.6) if paper else ("all", 1.0)
    assert (grpo.timesteps.strategy, grpo.timesteps.fraction) == times


@pytest.mark.parametrize("name", ["wan_t2v_paper", "wan_t2v_released", "wan_t2v_released_image"])
def test_the_wan_recipes_have_the_numbers_they_name(name):
    config = load_config(ROOT / "train_scripts" / "configs" / f"{name}.yaml")
    paper, image, sample, grpo = "paper" in name, "image" in name, config.sample, config.grpo
    size = (512, 512, 1) if image else (480, 832, 53)
    assert (sample.height, sample.width, sample.frames) == size and config.prompts.text_length == (226 if image else 512)
    assert (sample.steps, sample.shift, sample.noise_level, sample.cfg_scale) == (25 if paper else 20, 3.0, 0.3, 5.0)
    dealt = (grpo.prompts_per_iteration, grpo.group_size, grpo.updates_per_iteration)
    assert dealt == ((16, 12, 1) if image else (32, 12 if paper else 8, 1)) and grpo.cfg_gradients == "both"
    assert list(config.rewards.models) == ["hps" if image else "videoalign"]


# Steps, noise level, stochastic steps, tail, trained transitions; evaluations a sample of rollout and update, on average: of
# MixGRPO's 12 places before the window 5.5 steps, drawn by each of the 4 processes that a group of 12 is dealt to, and 19.5.
METHODS = {
    "flux_t2i_mixgrpo": (25, 0.7, 4, 1.0, 4, (5.5 * 4 / 12 + 19.5, 12)),
    "flux_t2i_mixgrpo_flash": (25, 0.7, 4, 0.4, 4, (7 * 4 / 12 + 4 + 6, 12)),
    "flux_t2i_mixgrpo_flash_star": (25, 0.7, 4, 0.2, 4, (9, 12)),
    "flux_t2i_flowgrpo": (6, 0.9, 6, 1.0, 5, (6, 15)),
    "wan_t2v_flashgrpo": (20, 0.7, 1, 1.0, 1, (20, 3)),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_recipes_of_later_methods_have_the_numbers_they_name(name):
    config = load_config(ROOT / "train_scripts" / "configs" / f"{name}.yaml")
    sample, steps = config.sample, RunSteps(config)
    tail = sample.stochastic.tail
    assert (sample.steps, sample.noise_level, steps.stochastic.count, tail, steps.trained) == METHODS[name][:5]
    assert sample.noise_schedule == "flow_grpo" and config.grpo.trust_region == "clip"
    dealt = plan.dealing(config, PROCESSES[name])
    assert evaluations_per_sample(config, dealt) == pytest.approx(METHODS[name][5], abs=0.05)


# Steps, trained levels; evaluations a sample of rollout and update, each level with one output stored before it for each of the
# weights that are asked; forwards that are stored by a process.
ON_CLEAN_SAMPLES = {
    "flux_t2i_nft": (8, 2, (8, 8), "outputs of weights that drew, 96 forwards a process before the first update, and one that"),
    "flux_t2i_awm": (10, 4, (10, 20), "outputs of weights that drew and the moving average, 384 forwards a process"),
}


@pytest.mark.parametrize("name", ON_CLEAN_SAMPLES)
def test_the_recipes_on_clean_samples_have_the_numbers_they_name(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(ROOT / "train_scripts" / "configs" / f"{name}.yaml")
    steps, (count, trained, evaluations, said) = RunSteps(config), ON_CLEAN_SAMPLES[name]
    assert (config.sample.steps, steps.trained, steps.clean) == (count, trained, True)
    assert evaluations_per_sample(config, plan.dealing(config, 8)) == evaluations
    text = plan.describe(config, model_facts(config, published_if_missing=True), 8)
    assert said in text and f"{count} steps of the ODE, none stochastic" in text and "GiB" in text
    assert "stored outputs" in text and ("drawn by   old weights" in text) == (name == "flux_t2i_nft")


def test_a_model_has_defaults_of_its_own_where_nothing_is_given(tmp_path):
    def load(*overrides):
        (tmp_path / "c.yaml").write_text(
            "model: {path: x}\nprompts: {path: p.jsonl}\nrun: {dir: r}\nrewards: {models: {m: {kind: jpeg_size}}}"
        )
        config = load_config(tmp_path / "c.yaml", list(overrides))
        return config.sample.cfg_scale, config.sample.guidance_scale, config.grpo.updates_per_iteration

    assert load() == (1.0, 3.5, 4)
    assert load("model.kind=skyreels_i2v") == (5.0, 1.0, 1)
    assert load("model.kind=skyreels_i2v", "sample.cfg_scale=3", "grpo.updates_per_iteration=2") == (3.0, 1.0, 2)
    assert load("model.kind=stable_diffusion") == load("model.kind=wan") == (5.0, 3.5, 1)


def test_many_updates_with_guidance_are_cautioned(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["train", "train_scripts/configs/skyreels_i2v_tiny.yaml", "--dry-run"]
    assert cli.main(command) == 0 and "one update per" not in capsys.readouterr().out
    assert cli.main([*command, "grpo.updates_per_iteration=2"]) == 0
    text = capsys.readouterr().out
    assert "grpo.updates_per_iteration is 2 with sample.cfg_scale=5" in text
    # 8 micro-batches x 6 steps x 2 passes; 4 of 6 timesteps.
    assert "= 96 forwards a process" in text and "= 64 forwards and backwards a process" in text


def test_a_negative_prompt_without_guidance_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"sample.negative_prompt is 'blur'.*cfg_scale=1.*above 1"):
        load_config(ROOT / "train_scripts/configs/flux_t2i_tiny.yaml", ["sample.negative_prompt=blur"])


@pytest.mark.parametrize("name", ["flux_t2i_paper", "flux_t2i_released", "stable_diffusion_t2i_paper"])
def test_the_hps_and_clip_recipes_differ_from_hps_alone_in_the_rewards_only(name):
    alone, both = (
        config_saved.to_dict(load_config(ROOT / "train_scripts" / "configs" / f"{name}{end}.yaml")) for end in ("", "_hps_clip")
    )
    hps, clip = both["rewards"]["models"]["hps"], both["rewards"]["models"].pop("clip")
    assert (clip["kind"], clip["checkpoint"]) == ("clip", "checkpoints/DFN5B-CLIP-ViT-H-14-378")
    assert (hps["outputs"]["hps"]["weight"], clip["outputs"]["clip"]["weight"]) == (0.7, 1.4)
    hps["outputs"], both["run"]["dir"] = alone["rewards"]["models"]["hps"]["outputs"], alone["run"]["dir"]
    assert both == alone


def test_dry_run_from_the_command_line_loads_nothing_heavy():
    """``--help`` and errors come at once: neither FastVideo nor DeepSpeed is imported."""
    code = (
        "import sys; from fastvideo_grpo import cli\n"
        "try: cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'fastvideo', 'deepspeed', 'diffusers', 'transformers', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout and "examples:" in done.stdout


@pytest.mark.parametrize("options_first", [True, False])
def test_dry_run_prints_the_resolved_configuration_and_the_plan(monkeypatch, capsys, options_first):
    monkeypatch.chdir(ROOT)
    file = "train_scripts/configs/flux_t2i_released_8gpu.yaml"
    options, overrides = ["--dry-run", "--world-size", "4"], ["run.iterations=7", "optim.lr=3e-4"]
    words = [*options, *overrides] if options_first else [*overrides, *options]
    assert cli.main(["train", file, *words]) == 0
    resolved, _, text = capsys.readouterr().out.partition("\n\n")
    expected = load_config(file, overrides)
    assert yaml.safe_load(resolved) == config_saved.to_dict(expected)
    assert expected.run.iterations == 7 and expected.optim.lr == 3e-4
    assert plan.describe(expected, model_facts(expected, published_if_missing=True), 4) in text
    assert "processes    4 (deepspeed, ZeRO" in text and "7 iterations in" in text


def test_world_size_is_for_dry_runs_only(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(["train", "train_scripts/configs/flux_t2i_tiny.yaml", "--world-size", "4"]) == 1
    assert "--dry-run" in capsys.readouterr().err


def _examples():
    for name in ("train", "sample", "export", "demo", "study"):
        epilog = importlib.import_module(f"fastvideo_grpo.commands.{name}").EPILOG
        yield from (line.strip() for line in epilog.splitlines() if line.startswith("  fastvideo-grpo "))


@pytest.mark.parametrize("line", list(_examples()))
def test_every_example_of_the_help_can_be_typed(line):
    _, command, *words = shlex.split(line, comments=True)
    arguments, module = cli.parse([command, *words])
    assert arguments.command == command and module.__name__ == cli.SUBCOMMANDS[command][0]
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    assert getattr(arguments, "overrides", []) == overrides
