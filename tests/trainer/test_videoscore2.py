"""VideoScore2 on FastVideo's own metric, with a tiny random Qwen2.5-VL in place of the published weights."""

import importlib.machinery
import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastvideo_grpo.rewards.base import RewardRequest
from fastvideo_grpo.rewards.registry import create
from fastvideo_grpo.tiny.tokenizer_files import qwen2_vocabulary, write_qwen2_tokenizer
from fastvideo_grpo.tiny.videoalign import CHAT, PREPROCESSOR

ASSESSMENT = (
    "(1) visual quality - clarity: 4\n(2) text-to-video alignment - the prompt: 2\n"
    "(3) physical/common-sense consistency - naturalness: 3"
)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    if importlib.util.find_spec("qwen_vl_utils") is None:
        # What the metric uses of it: the frames that stand in the messages.
        module = ModuleType("qwen_vl_utils")
        module.__spec__ = importlib.machinery.ModuleSpec("qwen_vl_utils", None)
        module.process_vision_info = lambda messages: (None, [messages[0]["content"][0]["video"]])
        monkeypatch.setitem(sys.modules, "qwen_vl_utils", module)
    folder = tmp_path / "VideoScore2"
    write_qwen2_tokenizer(folder, CHAT)
    ids = qwen2_vocabulary()
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_hidden_layers": 1, "vocab_size": len(ids), "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
              "fullatt_block_indexes": [0]}  # fmt: skip
    tokens = {
        f"{name}_token_id": ids[f"<|{token}|>"]
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    preprocessor = {**PREPROCESSOR, "processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.mark.slow
def test_fastvideos_metric_is_run_and_its_marks_are_the_scores(checkpoint, monkeypatch):
    reward = create("videoscore2", checkpoint=str(checkpoint), params={"max_tokens": 4})
    request = RewardRequest(["a dog"], torch.randint(0, 256, (1, 17, 64, 96, 3), dtype=torch.uint8), fps=8.0)
    # Four random tokens hold no marks.
    assert reward.score(request).valid.tolist() == [False]

    written = reward.metric._tokenizer(ASSESSMENT)["input_ids"]
    shown = {}

    def generate(input_ids, video_grid_thw, **_):
        shown["frames"] = 2 * int(video_grid_thw[0, 0])
        # Where a mark stands it has three fourths of the probability of all marks.
        scores = torch.full((len(written), 1, len(qwen2_vocabulary())), -20.0)
        scores[:, 0, reward.metric._tokenizer("12345")["input_ids"]] = torch.tensor(1 / 16).log()
        scores[torch.arange(len(written)), 0, written] = torch.tensor(3 / 4).log()
        return SimpleNamespace(sequences=torch.cat([input_ids, torch.tensor([written])], dim=1), scores=scores)

    monkeypatch.setattr(reward.metric._model, "generate", generate)
    result = reward.score(request)
    assert result.valid.all() and shown["frames"] == 4  # 17 frames at 8 fps, looked at twice a second
    expected = {"visual_quality": 3.0, "text_alignment": 1.5, "physical_consistency": 2.25}
    assert {output: score.item() for output, score in result.scores.items()} == pytest.approx(expected, abs=1e-3)
    reward.close()
