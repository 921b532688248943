"""VideoAlign: the scores of transformers' own Qwen2-VL, the released code's, and files that are not what they should be."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvideo_grpo.commands import tiny as command
from fastvideo_grpo.rewards.base import RewardRequest
from fastvideo_grpo.rewards.media.clips import mp4_round_trip, read_clip
from fastvideo_grpo.rewards.models import videoalign_weights as weights
from fastvideo_grpo.rewards.models.videoalign import OUTPUTS, VideoAlign
from fastvideo_grpo.rewards.models.videoalign_template import TOKENS, read_template
from fastvideo_grpo.rewards.registry import create
from fastvideo_grpo.rewards.reward_set import RewardSet
from fastvideo_grpo.tiny.videoalign import STEP, TEMPLATE_TEXT, build, old_name, write_videoalign
from tests.qwen2_vl import QWEN2_VL_2B

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "videoalign_tiny"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the released code's numbers are absent: ../shared/golden/videoalign_tiny beside the repository"
)
PROMPTS = ["a red circle moving up", "a dog", "a much longer prompt about the sea at night, and snow"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_videoalign(tmp_path_factory.mktemp("videoalign") / "full")


@pytest.fixture(scope="module")
def tiny_lora(tmp_path_factory):
    return write_videoalign(tmp_path_factory.mktemp("videoalign") / "lora", layout="lora")


@pytest.fixture
def copy(tmp_path, tiny):
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def copy_lora(tmp_path, tiny_lora):
    return Path(shutil.copytree(tiny_lora, tmp_path / "copy"))


@pytest.fixture(scope="module")
def reward(tiny):
    return make(tiny)


def make(folder, **params):
    params = {"template": str(folder / "template.txt"), "precision": "fp32", "normalize": False, **params}
    return create("videoalign", checkpoint=str(folder / "VideoReward"), params=params)


def request_of(prompts=PROMPTS, frames=9, height=64, width=96, fps=8.0, seed=0):
    """Noise that gets coarser from clip to clip, so that scores differ."""
    generator = torch.Generator().manual_seed(seed)
    media = torch.randint(0, 256, (len(prompts), frames, height, width, 3), dtype=torch.uint8, generator=generator)
    for index in range(len(prompts)):
        media[index] = media[index] // (index + 1)
    return RewardRequest(list(prompts), media, fps=fps)


def scores_of(reward, request):
    result = reward.score(request)
    assert result.valid.all() and set(result.scores) == set(OUTPUTS)
    return torch.stack([result.scores[output] for output in OUTPUTS], dim=1)


def inputs_of(reward, request):
    return reward.inputs(request.prompts, [reward.frames(clip, request.fps) for clip in request.media])


@torch.no_grad()
def transformers_scores(own, inputs, *, mrope=False):
    """What transformers and peft give: LoRA beside the weights, the head at the reward tokens of one row after the other."""
    ids = inputs["input_ids"]
    positions = {"position_ids": torch.arange(ids.shape[1]).expand(3, *ids.shape)}
    if mrope:
        positions = {"mm_token_type_ids": inputs["mm_token_type_ids"]}
    names = ("input_ids", "attention_mask", "pixel_values_videos", "video_grid_thw")
    hidden = own.model(**{name: inputs[name] for name in names}, **positions).last_hidden_state
    first = own.get_input_embeddings().num_embeddings - len(TOKENS)
    rows = []
    for row, states in zip(ids.tolist(), own.rm_head(hidden), strict=True):
        outputs = [states[row.index(first + number)] for number in range(len(TOKENS))]
        rows.append([output[number if len(output) == 3 else 0].item() for number, output in enumerate(outputs)])
    return torch.tensor(rows)


# --- the released code


def golden(layout, **params):
    params = {"template": str(GOLDEN / "prompt_template.txt"), "precision": "fp32", "normalize": False, **params}
    expected = json.loads((GOLDEN / "expected.json").read_text())
    clips = [read_clip(GOLDEN / name) for name in expected["videos"]]
    request = RewardRequest(expected["prompts"], torch.stack([clip.frames for clip in clips]), fps=clips[0].fps)
    return create("videoalign", checkpoint=str(GOLDEN / f"tiny-VideoReward-{layout}"), params=params), request, expected


@needs_golden
@pytest.mark.parametrize("layout", ["full", "lora"])
def test_token_ids_and_scores_are_the_released_codes(layout):
    reward, request, expected = golden(layout, batch_size=2)
    inputs = inputs_of(reward, request)
    assert inputs["input_ids"].tolist() == expected["input_ids"]
    assert inputs["attention_mask"].tolist() == expected["attention_mask"]
    assert inputs["video_grid_thw"].tolist() == expected["video_grid_thw"]
    assert inputs["pixel_values_videos"].mean().item() == pytest.approx(expected["pixel_values_mean"], abs=1e-6)
    logits = torch.tensor(expected["logits"])
    torch.testing.assert_close(scores_of(reward, request), logits, atol=1e-4, rtol=0)
    reward.batch_size = 1
    torch.testing.assert_close(scores_of(reward, request), logits, atol=1e-4, rtol=0)


@needs_golden
def test_mrope_positions_would_not_give_the_released_codes_scores():
    reward, request, expected = golden("full")
    inputs = inputs_of(reward, request)
    names = ("input_ids", "attention_mask", "pixel_values_videos", "video_grid_thw", "mm_token_type_ids")
    with torch.no_grad():
        hidden = reward.model.backbone(**{name: inputs[name] for name in names}).last_hidden_state
        logits = reward.model.read(hidden, inputs["input_ids"])
    # Told to four digits, of another version of transformers: these are the scores that M-RoPE would give.
    of_mrope = torch.tensor(expected["logits_if_mrope_positions_were_used_first_row"])
    torch.testing.assert_close(logits[0, :2], of_mrope, atol=5e-4, rtol=0)
    assert (logits - torch.tensor(expected["logits"])).abs().max() > 0.1


# --- transformers' own model


@pytest.mark.parametrize("layout", ["full", "lora"])
def test_scores_are_those_of_transformers_and_peft(request, layout):
    reward = make(request.getfixturevalue("tiny" if layout == "full" else "tiny_lora"), batch_size=3)
    asked = request_of()
    expected = transformers_scores(build()[0].base_model.model, inputs_of(reward, asked))
    torch.testing.assert_close(scores_of(reward, asked), expected, atol=1e-4, rtol=0)
    assert expected.std(dim=0).min() > 1e-3, "clips and prompts that score alike would show nothing"


def test_mrope_positions_would_give_other_scores(reward):
    asked = request_of()
    mrope = transformers_scores(build()[0].base_model.model, inputs_of(reward, asked), mrope=True)
    assert (mrope - scores_of(reward, asked)).abs().max() > 0.02


def test_lora_is_folded_in_with_its_factor(copy):
    """Without the adapters, and with another factor, the scores are others: what agrees above is not an accident."""
    asked = request_of()
    expected = scores_of(make(copy), asked)
    path = copy / "VideoReward" / "model_config.json"
    config = json.loads(path.read_text())
    for change in ({"lora_alpha": 16}, {"use_rslora": True}):
        path.write_text(json.dumps({**config, "peft_lora_config": {**config["peft_lora_config"], **change}}))
        assert (scores_of(make(copy), asked) - expected).abs().max() > 1e-3


def test_a_head_of_three_rows_is_read_on_its_diagonal(tmp_path):
    folder = write_videoalign(tmp_path / "three", output_dim=3)
    asked = request_of()
    reward = make(folder)
    expected = transformers_scores(build(output_dim=3)[0].base_model.model, inputs_of(reward, asked))
    torch.testing.assert_close(scores_of(reward, asked), expected, atol=1e-4, rtol=0)


def test_frozen_weights_come_from_the_model_that_was_trained(copy_lora):
    expected = scores_of(make(copy_lora), request_of())
    path = copy_lora / "VideoReward" / f"checkpoint-{STEP}" / "non_lora_state_dict.pth"
    trained = {name: tensor for name, tensor in torch.load(path).items() if "visual.blocks" not in name and "norm" not in name}
    torch.save(trained, path)
    torch.testing.assert_close(scores_of(make(copy_lora), request_of()), expected, atol=0, rtol=0)
    shards(copy_lora / "tiny-Qwen2-VL")
    torch.testing.assert_close(scores_of(make(copy_lora), request_of()), expected, atol=0, rtol=0)
    next((copy_lora / "tiny-Qwen2-VL").glob("*-00002-of-*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00002.*leaves out \d+ weights.*params.base"):
        make(copy_lora)


def shards(folder):
    """The folder's weights in two files with an index, as larger models are published."""
    tensors = load_file(folder / "model.safetensors")
    places = {name: f"model-{1 + index % 2:05d}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("layout", ["full", "lora"])
def test_the_published_2b_model_is_mapped_completely(layout):
    """At its real size, without storage: every weight has its place, and nothing is left over."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = {**QWEN2_VL_2B, "vocab_size": 151657 + len(TOKENS)}
    with torch.device("meta"):
        trained = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config))
        trained.rm_head = torch.nn.Linear(1536, 1, bias=False)
        linear = [name for name, part in trained.named_modules() if isinstance(part, torch.nn.Linear)]
        adapted = [name for name in linear if "language_model" in name]
        trained = get_peft_model(trained, LoraConfig(r=64, lora_alpha=128, target_modules=adapted))
    saved = {old_name(name): tensor for name, tensor in trained.state_dict().items()}
    if layout == "lora":
        saved.pop("base_model.model.lm_head.weight")
        saved = {name.replace(".default.", "."): tensor for name, tensor in saved.items()}
    # As VideoReward has them.
    shapes = {name.removeprefix("base_model.model."): tuple(tensor.shape) for name, tensor in saved.items()}
    assert shapes["model.embed_tokens.weight"] == (151660, 1536)
    assert shapes["model.layers.27.mlp.down_proj.base_layer.weight"] == (1536, 8960)
    assert shapes["visual.blocks.31.attn.qkv.weight"] == (3840, 1280)
    assert shapes["visual.merger.mlp.0.weight"] == (5120, 5120)
    assert shapes["rm_head.weight"] == (1, 1536)

    token_ids = [151657, 151658, 151659]
    model = weights.build(Qwen2VLConfig(**QWEN2_VL_2B), saved, 1, token_ids)
    weights.fill(model, saved, scale=2.0, rank=64, dtype=torch.bfloat16)
    parameters = dict(model.named_parameters())
    assert all(tensor.is_meta for tensor in parameters.values())
    assert {tensor.dtype for name, tensor in parameters.items() if name != "rm_head.weight"} == {torch.bfloat16}
    # 2.21 billion as published, less the rows that no token uses, and the head.
    assert sum(tensor.numel() for tensor in parameters.values()) == 2_208_985_600 - (151936 - 151660) * 1536 + 1536


# --- preparation


def test_frames_are_resized_as_the_released_code_does():
    """torchvision's antialiased bicubic, in floats, rounded; sides of 28, between 100352 and 200704 pixels."""
    from torchvision.transforms import InterpolationMode, functional

    reward = VideoAlign.__new__(VideoAlign)  # no weights are needed
    reward.mp4, reward.fps, reward.max_pixels = False, 2.0, 200704
    for (height, width), size in {(480, 480): (448, 448), (96, 160): (252, 420), (720, 1280): (336, 588)}.items():
        clip = torch.randint(0, 256, (53, height, width, 3), dtype=torch.uint8)
        frames = reward.frames(clip, 8.0)
        assert frames.shape == (14, 3, *size) and frames.dtype == torch.uint8
        last = clip[-1].permute(2, 0, 1).float()
        expected = functional.resize(last, list(size), InterpolationMode.BICUBIC, antialias=True).clamp(0, 255).round()
        assert torch.equal(frames[-1], expected.to(torch.uint8))


def test_more_frames_a_second_are_looked_at_when_asked_for(tiny, reward):
    asked = request_of(frames=17)
    assert inputs_of(reward, asked)["video_grid_thw"][0, 0] == 2
    finer = make(tiny, fps=8)
    assert inputs_of(finer, asked)["video_grid_thw"][0, 0] == 8
    assert (scores_of(finer, asked) - scores_of(reward, asked)).abs().max() > 1e-4


def test_scores_are_normalised_with_the_checkpoints_numbers(tiny, reward):
    raw = scores_of(reward, request_of())
    norms = json.loads((tiny / "VideoReward" / "model_config.json").read_text())["inference_config"]
    mean, std = (torch.tensor([norms[f"{output}_{part}"] for output in OUTPUTS]) for part in ("mean", "std"))
    torch.testing.assert_close(scores_of(make(tiny, normalize=True), request_of()), (raw - mean) / std)


def test_an_mp4_round_trip_scores_what_comes_back(tiny, reward):
    asked = request_of(PROMPTS[:2])
    back = torch.stack([mp4_round_trip(clip, 8.0).frames for clip in asked.media])
    assert not torch.equal(back, asked.media)
    expected = scores_of(reward, RewardRequest(asked.prompts, back, fps=8.0))
    torch.testing.assert_close(scores_of(make(tiny, mp4=True), asked), expected, atol=0, rtol=0)


# --- scores


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_score_does_not_depend_on_the_batch(tiny, reward, batch_size):
    together = scores_of(make(tiny, batch_size=batch_size), request_of())
    torch.testing.assert_close(together, scores_of(reward, request_of()), atol=1e-5, rtol=0)


def test_prompt_clip_and_output_count(reward):
    asked = request_of()
    scores = scores_of(reward, asked)
    swapped = scores_of(reward, RewardRequest(asked.prompts[::-1], asked.media, fps=8.0))
    # The words of the prompt come after the places where VQ and MQ are read.
    torch.testing.assert_close(swapped[:, :2], scores[:, :2], atol=1e-5, rtol=0)
    assert (swapped[::2, 2] - scores[::2, 2]).abs().min() > 1e-5
    assert len({round(score, 5) for score in scores.flatten().tolist()}) == scores.numel()


def test_a_prompt_that_spells_a_token_is_invalid(reward):
    asked = request_of(["a dog", "a <|VQ_reward|>", "<|video_pad|>"])
    result = reward.score(asked)
    assert result.valid.tolist() == [True, False, False]
    assert result.scores["TA"][1:].isnan().all()
    alone = reward.score(RewardRequest(["a dog"], asked.media[:1], fps=8.0))
    torch.testing.assert_close(result.scores["TA"][:1], alone.scores["TA"])


def test_bf16_is_what_the_released_code_computes_but_for_the_heads_rounding(tiny):
    """It turns everything into bfloat16, the frequencies of the rotary embeddings too."""
    half, asked = make(tiny, precision="bf16", batch_size=3), request_of()
    dtypes = {name: tensor.dtype for name, tensor in half.model.named_parameters()}
    assert dtypes.pop("rm_head.weight") == torch.float32 and set(dtypes.values()) == {torch.bfloat16}
    theirs = build()[0].merge_and_unload().to(torch.bfloat16)
    expected = transformers_scores(theirs, inputs_of(half, asked))
    torch.testing.assert_close(scores_of(half, asked), expected, atol=0.02, rtol=0)


def test_fp32_stays_fp32_under_the_callers_autocast(reward):
    expected = scores_of(reward, request_of())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scores_of(reward, request_of()), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 5e-3), ("bf16", 0.2)])  # convolutions are TF32 by default
def test_a_gpu_gives_the_cpus_scores(tiny, precision, tolerance):
    reward = make(tiny, precision=precision)
    expected = scores_of(reward, request_of())
    scores = scores_of(reward.to("cuda"), request_of())
    assert scores.device.type == "cpu"
    torch.testing.assert_close(scores, expected, atol=tolerance, rtol=0)


def test_pictures_and_clips_without_a_rate_are_refused(tiny):
    models = {"va": {"kind": "videoalign", "checkpoint": str(tiny / "VideoReward"),
                     "params": {"template": str(tiny / "template.txt"), "precision": "fp32"}}}  # fmt: skip
    rewards = RewardSet(models)
    assert rewards.names == ["va/VQ", "va/MQ", "va/TA"]
    with pytest.raises(ValueError, match="scores videos"):
        rewards.check_frames(1)
    for request, message in ((request_of(frames=1), "one frame"), (request_of(fps=None), "fps")):
        batch = rewards.score(request)
        assert not batch.valid["va/VQ"].any() and message in batch.failures[0]
    rewards.close()
    assert rewards.rewards["va"].reward.model is None


def test_transformers_is_not_imported_for_other_rewards():
    code = (
        "import sys; from fastvideo_grpo.rewards import kinds; assert 'videoalign' in kinds(); "
        "sys.exit(bool({'transformers', 'torchvision', 'diffusers', 'av', 'decord', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the template

# In the form of VideoAlign's file: strings, and a function that picks one by name.
PYTHON = f'''
OTHER = """Another text for {{text_prompt}}."""
WANTED = """{TEMPLATE_TEXT}"""
raise SystemExit("this file was executed")
def choose(prompt, kind):
    if kind == "none":
        return prompt
    elif kind == "simple":
        return OTHER.format(text_prompt=prompt)
    elif kind == "detailed_special":
        return WANTED.format(text_prompt=prompt)
    else:
        raise ValueError(kind)
'''


def test_the_template_is_read_from_a_copy_of_videoalign_without_running_it(tmp_path):
    (tmp_path / "prompt_template.py").write_text(PYTHON)
    (tmp_path / "template.txt").write_text(TEMPLATE_TEXT)
    for source in (tmp_path, tmp_path / "prompt_template.py", tmp_path / "template.txt"):
        assert read_template(source, "detailed_special") == TEMPLATE_TEXT
    assert "  \n" in TEMPLATE_TEXT, "blanks at the end of a line are kept"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("prompt_template.py", PYTHON.replace("detailed_special", "detailed"), "'detailed_special', found none"),
        ("prompt_template.py", PYTHON.replace('== "simple"', '== "detailed_special"'), "found OTHER, WANTED"),
        ("prompt_template.py", "def (", "not Python"),
        ("t.txt", TEMPLATE_TEXT.replace("{text_prompt}", ""), "found none"),
        ("t.txt", TEMPLATE_TEXT.replace("{text_prompt}", "{text_prompt} {other}"), "found {other}, {text_prompt}"),
        ("t.txt", TEMPLATE_TEXT + "{", "Single '{'"),
        ("t.txt", TEMPLATE_TEXT.replace(TOKENS[1], ""), "MQ_reward.* 0 times"),
        ("t.txt", TEMPLATE_TEXT.replace(TOKENS[0], "@").replace(TOKENS[1], TOKENS[0]).replace("@", TOKENS[1]), "in the order"),
        ("t.txt", b"\xff\xfe", "decode"),
    ],
)
def test_another_template_is_refused(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{file}.*{message}.*git clone"):
        read_template(tmp_path / file, "detailed_special")


# --- parameters and files


@pytest.mark.parametrize(
    "params",
    [{"batch_size": 0}, {"precision": "fp16"}, {"fps": 0}, {"fps": "2"}, {"step": "newest"}, {"mp4": "yes"}, {"normalize": 1}],
)
def test_parameters_out_of_range_are_refused(tiny, params):
    with pytest.raises(ValueError, match=next(iter(params))):
        make(tiny, **params)


def test_the_newest_step_is_loaded_or_the_one_that_is_asked_for(copy, monkeypatch):
    loaded = []
    monkeypatch.setattr(weights, "load", lambda folder, *args: loaded.append(folder.name))
    (copy / "VideoReward" / "checkpoint-9").mkdir()
    (copy / "VideoReward" / "checkpoint-9" / "model.pth").touch()
    (copy / "VideoReward" / "checkpoint-old").mkdir()
    make(copy)
    make(copy, step=9)
    assert loaded == [f"checkpoint-{STEP}", "checkpoint-9"]
    with pytest.raises(FileNotFoundError, match=f"checkpoint-10 .params.step.*found checkpoint-9, checkpoint-{STEP}"):
        make(copy, step=10)


def test_what_is_missing_is_told_before_anything_is_loaded(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "load", lambda *args: pytest.fail("weights were loaded"))
    reward, step = copy / "VideoReward", copy / "VideoReward" / f"checkpoint-{STEP}"

    def refused(message, error=FileNotFoundError, checkpoint=reward, **params):
        params = {"template": str(copy / "template.txt"), **params}
        with pytest.raises(error, match=message):
            create("videoalign", checkpoint=str(checkpoint), params=params)

    refused("there is no checkpoint .*absent.*KlingTeam/VideoReward", checkpoint=tmp_path / "absent")
    refused("has no model_config.json.*KlingTeam/VideoReward", checkpoint=copy / "tiny-Qwen2-VL")
    refused(f"set it to {reward}", checkpoint=step)
    refused("there is no .*absent.*git clone", template=str(tmp_path / "absent.txt"))
    refused("has no prompt_template.py.*git clone", template=str(copy))
    refused("params.base is not a folder.*hf download Qwen", base=str(tmp_path / "absent"))
    refused("tiny-Qwen2-VL|VideoReward has no config.json.*hf download Qwen", base=str(reward))
    config = json.loads((reward / "model_config.json").read_text())
    for change, message in (
        ({"model_config": {**config["model_config"], "model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"}},
         "says 'Qwen/Qwen2-VL-2B-Instruct', which is not a folder.*hf download Qwen"),
        ({"data_config": {**config["data_config"], "num_frames": 8}}, "num_frames=8.*params.fps"),
        ({"data_config": {**config["data_config"], "sample_type": "multi_pts"}}, "multi_pts"),
        ({"model_config": {**config["model_config"], "reward_token": "last"}}, "'reward_token': 'last'"),
        ({"inference_config": {}}, "VQ_mean"),
        ({"inference_config": {**config["inference_config"], "TA_std": None}}, "TA_std is None"),
    ):  # fmt: skip
        (reward / "model_config.json").write_text(json.dumps({**config, **change}))
        refused(message, (ValueError, FileNotFoundError))
    (reward / "model_config.json").write_text("{")
    refused("model_config.json.*found something else.*KlingTeam", ValueError)
    (reward / "model_config.json").write_text(json.dumps(config))
    (step / "model.pth").rename(step / "non_lora_state_dict.pth")
    refused("expected model.pth, or adapter_model.safetensors and.*found non_lora_state_dict.pth.*KlingTeam")


@pytest.mark.parametrize(("layout", "file"), [("full", "model.pth"), ("lora", "adapter_model.safetensors")])
def test_a_truncated_file_is_told_as_such(request, layout, file):
    folder = request.getfixturevalue("copy" if layout == "full" else "copy_lora")
    path = folder / "VideoReward" / f"checkpoint-{STEP}" / file
    content = path.read_bytes()
    for length in (0, 1000, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{file}: expected a.*{length} bytes.*KlingTeam/VideoReward"):
            make(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=r"Git LFS pointer.*KlingTeam/VideoReward"):
        make(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("base_model.model.rm_head.weight"), "no tensor for rm_head.weight"),
        (lambda state: state.pop("base_model.model.model.embed_tokens.weight"), "reward tokens mean nothing"),
        (lambda state: state.pop("base_model.model.visual.blocks.0.norm1.weight"), "visual.blocks.0.norm1.weight"),
        (lambda state: state.update({"score.weight": torch.zeros(1)}), "does not have: score.weight"),
        (
            lambda state: state.update({"base_model.model.rm_head.weight": torch.zeros(3, 32)}),
            r"is \[3, 32\] instead of \[1, 32\]",
        ),
        (lambda state: state.update({"model.embed_tokens.weight": torch.zeros(9, 32)}), "9 token embeddings"),
        (lambda state: state.pop(next(name for name in state if "lora_A" in name)), r"the LoRA of .* is B \["),
        (lambda state: state.update(step=3), "found a dict with the keys"),
    ],
)
def test_other_weights_are_refused_by_name(copy, change, message):
    path = copy / "VideoReward" / f"checkpoint-{STEP}" / "model.pth"
    state = torch.load(path)
    change(state)
    if "model.embed_tokens.weight" in state:
        state.pop("base_model.model.model.embed_tokens.weight")
    torch.save(state, path)
    with pytest.raises(ValueError, match=f"{message}.*KlingTeam/VideoReward"):
        make(copy)


def test_an_adapter_that_disagrees_with_model_config_is_refused(copy_lora):
    path = copy_lora / "VideoReward" / f"checkpoint-{STEP}" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 32}))
    with pytest.raises(ValueError, match=r"factor 2\.0 of model_config.json, found the factor 8\.0"):
        make(copy_lora)


def test_another_base_is_told_by_what_it_is(copy):
    path = copy / "tiny-Qwen2-VL" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "qwen2_5_vl"}))
    with pytest.raises(ValueError, match="expected the model_type 'qwen2_vl', found 'qwen2_5_vl'"):
        make(copy)
    path.write_text(json.dumps(config))
    (copy / "tiny-Qwen2-VL" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer and picture preparation of .* cannot be read"):
        make(copy)


# --- the tiny checkpoint


def test_the_command_writes_either_layout(tmp_path, monkeypatch, capsys):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)

    def run(*words):
        return command.run(parser.parse_args(list(words)))

    assert run("videoalign", "--out", str(tmp_path / "a"), "--layout", "lora") == 0
    assert (tmp_path / "a" / "VideoReward" / f"checkpoint-{STEP}" / "adapter_model.safetensors").is_file()
    assert run("videoalign", "--out", str(tmp_path / "a")) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run("videoalign", "--out", str(tmp_path / "a"), "--overwrite") == 0
    assert (tmp_path / "a" / "VideoReward" / f"checkpoint-{STEP}" / "model.pth").is_file()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").touch()
    assert run("videoalign", "--out", str(tmp_path / "b"), "--overwrite") == 1
    assert run("videoalign", "--pretrain") == 1
    assert run("flux", "--layout", "full") == 1
    assert "--layout full is not for flux" in capsys.readouterr().err


def test_the_same_seed_writes_the_same_weights(tmp_path, tiny):
    again, other = (write_videoalign(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    states = [torch.load(folder / "VideoReward" / f"checkpoint-{STEP}" / "model.pth") for folder in (tiny, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(*(state["base_model.model.rm_head.weight"] for state in states[1:]))


@needs_golden
@pytest.mark.parametrize("layout", ["full", "lora"])
def test_it_has_the_names_and_files_of_the_released_layout(tmp_path, layout):
    folder = write_videoalign(tmp_path / "tiny", layout=layout)
    step = Path("VideoReward") / f"checkpoint-{STEP}"
    theirs = GOLDEN / f"tiny-VideoReward-{layout}" / f"checkpoint-{STEP}"
    for path in theirs.iterdir():
        own = folder / step / path.name
        if path.suffix == ".json":
            assert json.loads(own.read_text()).keys() <= json.loads(path.read_text()).keys()
        else:
            load = torch.load if path.suffix == ".pth" else load_file
            assert {name: tensor.shape for name, tensor in load(own).items()} == {
                name: tensor.shape for name, tensor in load(path).items()
            }
    expected = json.loads((theirs.parent / "model_config.json").read_text())
    own = json.loads((folder / "VideoReward" / "model_config.json").read_text())
    assert {part: set(keys) for part, keys in own.items()} == {part: set(keys) for part, keys in expected.items()}
