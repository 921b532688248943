#!/usr/bin/env bash
# GRPO with any configuration, yours too, on one process a GPU.
#
#   bash train_scripts/train_config.sh my_run.yaml
#   GPUS=4 bash train_scripts/train_config.sh runs/flux/config.yaml run.iterations=600
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=first-node bash train_scripts/train_config.sh my_run.yaml      # on each node
#   LOGS=logs bash train_scripts/train_config.sh my_run.yaml       # what every process prints, in files below logs
#
# Relative paths are relative to the repository. Started again, it resumes from the newest checkpoint of its run.dir.
# SIGUSR1 stops it after the iteration it is in, saved, with exit code 75. Under Slurm: slurm/train.sbatch.
set -euo pipefail
source "$(dirname "$0")/common.sh"

if [ $# -lt 1 ] || [ ! -f "$1" ]; then
  echo "usage: $0 CONFIG.yaml [key=value ...] [--dry-run]${1:+; there is no file $1}" >&2
  exit 2
fi
need_python
launch "$@"
