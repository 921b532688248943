#!/usr/bin/env bash
# GRPO on HunyuanVideo, text to image: one latent frame.
#
#   bash train_scripts/hunyuan_t2i.sh tiny                      # one CPU core, a tiny random HunyuanVideo made on the spot
#   bash train_scripts/hunyuan_t2i.sh released_8gpu             # every GPU of this machine
#   bash train_scripts/hunyuan_t2i.sh released_lora run.iterations=100
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=first-node bash train_scripts/hunyuan_t2i.sh paper  # on each of 4 nodes, with its rank
#   bash train_scripts/hunyuan_t2i.sh paper --dry-run --world-size 32                    # what it would do
#
# The first argument names a file configs/hunyuan_t2i_NAME.yaml; what follows is passed on (key=value, --dry-run).
# Started again, it resumes from the newest checkpoint of its run.dir. Under Slurm: slurm/train.sbatch.
# SIGUSR1 stops it after the iteration it is in, saved, with exit code 75.
#
# What it needs, besides for tiny (the licences are the publishers'; `. .venv/bin/activate` puts hf on the PATH):
#   checkpoints/HunyuanVideo (41.9 GB)
#     hf download hunyuanvideo-community/HunyuanVideo --local-dir checkpoints/HunyuanVideo
#   checkpoints/HPS_v2.1_compressed.pt (1.97 GB)
#     hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir checkpoints
#   a prompt list: set prompts.path (docs/prompts.md); data/prompts/flux_examples.txt is an example
set -euo pipefail
source "$(dirname "$0")/common.sh"

train_recipe hunyuan_t2i hunyuan_video checkpoints/tiny-hunyuan-video "$@"
