#!/usr/bin/env bash
# GRPO on HunyuanVideo in three stages, each starting from the weights of the one before: images, small clips, larger clips.
#
#   bash train_scripts/hunyuan_progressive.sh tiny                        # one CPU core, a tiny random HunyuanVideo
#   bash train_scripts/hunyuan_progressive.sh released_mq                 # every GPU of this machine
#   bash train_scripts/hunyuan_progressive.sh released_vq_8gpu image:run.iterations=100 large:sample.height=720 optim.lr=5e-6
#   bash train_scripts/hunyuan_progressive.sh released_vq --dry-run --world-size 16
#   sbatch --nodes 2 train_scripts/slurm/train.sbatch hunyuan_progressive released_vq
#   sbatch --nodes 8 train_scripts/slurm/train.sbatch hunyuan_progressive paper_vq image:grpo.updates_per_iteration=2
#
# The first argument names a recipe of hunyuan_t2v.sh (not a LoRA one). Stages:
#   image   the recipe of hunyuan_t2i.sh for its settings (tiny, released or paper; with _8gpu: released_8gpu)
#   small   the named recipe, clips of 320x320 and 29 frames
#   large   the named recipe as it is
# What follows is passed on to all stages, and STAGE:key=value to that one.
# A stage trains in runs/hunyuan_progressive_NAME/N_STAGE/run and is exported to .../N_STAGE/model, a diffusers folder from
# which the next one starts; the last one is the result. RUNS=DIR puts them elsewhere.
# Started again, it goes on where it was: stages with a model are done, a run resumes from its newest checkpoint. To change
# a finished stage, remove its folder and those after it. SIGUSR1 stops it as hunyuan_t2v.sh, with exit code 75.
# The paper found that training on images alone is not enough for video; it trains at 480x480 only. This script is for
# comparing. What it needs: see hunyuan_t2i.sh and hunyuan_t2v.sh.
set -euo pipefail
source "$(dirname "$0")/common.sh"

NAME=${1:-}
if [ -z "$NAME" ] || [ ! -f "train_scripts/configs/hunyuan_t2v_$NAME.yaml" ] || [[ $NAME == *lora* ]]; then
  unknown "$NAME"
  echo "usage: $0 NAME [key=value ...] [STAGE:key=value ...] [--dry-run]; STAGE is image, small or large, NAME is one of:" >&2
  names hunyuan_t2v | grep -v lora >&2
  exit 2
fi
shift
need_python

ALL=() IMAGE=() SMALL=() LARGE=() DRY="" SIZES=(sample.height=320 sample.width=320 sample.frames=29)
IMAGES=${NAME%%_*}
if [[ $NAME == released_*_8gpu ]]; then IMAGES=released_8gpu; fi
if [ "$NAME" = tiny ]; then
  SIZES=(sample.height=32 sample.width=32 sample.frames=5)
fi
for argument in "$@"; do
  case $argument in
    image:*) IMAGE+=("${argument#image:}") ;;
    small:*) SMALL+=("${argument#small:}") ;;
    large:*) LARGE+=("${argument#large:}") ;;
    --dry-run) DRY=1 ALL+=("$argument") ;;
    *)
      if [[ $argument == *:* && ${argument%%:*} != *=* ]]; then
        echo "$0: $argument names no stage; stages are image, small and large" >&2
        exit 2
      fi
      ALL+=("$argument")
      ;;
  esac
done
RUNS=${RUNS:-runs/hunyuan_progressive_$NAME}
START=() # of the first stage: the recipe's own

# stage NUMBER NAME SCRIPT RECIPE [argument ...]: train and export it, unless its model is there; the next one starts from it.
stage() {
  local folder=$RUNS/$1_$2 name=$2 script=$3 recipe=$4
  shift 4
  if [ -f "$folder/model/model_index.json" ]; then
    echo "stage $name is done: $folder/model"
  else
    echo "stage $name: $script.sh $recipe, in $folder"
    if [ "${NODE_RANK:-0}" = 0 ]; then rm -f "$folder/export_failed"; fi
    forwarding bash "train_scripts/$script.sh" "$recipe" "${START[@]}" "run.dir=$folder/run" "$@"
    if [ -n "$DRY" ]; then return; fi # the weights for the next stage are not there: it is checked at the published sizes
    if [ "${NODE_RANK:-0}" = 0 ]; then
      # SIGUSR1 waits for it; links need one file system.
      (trap '' USR1 && { export_model "$folder" --link || export_model "$folder"; }) || {
        mkdir -p "$folder" && touch "$folder/export_failed"
        exit 1
      }
    fi
    while [ ! -f "$folder/model/model_index.json" ]; do # the first node exports; the folder appears when whole
      if [ -f "$folder/export_failed" ]; then
        echo "$0: the first node could not export stage $name; its output says why" >&2
        exit 1
      fi
      sleep 5
    done
  fi
  START=("model.path=$folder/model")
}

export_model() {
  "$PYTHON" -m fastvideo_grpo.cli export "$1/run" --out "$1/model" --pipeline "${@:2}"
}

trap 'exit 75' USR1 # where no training listens to it

stage 1 image hunyuan_t2i "$IMAGES" "${ALL[@]}" "${IMAGE[@]}"
stage 2 small hunyuan_t2v "$NAME" "${SIZES[@]}" "${ALL[@]}" "${SMALL[@]}"
stage 3 large hunyuan_t2v "$NAME" "${ALL[@]}" "${LARGE[@]}"
if [ -z "$DRY" ]; then echo "all stages are done; the model: $RUNS/3_large/model"; fi
