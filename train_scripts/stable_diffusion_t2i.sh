#!/usr/bin/env bash
# GRPO on Stable Diffusion v1.4, text to image, with classifier-free guidance. (v1.5 and 2.1 have the same layout: model.path.)
#
#   bash train_scripts/stable_diffusion_t2i.sh tiny                 # one CPU core, a tiny random one made on the spot
#   bash train_scripts/stable_diffusion_t2i.sh released             # every GPU of this machine
#   bash train_scripts/stable_diffusion_t2i.sh released grpo.objective=ddpo      # a baseline on the same loop
#   bash train_scripts/stable_diffusion_t2i.sh released_lora run.iterations=100
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-node bash train_scripts/stable_diffusion_t2i.sh paper    # on each of 2 nodes
#   bash train_scripts/stable_diffusion_t2i.sh paper --dry-run --world-size 8                       # what it would do
#
# The first argument names a file configs/stable_diffusion_t2i_NAME.yaml; what follows is passed on (key=value, --dry-run).
# Started again, it resumes from the newest checkpoint of its run.dir. Under Slurm: slurm/train.sbatch.
# SIGUSR1 stops it after the iteration it is in, saved, with exit code 75.
#
# What it needs, besides for tiny (the licences are the publishers'; `. .venv/bin/activate` puts hf on the PATH):
#   checkpoints/stable-diffusion-v1-4 (4.3 GB)
#     hf download CompVis/stable-diffusion-v1-4 --include '*.json' --include '*.txt' \
#         --include text_encoder/model.safetensors --include unet/diffusion_pytorch_model.safetensors \
#         --include vae/diffusion_pytorch_model.safetensors --exclude 'safety_checker/*' \
#         --local-dir checkpoints/stable-diffusion-v1-4
#   checkpoints/HPS_v2.1_compressed.pt (1.97 GB)
#     hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir checkpoints
#   checkpoints/DFN5B-CLIP-ViT-H-14-378 (hps_clip, 3.95 GB)
#     hf download apple/DFN5B-CLIP-ViT-H-14-378 --exclude pytorch_model.bin \
#         --local-dir checkpoints/DFN5B-CLIP-ViT-H-14-378
#   a prompt list: set prompts.path (docs/prompts.md); data/prompts/flux_examples.txt is an example
set -euo pipefail
source "$(dirname "$0")/common.sh"

train_recipe stable_diffusion_t2i stable_diffusion checkpoints/tiny-sd "$@"
