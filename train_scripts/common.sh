# Sourced by the train scripts (bash): what they share.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}

need_python() {
  if [ ! -x "$(command -v "$PYTHON")" ]; then
    echo "$0: no $PYTHON; run 'make env', or set PYTHON to an interpreter that has fastvideo_grpo" >&2
    exit 2
  fi
}

# make_tiny MODEL DIR: the tiny random checkpoint of the tiny recipes, where it is not there yet.
make_tiny() {
  if [ ! -f "$2/model_index.json" ]; then
    # On several nodes at once one of them is the first, and the others find it made.
    "$PYTHON" -m fastvideo_grpo.cli tiny "$1" --out "$2" || [ -f "$2/model_index.json" ]
  fi
}

# names PREFIX: the recipes of a script, one a line.
names() {
  local file
  for file in train_scripts/configs/"$1"_*.yaml; do
    file=${file##*/"$1"_}
    echo "  ${file%.yaml}"
  done
}

# unknown [NAME]: what is told of a name that is no recipe's.
unknown() {
  if [ -n "${1:-}" ]; then echo "$0: there is no recipe $1" >&2; fi
}

# train_recipe PREFIX MODEL DIR [NAME [argument ...]]: train configs/PREFIX_NAME.yaml; the tiny ones use a tiny MODEL in DIR.
train_recipe() {
  local prefix=$1 model=$2 tiny=$3 name=${4:-}
  local config=train_scripts/configs/${prefix}_$name.yaml
  if [ -z "$name" ] || [ ! -f "$config" ]; then
    unknown "$name"
    echo "usage: $0 NAME [key=value ...] [--dry-run]; NAME is one of:" >&2
    names "$prefix" >&2
    exit 2
  fi
  shift 4
  need_python
  if [[ $name == tiny* ]]; then
    make_tiny "$model" "$tiny"
    GPUS=${GPUS:-1} # too small to be dealt to many
  fi
  launch "$config" "$@"
}

# visible_gpus: how many GPUs torch would see, without starting it.
visible_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[0-9A-Za-z]' || true
  else
    { nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l
  fi
}

# launch CONFIG [argument ...]: one process a GPU of this machine, on NNODES machines; without a GPU one process. Does not
# return.
launch() {
  local config=$1 argument
  shift
  for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then
      exec "$PYTHON" -m fastvideo_grpo.cli train "$config" "$@"
    fi
  done
  GPUS=${GPUS:-$(visible_gpus)}
  if [ "$GPUS" -lt 1 ]; then GPUS=1; fi
  NNODES=${NNODES:-1}
  trap '' USR1 # until training listens to it: by default it kills
  if [ $((GPUS * NNODES)) -eq 1 ]; then
    exec "$PYTHON" -m fastvideo_grpo.cli train "$config" "$@"
  fi
  local options=(--standalone)
  if [ "$NNODES" -gt 1 ]; then
    options=(--node-rank "${NODE_RANK:?set NODE_RANK to the rank of this node, 0 to NNODES - 1}"
      --master-addr "${MASTER_ADDR:?set MASTER_ADDR to the address of node 0}" --master-port "${MASTER_PORT:-29500}")
  fi
  if [ -n "${LOGS:-}" ]; then
    options+=(--log-dir "$LOGS" --redirects 3 --tee 0:3) # every rank into files, the first of each node here too
  fi
  exec "$PYTHON" train_scripts/torchrun.py --nnodes "$NNODES" --nproc-per-node "$GPUS" "${options[@]}" \
    -m fastvideo_grpo.cli train "$config" engine.kind=deepspeed "$@"
}

# forwarding COMMAND [argument ...]: run it, hand SIGUSR1 on to it (and SIGTERM for Ctrl-C and SIGTERM), return its exit code.
forwarding() {
  local child code again before
  before=$(trap -p USR1)
  "$@" &
  child=$!
  trap 'again=1; kill -USR1 "$child" 2>/dev/null || true' USR1
  trap 'again=1; kill -TERM "$child" 2>/dev/null || true' INT TERM
  while true; do
    again=0 code=0
    wait "$child" || code=$? # a trap ends it early
    if [ "$again" -eq 0 ]; then break; fi
  done
  trap - USR1 INT TERM
  eval "$before"
  return "$code"
}
