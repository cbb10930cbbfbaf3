#!/usr/bin/env bash
# Runs our GPU kernels (crates/model/src/cuda/kernels.cu) as C++ on a CPU, a thread for each of a block's threads, and compares them with plain loops.
# It shows that their arithmetic and indices are right, not that a GPU runs them: that is run.sh's.
# usage: on-cpu.sh          needs g++ 11 or later
set -euo pipefail
cd "$(dirname "$0")/on-cpu"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
g++ -std=c++20 -O1 -Wall -Wno-unknown-pragmas -I . kernels.cpp -o "$out/kernels" -lpthread
"$out/kernels"
