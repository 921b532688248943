#!/usr/bin/env bash
# GRPO on SkyReels-V1-I2V, image to video, with classifier-free guidance.
#
#   bash train_scripts/skyreels_i2v.sh tiny                      # one CPU core, a tiny random SkyReels-I2V made on the spot
#   GPUS=2 bash train_scripts/skyreels_i2v.sh tiny engine.sequence_parallel=2            # its two processes share a sample
#   bash train_scripts/skyreels_i2v.sh released_8gpu             # every GPU of this machine
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=first-node bash train_scripts/skyreels_i2v.sh released     # on each of 4 nodes
#   bash train_scripts/skyreels_i2v.sh paper --dry-run --world-size 32                   # what it would do
#
# The first argument names a file configs/skyreels_i2v_NAME.yaml; what follows is passed on (key=value, --dry-run).
# Started again, it resumes from the newest checkpoint of its run.dir. Under Slurm: slurm/train.sbatch.
# SIGUSR1 stops it after the iteration it is in, saved, with exit code 75.
#
# What it needs, besides for tiny (the licences are the publishers'; `. .venv/bin/activate` puts hf on the PATH):
#   checkpoints/SkyReels-V1-I2V (HunyuanVideo's folder with SkyReels' transformer in place of its own, 41.8 GB)
#     hf download hunyuanvideo-community/HunyuanVideo --exclude 'transformer/*' \
#         --local-dir checkpoints/SkyReels-V1-I2V
#     hf download Skywork/SkyReels-V1-Hunyuan-I2V --include '*.json' --include '*.safetensors' \
#         --local-dir checkpoints/SkyReels-V1-I2V/transformer
#     sed -i 's/"HunyuanVideoPipeline"/"HunyuanSkyreelsImageToVideoPipeline"/' checkpoints/SkyReels-V1-I2V/model_index.json
#   checkpoints/VideoReward
#     hf download KlingTeam/VideoReward --local-dir checkpoints/VideoReward
#   checkpoints/Qwen2-VL-2B-Instruct (4.4 GB)
#     hf download Qwen/Qwen2-VL-2B-Instruct --local-dir checkpoints/Qwen2-VL-2B-Instruct
#   checkpoints/VideoAlign (for its prompt)
#     git clone https://github.com/KwaiVGI/VideoAlign checkpoints/VideoAlign
#   prompts with images: set prompts.path to a .jsonl file, a line {"prompt": ..., "image": ...}; from prompts alone:
#     fastvideo-grpo make-references (docs/image_to_video.md)
set -euo pipefail
source "$(dirname "$0")/common.sh"

train_recipe skyreels_i2v skyreels_i2v checkpoints/tiny-skyreels-i2v "$@"
