"""VideoScore2: what is asked of FastVideo's metric and made of its answer; the metric itself is in tests/trainer."""

import importlib.util
import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastvideo_grpo.rewards.base import RewardRequest
from fastvideo_grpo.rewards.registry import create
from fastvideo_grpo.rewards.reward_set import RewardSet

MARKS = {"visual_quality": 3.5, "text_alignment": 2.25, "physical_consistency": 4.0}


class Metric:
    """In place of FastVideo's: answers with MARKS times the clip's brightness, with none for a black clip."""

    def __init__(self, **settings):
        self.settings, self.asked, self.device = settings, [], "cpu"

    def setup(self):
        self.asked = []

    def to(self, device):
        self.device = device

    def compute(self, sample):
        self.asked.append(sample)
        brightness = sample["video"].mean().item()
        details = {output: brightness * mark if brightness else None for output, mark in MARKS.items()}
        return SimpleNamespace(score=0.0, details={**details, "raw_output": "..."})


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    made = ModuleType("fastvideo.eval")
    made.get_metric = lambda name, **settings: {"videoscore2": Metric}[name](**settings)
    monkeypatch.setitem(sys.modules, "fastvideo", ModuleType("fastvideo"))
    monkeypatch.setitem(sys.modules, "fastvideo.eval", made)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "qwen_vl_utils" or found(name))
    folder = tmp_path / "VideoScore2"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (folder / "model-00001-of-00002.safetensors").touch()
    return folder


def grey(*levels):
    return torch.stack([torch.full((9, 32, 48, 3), level, dtype=torch.uint8) for level in levels])


def test_each_clip_and_prompt_is_asked_for_and_each_mark_is_an_output(checkpoint):
    reward = create("videoscore2", checkpoint=str(checkpoint), params={"fps": 4, "max_tokens": 99})
    assert reward.metric.settings == {"model_name": str(checkpoint), "infer_fps": 4.0, "max_tokens": 99}
    result = reward.score(RewardRequest(["a dog", "a cat"], grey(255, 51), fps=8.0))
    assert result.valid.all()
    for output, mark in MARKS.items():
        torch.testing.assert_close(result.scores[output], torch.tensor([mark, mark / 5]))
    first, second = reward.metric.asked
    assert (first["text_prompt"], second["text_prompt"], first["fps"]) == ("a dog", "a cat", 8.0)
    assert first["video"].shape == (9, 3, 32, 48) and first["video"].max() == 1
    assert reward.to("meta") is reward and reward.metric.device == "meta"
    reward.close()
    assert reward.metric is None


def test_an_assessment_without_marks_is_invalid_and_not_the_metrics_zero(checkpoint):
    rewards = RewardSet({"vs": {"kind": "videoscore2", "checkpoint": str(checkpoint)}})
    assert rewards.names == [f"vs/{output}" for output in MARKS]
    batch = rewards.score(RewardRequest(["a", "b"], grey(0, 255), fps=8.0))
    assert batch.valid["vs/text_alignment"].tolist() == [False, True] and "no marks" in batch.failures[0]


def test_pictures_and_clips_without_a_rate_are_refused(checkpoint):
    reward = create("videoscore2", checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="one frame"):
        reward.score(RewardRequest(["a"], grey(1)[:, :1], fps=8.0))
    with pytest.raises(ValueError, match="fps"):
        reward.score(RewardRequest(["a"], grey(1)))


@pytest.mark.parametrize("params", [{"fps": 0}, {"fps": "2"}, {"max_tokens": 0}, {"max_tokens": 1.5}])
def test_parameters_out_of_range_are_refused(checkpoint, params):
    with pytest.raises(ValueError, match=next(iter(params))):
        create("videoscore2", checkpoint=str(checkpoint), params=params)


def test_what_is_missing_or_wrong_is_told_before_anything_is_loaded(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastvideo.eval", None)  # importing it fails
    config = checkpoint / "config.json"
    get = "hf download TIGER-Lab/VideoScore2"

    def refused(error, message, folder=checkpoint):
        with pytest.raises(error, match=message):
            create("videoscore2", checkpoint=str(folder))

    refused(FileNotFoundError, f"absent is not there.*{get}", checkpoint / "absent")
    refused(FileNotFoundError, f"config.json is not a folder.*{get}", config)
    for content, message in (
        ({"model_type": "qwen2_vl"}, "found 'qwen2_vl'"),
        ({"model_type": "qwen2_5_vl", "auto_map": {"AutoModel": "x.Y"}}, "and a program"),
        ([], "cannot be read"),
    ):
        config.write_text(json.dumps(content))
        refused(ValueError, f"{message}.*{get}")
    config.unlink()
    refused(FileNotFoundError, f"found model-00001-of-00002.safetensors.*{get}")
    config.write_text('{"model_type": "qwen2_5_vl"}')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(ImportError, "pip install --no-deps qwen-vl-utils")


def test_fastvideo_is_not_imported_until_the_reward_is_made():
    code = "import sys; from fastvideo_grpo.rewards import kinds; kinds(); sys.exit('fastvideo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
