#!/usr/bin/env bash
# What only a machine with a GPU can show, in ten minutes: tests, the tiny recipe in bf16, and models at their published sizes.
#
#   bash benchmarks/gpu.sh [OUT]                     # results in OUT (runs/gpu)
#   CASES="flux_1024 wan_image:compiled" MINUTES=15 bash benchmarks/gpu.sh    # others (benchmarks/gpu_cases.py --list)
#   CASES=phases bash benchmarks/gpu.sh              # a random HunyuanVideo on all GPUs: ZeRO 2, ZeRO 3, two to a sample
#   DEVICE=cpu bash benchmarks/gpu.sh [OUT]          # the same steps at tiny sizes on a CPU, to try this script
#
# .venv is made if it is missing, which the ten minutes do not count. Every step runs, whatever becomes of the others; each has
# a log in OUT, and the exit code is 1 if one failed. Tests and the tiny recipe run where CASES is empty. OUT/gpu_cases.md is
# for docs/performance.md.
#   PYTHON   interpreter that has fastvideo_grpo (.venv/bin/python; another one is taken as it is)
set -euo pipefail

if [ $# -gt 1 ]; then
  sed -n '2,/^set/p' "$0" | sed '/^set/d; s/^# \{0,1\}//' >&2
  exit 2
fi
mkdir -p "${1:-runs/gpu}"
out=$(cd "${1:-runs/gpu}" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device=${DEVICE:-cuda}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=.venv/bin/python
  if [ ! -x "$PYTHON" ]; then make env; fi
fi
export PYTHON OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ "$device" = cpu ]; then
  export CUDA_VISIBLE_DEVICES=
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch sees no GPU here (fastvideo-grpo doctor says more); DEVICE=cpu bash $0 tries the steps on a CPU" >&2
  exit 2
fi

SECONDS=0
budget=$((60 * ${MINUTES:-10}))
patience=150
if [ "$device" = cpu ]; then patience=600; fi
failed=()
# step NAME SECONDS COMMAND ...: run it for so long at most, its output in OUT/NAME.log; here, too, with SHOW=1, else its end.
step() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  if [ -n "${SHOW:-}" ]; then
    timeout --kill-after 30 "$limit" "$@" 2>&1 | tee "$out/$name.log" || code=$?
  else
    timeout --kill-after 30 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  fi
  if [ "$code" -ne 0 ]; then
    failed+=("$name")
    echo "FAILED  $name after $((SECONDS - start)) s, exit code $code; its output is in $out/$name.log"
    if [ -z "${SHOW:-}" ]; then tail -n 15 "$out/$name.log"; fi
  elif [ -n "${SHOW:-}" ]; then
    echo "ok      $name, $((SECONDS - start)) s"
  else
    echo "ok      $name, $((SECONDS - start)) s: $(grep -v '^ *$' "$out/$name.log" | tail -n 1)"
  fi
}

# tiny ATTENTION [key=value ...]: the tiny recipe in bf16, from the start.
tiny() {
  local attention=$1
  shift
  rm -rf "$out/tiny_$attention"
  step "tiny_$attention" "$patience" env GPUS=1 bash train_scripts/hunyuan_t2v.sh tiny model.precision=bf16 \
    model.attention="$attention" run.dir="$out/tiny_$attention" "$@"
  if [ -f "$out/tiny_$attention/metrics.jsonl" ]; then
    "$PYTHON" - "$out/tiny_$attention/metrics.jsonl" <<'PY' || failed+=("ratio_$attention")
import json, sys
worst = max(json.loads(line)["train/ratio_first_update_max_dev"] for line in open(sys.argv[1]))
print(f"        ratio before the first optimiser step, largest deviation from 1: {worst:.1e}")
sys.exit(not worst <= 1e-6)
PY
  fi
}

if [ "$device" = cuda ]; then
  nvidia-smi >"$out/nvidia-smi.log" 2>&1 || true
fi
if [ -z "${CASES:-}" ]; then
  step tests "$patience" "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider
  tiny sdpa
  if [ "$device" = cuda ] && "$PYTHON" -c 'import flash_attn' 2>/dev/null; then
    # The tiny model's heads of 16 are too small for flash-attn; these have 64.
    rm -rf "$out/heads_of_64"
    mkdir -p "$out/heads_of_64"
    PYTHONPATH=benchmarks step heads_of_64 "$patience" "$PYTHON" -c \
      'import sys; from pathlib import Path; from memory import write_scaled; write_scaled(Path(sys.argv[1]), 256, 2, 2)' \
      "$out/heads_of_64"
    tiny flash model.path="$out/heads_of_64/scaled"
  else
    echo "left out: flash (it needs a GPU and flash-attn: pip install -e .[flash])"
  fi
fi

left=$((budget - SECONDS))
if [ "$left" -lt 120 ]; then left=120; fi
minutes=$(awk "BEGIN {print $left / 60}")
if [ "${CASES:-}" = phases ]; then
  sizes=()
  if [ "$device" = cpu ]; then sizes=(--tiny); fi
  SHOW=1 step gpu_phases $((left + 60)) "$PYTHON" benchmarks/gpu_phases.py --device "$device" "${sizes[@]}" --minutes "$minutes" \
    --out "$out"
else
  # shellcheck disable=SC2086  # several words
  SHOW=1 step gpu_cases $((left + 60)) "$PYTHON" benchmarks/gpu_cases.py ${CASES:-} --device "$device" --minutes "$minutes" --out "$out"
fi
echo "$SECONDS s, results in $out"
if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
