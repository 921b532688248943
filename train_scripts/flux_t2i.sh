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
# Started again, it resumes from the newest checkpoint of its run.dir.
#
# What it needs, besides for tiny (the licences are the publishers'):
#   checkpoints/FLUX.1-dev              hf download black-forest-labs/FLUX.1-dev --local-dir checkpoints/FLUX.1-dev
#   checkpoints/HPS_v2.1_compressed.pt  hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir checkpoints
#   a prompt list                       set prompts.path (one prompt a line); data/prompts/flux_examples.txt is an example
set -euo pipefail
cd "$(dirname "$0")/.."

NAME=${1:-}
CONFIG=train_scripts/configs/flux_t2i_$NAME.yaml
if [ -z "$NAME" ] || [ ! -f "$CONFIG" ]; then
  echo "usage: $0 NAME [key=value ...] [--dry-run]; NAME is one of:" >&2
  for file in train_scripts/configs/flux_t2i_*.yaml; do
    file=${file##*/flux_t2i_}
    echo "  ${file%.yaml}" >&2
  done
  exit 2
fi
shift

PYTHON=${PYTHON:-.venv/bin/python}
if [ ! -x "$(command -v "$PYTHON")" ]; then
  echo "$0: no $PYTHON; run 'make env', or set PYTHON to an interpreter that has fastvideo_grpo" >&2
  exit 2
fi
if [[ $NAME == tiny* ]] && [ ! -f checkpoints/tiny-flux/model_index.json ]; then
  "$PYTHON" -m fastvideo_grpo.cli tiny flux --out checkpoints/tiny-flux
fi
for argument in "$@"; do
  if [ "$argument" = --dry-run ]; then
    exec "$PYTHON" -m fastvideo_grpo.cli train "$CONFIG" "$@"
  fi
done

# One process a GPU; without a GPU, and for the tiny recipes (too small to be dealt to many), one process.
if [[ $NAME == tiny* ]]; then GPUS=${GPUS:-1}; fi
GPUS=${GPUS:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
if [ "$GPUS" -lt 1 ]; then GPUS=1; fi
NNODES=${NNODES:-1}
if [ $((GPUS * NNODES)) -eq 1 ]; then
  exec "$PYTHON" -m fastvideo_grpo.cli train "$CONFIG" "$@"
fi
RENDEZVOUS=(--standalone)
if [ "$NNODES" -gt 1 ]; then
  RENDEZVOUS=(--node-rank "${NODE_RANK:?set NODE_RANK to the rank of this node, 0 to NNODES - 1}"
    --master-addr "${MASTER_ADDR:?set MASTER_ADDR to the address of node 0}" --master-port "${MASTER_PORT:-29500}")
fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$GPUS" "${RENDEZVOUS[@]}" \
  -m fastvideo_grpo.cli train "$CONFIG" engine.kind=deepspeed "$@"
