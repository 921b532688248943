"""Where the reward models' checkpoints are to be had."""

from __future__ import annotations

from fastvideo_grpo.model_files.downloads import Download, Source

_CLIP = Download(
    "openai/clip-vit-large-patch14",
    "checkpoints/clip-vit-large-patch14",
    1.71,
    6.85,
    include=("*.json", "*.txt", "model.safetensors"),
)
HPS_V2_1 = Source.of("xswu/HPSv2", "checkpoints", 1.97, files=("HPS_v2.1_compressed.pt",))
DFN5B = Source.of(
    "apple/DFN5B-CLIP-ViT-H-14-378",
    "checkpoints/DFN5B-CLIP-ViT-H-14-378",
    3.95,
    7.9,
    exclude=("pytorch_model.bin",),
)
PICKSCORE = Source.of("yuvalkirstain/PickScore_v1", "checkpoints/PickScore_v1", 3.95, 7.9, exclude=("*.bin",))
CLIP_VIT_L = Source((_CLIP,))
CLIP_TOKENIZER = Source.of(
    _CLIP.repository, _CLIP.folder, files=("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
)
IMAGE_REWARD = Source.of("THUDM/ImageReward", "checkpoints", 1.79, files=("ImageReward.pt",))
BERT_VOCABULARY = Source.of("google-bert/bert-base-uncased", "checkpoints/bert-base-uncased", files=("vocab.txt",))
VIDEO_REWARD = Source.of("KlingTeam/VideoReward", "checkpoints/VideoReward")
QWEN2_VL_2B = Source.of("Qwen/Qwen2-VL-2B-Instruct", "checkpoints/Qwen2-VL-2B-Instruct", 4.4)
VIDEOSCORE2 = Source.of("TIGER-Lab/VideoScore2", "checkpoints/VideoScore2", 16.6)
