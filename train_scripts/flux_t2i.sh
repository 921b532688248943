#!/usr/bin/env bash
# GRPO on FLUX, text to image.
#
#   bash train_scripts/flux_t2i.sh tiny                      # one CPU core, a tiny random FLUX made on the spot
#   bash train_scripts/flux_t2i.sh released_8gpu             # every GPU of this machine
#   bash train_scripts/flux_t2i.sh released_lora run.iterations=100
#   GPUS=4 bash train_scripts/flux_t2i.sh released_8gpu engine.zero_stage=3
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=first-node bash train_scripts/flux_t2i.sh paper     # on each of 4 nodes, with its rank
#   bash train_scripts/flux_t2i.sh paper --dry-run --world-size 32                       # what it would do
#
# The first argument names a file configs/flux_t2i_NAME.yaml; what follows is passed on (key=value, --dry-run).
# Started again, it resumes from the newest checkpoint of its run.dir. Under Slurm: slurm/train.sbatch.
# SIGUSR1 stops it after the iteration it is in, saved, with exit code 75.
#
# What it needs, besides for tiny (the licences are the publishers'; `. .venv/bin/activate` puts hf on the PATH):
#   checkpoints/FLUX.1-dev (accept its terms on its page, then hf auth login, 33.7 GB)
#     hf download black-forest-labs/FLUX.1-dev --exclude flux1-dev.safetensors --exclude ae.safetensors \
#         --local-dir checkpoints/FLUX.1-dev
#   checkpoints/HPS_v2.1_compressed.pt (1.97 GB)
#     hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir checkpoints
#   checkpoints/DFN5B-CLIP-ViT-H-14-378 (hps_clip, 3.95 GB)
#     hf download apple/DFN5B-CLIP-ViT-H-14-378 --exclude pytorch_model.bin \
#         --local-dir checkpoints/DFN5B-CLIP-ViT-H-14-378
#   a prompt list: set prompts.path (docs/prompts.md); data/prompts/flux_examples.txt is an example
set -euo pipefail
source "$(dirname "$0")/common.sh"

train_recipe flux_t2i flux checkpoints/tiny-flux "$@"
