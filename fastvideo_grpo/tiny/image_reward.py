"""A tiny random ImageReward in the published file's form, and a head of LAION's aesthetic predictor."""

from __future__ import annotations

from pathlib import Path

import torch

from fastvideo_grpo.tiny.random_weights import RandomWeights
from fastvideo_grpo.tiny.tokenizer_files import WORDS, write_json

VISION_WIDTH = 128  # two heads of 64, so that mixed up heads show
TEXT_WIDTH = 192
LAYERS = 2
PATCH = 8
GRID = 4
IMAGE_SIZE = PATCH * GRID
POSITIONS = 64

# Outputs of the head's layers; published: 1024, 128, 64, 16 and 1.
_HEAD = {0: 32, 2: 16, 4: 8, 6: 4, 7: 1}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def head_weights(inputs: int, *, seed: int = 0, prefix: str = "") -> dict[str, torch.Tensor]:
    """Random weights of the head under its published names, as in sac+logos+ava1-l14-linearMSE.pth."""
    draw = RandomWeights(seed)
    for layer, outputs in _HEAD.items():
        draw.linear(f"{prefix}layers.{layer}", outputs, inputs)
        inputs = outputs
    return draw.weights


def image_reward_weights(vocabulary: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float32 weights under the names of ImageReward.pt, those that no score uses included."""
    draw = RandomWeights(seed)
    image, text = "blip.visual_encoder.", "blip.text_encoder."
    draw.add(image + "cls_token", 1, 1, VISION_WIDTH)
    draw.add(image + "pos_embed", 1, GRID**2 + 1, VISION_WIDTH)
    draw.add(image + "patch_embed.proj.weight", VISION_WIDTH, 3, PATCH, PATCH)
    draw.add(image + "patch_embed.proj.bias", VISION_WIDTH)
    for layer in range(LAYERS):
        block = f"{image}blocks.{layer}."
        draw.norm(block + "norm1", VISION_WIDTH)
        draw.linear(block + "attn.qkv", 3 * VISION_WIDTH, VISION_WIDTH)
        draw.linear(block + "attn.proj", VISION_WIDTH, VISION_WIDTH)
        draw.norm(block + "norm2", VISION_WIDTH)
        draw.linear(block + "mlp.fc1", 4 * VISION_WIDTH, VISION_WIDTH)
        draw.linear(block + "mlp.fc2", VISION_WIDTH, 4 * VISION_WIDTH)
    draw.norm(image + "norm", VISION_WIDTH)
    draw.weights[text + "embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    draw.add(text + "embeddings.word_embeddings.weight", vocabulary, TEXT_WIDTH, std=1.0)
    draw.add(text + "embeddings.position_embeddings.weight", POSITIONS, TEXT_WIDTH)
    draw.norm(text + "embeddings.LayerNorm", TEXT_WIDTH)
    for layer in range(LAYERS):
        block = f"{text}encoder.layer.{layer}."
        for attention, keys in (("attention", TEXT_WIDTH), ("crossattention", VISION_WIDTH)):
            draw.linear(f"{block}{attention}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            draw.linear(f"{block}{attention}.self.key", TEXT_WIDTH, keys)
            draw.linear(f"{block}{attention}.self.value", TEXT_WIDTH, keys)
            draw.linear(f"{block}{attention}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            draw.norm(f"{block}{attention}.output.LayerNorm", TEXT_WIDTH)
        draw.linear(block + "intermediate.dense", 4 * TEXT_WIDTH, TEXT_WIDTH)
        draw.linear(block + "output.dense", TEXT_WIDTH, 4 * TEXT_WIDTH)
        draw.norm(block + "output.LayerNorm", TEXT_WIDTH)
    draw.linear("blip.vision_proj", 32, VISION_WIDTH)
    draw.linear("blip.text_proj", 32, TEXT_WIDTH)
    return draw.weights | head_weights(TEXT_WIDTH, seed=seed + 1, prefix="mlp.")


def write_bert_tokenizer(folder: str | Path) -> Path:
    """Write vocab.txt and tokenizer_config.json as bert-base-uncased has them, with a short list of words."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?<>[]"
    tokens = [*_SPECIAL, *letters, *("##" + letter for letter in letters), *(word for word in WORDS if len(word) > 1)]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 512})
    return folder


def write_image_reward(path: str | Path, tokenizer: str | Path, *, seed: int = 0) -> Path:
    """Write a random checkpoint in the form of ImageReward.pt for the vocabulary of the `tokenizer` folder, and return its
    path. BLIP's two tokens, [DEC] and [ENC], come on top."""
    vocabulary = len(Path(tokenizer, "vocab.txt").read_text(encoding="utf-8").splitlines())
    torch.save(image_reward_weights(vocabulary + 2, seed=seed), path)
    return Path(path)
