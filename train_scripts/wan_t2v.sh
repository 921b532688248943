#!/usr/bin/env bash
# GRPO on Wan 2.1, text to video and (one frame) text to image, with classifier-free guidance.
#
#   bash train_scripts/wan_t2v.sh tiny                      # one CPU core, a tiny random Wan made on the spot
#   GPUS=2 bash train_scripts/wan_t2v.sh tiny engine.kind=deepspeed engine.sequence_parallel=2   # two processes share a sample
#   bash train_scripts/wan_t2v.sh released_image            # every GPU of this machine
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=first-node bash train_scripts/wan_t2v.sh released      # on each of 4 nodes
#   bash train_scripts/wan_t2v.sh paper --dry-run --world-size 32                           # what it would do
#
# The paper has no Wan. Its released code came to have a recipe for Wan 2.1 1.3B later, for images (released_image); the video
# recipes are put together from that and from its other models' (the head of each says how).
#
# The first argument names a file configs/wan_t2v_NAME.yaml; what follows is passed on (key=value, --dry-run).
# Started again, it resumes from the newest checkpoint of its run.dir. Under Slurm: slurm/train.sbatch.
# SIGUSR1 stops it after the iteration it is in, saved, with exit code 75.
#
# What it needs, besides for tiny (the licences are the publishers'; `. .venv/bin/activate` puts hf on the PATH):
#   checkpoints/Wan2.1-T2V-1.3B-Diffusers (or 14B: model.path, 28.9 GB)
#     hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --exclude 'assets/*' --exclude 'examples/*' \
#         --local-dir checkpoints/Wan2.1-T2V-1.3B-Diffusers
#   for images:
#   checkpoints/HPS_v2.1_compressed.pt (1.97 GB)
#     hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir checkpoints
#   checkpoints/clip-vit-large-patch14
#     hf download openai/clip-vit-large-patch14 vocab.json merges.txt tokenizer_config.json special_tokens_map.json \
#         --local-dir checkpoints/clip-vit-large-patch14
#   for videos:
#   checkpoints/VideoReward
#     hf download KlingTeam/VideoReward --local-dir checkpoints/VideoReward
#   checkpoints/Qwen2-VL-2B-Instruct (4.4 GB)
#     hf download Qwen/Qwen2-VL-2B-Instruct --local-dir checkpoints/Qwen2-VL-2B-Instruct
#   checkpoints/VideoAlign (for its prompt)
#     git clone https://github.com/KwaiVGI/VideoAlign checkpoints/VideoAlign
#   a prompt list: set prompts.path (docs/prompts.md); data/prompts/hunyuan_examples.txt is an example
set -euo pipefail
source "$(dirname "$0")/common.sh"

train_recipe wan_t2v wan checkpoints/tiny-wan "$@"
