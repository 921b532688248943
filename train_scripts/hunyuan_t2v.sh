#!/usr/bin/env bash
# GRPO on HunyuanVideo, text to video.
#
#   bash train_scripts/hunyuan_t2v.sh tiny                      # one CPU core, a tiny random HunyuanVideo made on the spot
#   GPUS=2 bash train_scripts/hunyuan_t2v.sh tiny engine.sequence_parallel=2             # its two processes share a sample
#   bash train_scripts/hunyuan_t2v.sh released_vq_8gpu          # every GPU of this machine
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=first-node bash train_scripts/hunyuan_t2v.sh released_mq   # on each of 4 nodes
#   bash train_scripts/hunyuan_t2v.sh paper_vq_mq --dry-run --world-size 64              # what it would do
#
# The first argument names a file configs/hunyuan_t2v_NAME.yaml; what follows is passed on (key=value, --dry-run).
# Started again, it resumes from the newest checkpoint of its run.dir. Under Slurm: slurm/train.sbatch.
# SIGUSR1 stops it after the iteration it is in, saved, with exit code 75.
#
# What it needs, besides for tiny (the licences are the publishers'; `. .venv/bin/activate` puts hf on the PATH):
#   checkpoints/HunyuanVideo (41.9 GB)
#     hf download hunyuanvideo-community/HunyuanVideo --local-dir checkpoints/HunyuanVideo
#   checkpoints/VideoReward
#     hf download KlingTeam/VideoReward --local-dir checkpoints/VideoReward
#   checkpoints/Qwen2-VL-2B-Instruct (4.4 GB)
#     hf download Qwen/Qwen2-VL-2B-Instruct --local-dir checkpoints/Qwen2-VL-2B-Instruct
#   checkpoints/VideoAlign (for its prompt)
#     git clone https://github.com/KwaiVGI/VideoAlign checkpoints/VideoAlign
#   a prompt list: set prompts.path (docs/prompts.md); data/prompts/hunyuan_examples.txt is an example
set -euo pipefail
source "$(dirname "$0")/common.sh"

train_recipe hunyuan_t2v hunyuan_video checkpoints/tiny-hunyuan-video "$@"
