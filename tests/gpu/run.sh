#!/usr/bin/env bash
# CUDA against CPU on one machine: logits of all rows and greedy tokens. Needs a build with `--features cuda` (or `cuda,flash-attn`).
# usage: run.sh EVOP [MODEL ...]        a MODEL is a directory or .gguf file; without one the bundled model
# Without a GPU it says so and exits 0.
set -euo pipefail
evop=$1; shift
if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
  echo "skipped: no NVIDIA GPU on this machine"
  exit 0
fi
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
[ $# -gt 0 ] || set -- ""
for model in "$@"; do
  "$evop" compare-devices --device cuda ${model:+--model "$model"}
done
