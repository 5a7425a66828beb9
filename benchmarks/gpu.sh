#!/usr/bin/env bash
# What a GPU gives, in ten minutes: benchmarks/gpu.sh [--dry-run] OUT
#
# Writes OUT/*.jsonl, the output of each step to OUT/*.log, and OUT/steps.tsv with exit codes and seconds. Steps are in
# order of value. Each has a limit of its own, and one that fails does not stop the others. If PyTorch is installed, it
# is timed too. The fourth step needs the data sets of letters-iid. --dry-run: tiny sizes, on a CPU.
set -u
here=$(cd "$(dirname "$0")" && pwd)
dry=false
if [ "${1:-}" = --dry-run ]; then
  dry=true
  export JAX_PLATFORMS=cpu
  shift
fi
if [ $# -ne 1 ]; then
  echo "usage: gpu.sh [--dry-run] OUT" >&2
  exit 2
fi
mkdir -p "$1" || exit 1
if [ -n "$(ls -A "$1")" ]; then
  echo "gpu.sh: error: wanted an empty folder, got $1" >&2
  exit 2
fi
out=$(cd "$1" && pwd)
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" XLA_PYTHON_CLIENT_PREALLOCATE=false

# step SECONDS NAME COMMAND...
step() {
  local limit=$1 name=$2 start=$SECONDS code
  if $dry; then limit=900; fi
  timeout --kill-after=10 "$limit" "${@:3}" >"$out/$name.log" 2>&1
  code=$?
  printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - start))" | tee -a "$out/steps.tsv"
}

run() {
  step "$1" "$2" python "$here/$3" "${@:4}" --json "$out/$2.jsonl"
}

experiment() {
  step "$1" "$2" python -m fedmd_jax run "${@:3}" --out "$out/runs/$2"
}

torch=() seeds=8
if $dry; then
  round=(--width 0.02 --networks 0 --public 32 --repeats 1 --phases score digest)
  clients=(--clients 1 2 --public 16 --repeats 1 --no-compiled)
  forms=(--clients 2 --shapes 1)
  quick=(quickstart --smoke --no-pooled)
  paper=(quickstart --smoke)
  seeds=2
else
  round=()
  clients=(--clients 1 4 16 64 256 1024 --memory 0 --repeats 3 --no-compiled)
  forms=(--clients 16)
  quick=(quickstart --no-pooled)
  paper=(letters-iid)
fi
if python -c 'import torch' 2>/dev/null; then
  torch=(--against torch --variants torch "torch channels_last")  # the compiled ones take minutes to compile
else
  clients+=(--forms fedmd_jax)
fi

run 100 round_time_tf32 round_time.py "${round[@]}" "${torch[@]}" --tf32
run 35 round_time_bfloat16 round_time.py "${round[@]}" --dtype bfloat16
run 30 conv_forms conv_forms.py "${forms[@]}"
experiment 160 letters_iid "${paper[@]}"
# The peer multiplies in float32 there.
JAX_DEFAULT_MATMUL_PRECISION=float32 run 75 clients clients.py "${clients[@]}"
experiment 35 seeds_1 "${quick[@]}" --num-seeds "$seeds" --vmap-seeds 1
experiment 35 seeds_8 "${quick[@]}" --num-seeds "$seeds" --vmap-seeds "$seeds"
experiment 35 bfloat16 "${quick[@]}" --num-seeds "$seeds" --vmap-seeds "$seeds" --dtype bfloat16
run 25 round_time_float32 round_time.py "${round[@]}"
