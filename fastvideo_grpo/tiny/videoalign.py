"""A tiny random VideoAlign in the form of KlingTeam/VideoReward, with the Qwen2-VL it was made from beside it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from fastvideo_grpo.rewards.models.videoalign_template import TOKENS
from fastvideo_grpo.rewards.models.videoalign_weights import ADAPTER, CONFIG, FULL, REST
from fastvideo_grpo.tiny.checkpoint_files import randomize
from fastvideo_grpo.tiny.tokenizer_files import qwen2_vocabulary, write_json, write_qwen2_tokenizer

Layout = Literal["full", "lora"]
LAYOUTS: tuple[Layout, ...] = ("full", "lora")

BASE = "tiny-Qwen2-VL"
CHECKPOINT = "VideoReward"
TEMPLATE = "template.txt"
STEP = 11352  # of the published checkpoint

RANK, ALPHA = 4, 8
LAYERS = 2

# This project's own words, for the reward tokens to stand in.
TEMPLATE_TEXT = f"""
Judge this clip in three ways.
Do its pictures look good? {TOKENS[0]}
Do things move as they would? {TOKENS[1]}
It was made for this text: {{text_prompt}}
Does it show that?  \n{TOKENS[2]}
"""

# What Qwen2-VL puts around a message and in place of a clip.
CHAT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a judge of clips.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def base_config() -> dict[str, Any]:
    """config.json of the Qwen2-VL, with the keys of the published file."""
    ids = qwen2_vocabulary()
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": 32,
        "image_token_id": ids["<|image_pad|>"],
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "max_position_embeddings": 32768,
        "max_window_layers": LAYERS,
        "model_type": "qwen2_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [1, 1, 2], "type": "mrope"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "depth": LAYERS,
            "embed_dim": 32,
            "hidden_size": 32,
            "in_chans": 3,
            "mlp_ratio": 4,
            "model_type": "qwen2_vl",
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        # Published embeddings have rows that no token uses, which VideoAlign cuts off.
        "vocab_size": 64 * math.ceil((len(ids) + len(TOKENS)) / 64),
    }


PREPROCESSOR: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "processor_class": "Qwen2VLProcessor",
    "temporal_patch_size": 2,
}


def model_config(output_dim: int) -> dict[str, Any]:
    """model_config.json, with the keys of the published file that say how clips are scored."""
    return {
        "data_config": {
            "meta_data": "",
            "data_dir": "",
            "meta_data_test": None,
            "max_frame_pixels": 200704,
            "num_frames": None,
            "fps": 2.0,
            "p_shuffle_frames": 0.0,
            "p_color_jitter": 0.0,
            "eval_dim": ["VQ", "MQ", "TA"],
            "prompt_template_type": "detailed_special",
            "add_noise": False,
            "sample_type": "uniform",
            "use_tied_data": True,
        },
        "training_args": {"output_dir": ""},
        "model_config": {
            "model_name_or_path": BASE,
            "model_revision": "main",
            "output_dim": output_dim,
            "use_special_tokens": True,
            "freeze_vision_tower": False,
            "freeze_llm": False,
            "tune_merger": True,
            "torch_dtype": "bfloat16",
            "trust_remote_code": False,
            "attn_implementation": None,
            "load_in_8bit": False,
            "load_in_4bit": False,
            "bnb_4bit_quant_type": "nf4",
            "use_bnb_nested_quant": False,
            "reward_token": "special",
            "loss_type": "btt",
        },
        "peft_lora_config": {
            "lora_enable": True,
            "vision_lora": False,
            "lora_r": RANK,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.05,
            "lora_target_modules": None,
            "lora_namespan_exclude": ["lm_head", "rm_head", "embed_tokens", "visual"],
            "lora_modules_to_save": None,
            "lora_task_type": "CAUSAL_LM",
            "use_rslora": False,
            "num_lora_modules": -1,
        },
        # Numbers of the size of the published ones.
        "inference_config": {
            "VQ_mean": 3.5, "VQ_std": 2.25, "MQ_mean": 1.25, "MQ_std": 1.5, "TA_mean": 2.75, "TA_std": 2.5,
        },
    }  # fmt: skip


def old_name(name: str) -> str:
    """What a weight of transformers' Qwen2-VL was called when VideoAlign was saved, with or without peft's prefix."""
    for new, old in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        for prefix in ("", "base_model.model."):
            if name.startswith(prefix + new):
                return prefix + old + name.removeprefix(prefix + new)
    return name


def build(seed: int = 0, *, output_dim: int = 1) -> tuple[Any, dict[str, torch.Tensor]]:
    """The reward model as VideoAlign trains it, by transformers and peft: Qwen2-VL with `rm_head` and LoRA on the language
    model's linear layers; and the weights of the Qwen2-VL it started from, under their old names. float32."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    model: Any = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**base_config()))
    randomize(model, 1000 * seed)
    base = {old_name(name): value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model.resize_token_embeddings(len(qwen2_vocabulary()) + len(TOKENS))
    model.rm_head = torch.nn.Linear(model.config.text_config.hidden_size, output_dim, bias=False)
    # Trained besides LoRA.
    for number, part in enumerate((model.get_input_embeddings(), model.model.visual.merger, model.rm_head), start=1):
        randomize(part, 1000 * seed + number)
    adapted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.language_model.")
    ]
    wrapped = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.05, target_modules=adapted, task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(1000 * seed + 4)
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1]))
    return wrapped.eval(), base


def write_videoalign(
    folder: str | Path, *, layout: Layout = "full", seed: int = 0, output_dim: int = 1, overwrite: bool = False
) -> Path:
    """Write a random checkpoint and what belongs to it, and return `folder`; the same seed writes the same weights.

    folder: gets VideoReward/ (the reward's `checkpoint`), tiny-Qwen2-VL/ (found from there) and template.txt.
    layout: "full" (model.pth) or "lora" (adapter_model.safetensors and non_lora_state_dict.pth).
    output_dim: 1, or 3 for a row of the head for each reward token.

    Raises ValueError for an unknown layout, FileExistsError when the folder holds something and `overwrite` is False, or
    holds something else than a tiny VideoAlign.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if layout not in LAYOUTS:
        raise ValueError(f"tiny VideoAlign has no layout '{layout}'; allowed: {', '.join(LAYOUTS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise FileExistsError(f"{folder} exists and is not empty; choose another folder, or pass --overwrite")
        if not (folder / CHECKPOINT / CONFIG).is_file():
            raise FileExistsError(
                f"{folder} holds something else than a tiny VideoAlign, so it is not overwritten; "
                "choose another folder, or empty this one yourself"
            )
    model, base = build(seed, output_dim=output_dim)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    qwen = unfinished / BASE
    write_qwen2_tokenizer(qwen, CHAT)
    write_json(qwen / "config.json", base_config())
    write_json(qwen / "preprocessor_config.json", PREPROCESSOR)
    save_file({name: value.contiguous() for name, value in base.items()}, qwen / "model.safetensors", {"format": "pt"})

    step = unfinished / CHECKPOINT / f"checkpoint-{STEP}"
    step.mkdir(parents=True)
    write_json(unfinished / CHECKPOINT / CONFIG, model_config(output_dim))
    state = {old_name(name): value.detach().contiguous() for name, value in model.state_dict().items()}
    if layout == "full":
        torch.save(state, step / FULL)
    else:
        lora = {name: value for name, value in state.items() if "lora_" in name}
        # The vocabulary layer is the embeddings once more, and parameters are saved once.
        rest = {name: value for name, value in state.items() if name not in lora and not name.endswith("lm_head.weight")}
        torch.save(rest, step / REST)
        save_file({name.replace(".default.", "."): value for name, value in lora.items()}, step / ADAPTER, {"format": "pt"})
        own = model.peft_config["default"]
        write_json(step / "adapter_config.json", {
            "base_model_name_or_path": BASE,
            "bias": own.bias,
            "fan_in_fan_out": own.fan_in_fan_out,
            "lora_alpha": own.lora_alpha,
            "lora_dropout": own.lora_dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": own.r,
            "target_modules": sorted(old_name(name) for name in own.target_modules),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        })  # fmt: skip
    (unfinished / TEMPLATE).write_text(TEMPLATE_TEXT, encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    return folder
