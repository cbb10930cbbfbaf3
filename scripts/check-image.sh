#!/usr/bin/env bash
# Builds the Dockerfile for real and uses what comes out: prunes the bundled model in the container, serves the result, asks for a
# completion, stops it. Works without a container engine: scripts/base-images.sh makes the base images, buildah builds and runs.
#
# usage: scripts/check-image.sh        needs root, curl, python3 and a few GB of disk; builds the whole workspace in release mode
# KEEP=1 leaves the image (localhost/evop:check) behind
set -euo pipefail
cd "$(dirname "$0")/.."

# chroot: no user namespaces or cgroups needed, and the host's network is shared, so loopback is the test's own.
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
readonly IMAGE=localhost/evop:check
readonly OWNER=65532

step() { printf '\n== %s\n' "$*"; }
passed=0
ok() { passed=$((passed + 1)); echo "ok $*"; }
die() { echo "not ok $*" >&2; exit 1; }

work=$(mktemp -d)
container='' server=''
clean_up() {
  local status=$?
  if [ -n "$server" ]; then kill -KILL -- "-$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; fi
  if [ -n "$container" ]; then buildah rm "$container" >/dev/null 2>&1 || true; fi
  if [ -z "${KEEP:-}" ]; then buildah rmi "$IMAGE" >/dev/null 2>&1 || true; fi
  rm -rf "$work"
  [ $status = 0 ] || echo "$passed passed, 1 failed"
}
trap clean_up EXIT

step "base images"
bash scripts/base-images.sh

step "buildah bud"
started=$SECONDS
# Docker's own format, because the other one has no HEALTHCHECK.
buildah bud --pull=never --format docker --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || true)" --tag "$IMAGE" . \
  >"$work/build.log" 2>&1 || { tail -40 "$work/build.log" >&2; die "the image builds"; }
ok "the image builds ($((SECONDS - started)) s)"
buildah images --format '{{.Name}}:{{.Tag}}  {{.Size}}' "$IMAGE"

step "what the image says of itself"
buildah inspect --type image "$IMAGE" \
  | python3 -c 'import json, sys; json.dump(json.load(sys.stdin)["Docker"]["config"], sys.stdout)' >"$work/config.json"
python3 - "$work/config.json" <<'PY'
import json
import sys

config = json.load(open(sys.argv[1]))
expected = {
    "User": "65532:65532",
    "Entrypoint": ["evop"],
    "Cmd": ["serve", "--host", "0.0.0.0"],
    "ExposedPorts": {"8000/tcp": {}, "8001/tcp": {}},
    "Volumes": {"/data": {}},
}
for name, value in expected.items():
    assert config[name] == value, f"{name} is {config[name]}, not {value}"
assert config["Healthcheck"]["Test"] == ["CMD", "evop", "health"], config["Healthcheck"]
print(json.dumps({name: config[name] for name in (*expected, "Env", "Healthcheck")}, indent=2))
PY
ok "user, entry point, ports, volume and health check are as documented"

mapfile -t environment < <(python3 -c 'import json, sys; print(*json.load(open(sys.argv[1]))["Env"], sep="\n")' "$work/config.json")

container=$(buildah from --pull=never "$IMAGE")
root=$(buildah mount "$container")
echo "evop: $(stat --format %s "$root/usr/local/bin/evop") bytes"
chmod 755 "$work"
install --directory --owner="$OWNER" --group="$OWNER" "$work/data"

# buildah runs a command as the image says and keeps the image's volume, but can't make the root file system read-only.
in_container() { buildah run "$container" -- "$@"; }

# As a strict cluster would run it: the image's root file system read-only, a volume at /data, an empty /tmp, no capabilities.
# The mounts are in a namespace of their own and go with it. Each step replaces the one before, so that $! is the command.
# shellcheck disable=SC2016  # the inner shell expands these
readonly ENTER='
  set -e
  root=$1 data=$2 owner=$3; shift 3
  mount --bind "$root" "$root"
  mount --bind "$data" "$root/data"
  mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
  mount --rbind /proc "$root/proc"
  mount --rbind /dev "$root/dev"
  for file in resolv.conf hosts; do
    if [ -e "$root/etc/$file" ]; then mount --bind "/etc/$file" "$root/etc/$file"; fi
  done
  mount -o remount,bind,ro "$root"
  exec chroot "$root" setpriv --reuid "$owner" --regid "$owner" --clear-groups --no-new-privs --bounding-set=-all \
    --inh-caps=-all env -i --chdir=/data "$@"'
read_only() {
  exec unshare --mount --propagation private sh -c "$ENTER" enter "$root" "$work/data" "$OWNER" "${environment[@]}" "$@"
}

step "in buildah's own container"
ok "it runs: $(in_container evop --version)"
user=$(in_container id -u)
[ "$user" = "$OWNER" ] || die "it runs as uid $OWNER (it is $user)"
ok "it runs as uid $OWNER"
[ "$(stat --format %u:%a "$root/data")" = "$OWNER:755" ] || die "/data of the image is its user's"
ok "/data of the image is its user's"

if (read_only true) 2>"$work/log"; then
  run=read_only
  step "with a read-only root file system"
  if (read_only sh -c ': > /usr/local/bin/x') 2>/dev/null || (read_only sh -c ': > /var/tmp/x') 2>/dev/null; then
    die "the root file system is read-only"
  fi
  (read_only sh -c ': > /data/x && rm /data/x && : > /tmp/x') || die "/data and /tmp can be written"
  ok "only /data and /tmp can be written"
else
  run=in_container
  step "with a writable root file system"
  echo "this machine lets no one mount ($(tail -1 "$work/log")): a read-only root file system is not checked"
fi

step "evop prune"
started=$SECONDS
("$run" evop prune --out /data/pruned --preset paper --space layer --sparsity 0.25) || die "evop prune works"
("$run" test -s /data/pruned/config.json) || die "evop prune wrote a checkpoint to /data/pruned"
ok "the bundled model is pruned ($((SECONDS - started)) s)"
("$run" ls -l /data/pruned)

step "evop serve"
read -r port admin_port < <(python3 -c '
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))')
url=http://127.0.0.1:$port
set -m # the server and what runs it are a process group, so that the end of this script is the end of them all
"$run" evop serve --model /data/pruned --host 127.0.0.1 --port "$port" --admin-addr "127.0.0.1:$admin_port" \
  >"$work/serve.log" 2>&1 &
server=$!
set +m
for _ in {1..120}; do
  kill -0 "$server" 2>/dev/null || { cat "$work/serve.log" >&2; die "the server stays up"; }
  if ("$run" evop health --url "$url/ready") >/dev/null 2>&1; then ready=yes; break; fi
  sleep 0.5
done
[ "${ready:-}" = yes ] || { cat "$work/serve.log" >&2; die "the server gets ready within a minute"; }
ok "evop health says that it is ready"

model=$(curl -fsS --max-time 10 "$url/v1/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
curl -fsS --max-time 120 "$url/v1/completions" -H 'Content-Type: application/json' \
  -d "{\"model\": \"$model\", \"prompt\": \"Once upon a time\", \"max_tokens\": 32, \"temperature\": 0}" >"$work/answer.json"
python3 - "$work/answer.json" <<'PY'
import json
import sys

answer = json.load(open(sys.argv[1]))
print(json.dumps(answer, indent=2, ensure_ascii=False))
assert answer["choices"][0]["text"].strip(), "the answer is empty"
assert answer["usage"]["completion_tokens"] > 0, answer["usage"]
PY
ok "$model completes a prompt"

step "SIGTERM"
# buildah stands between this script and the server, where it is what runs it.
if [ $run = read_only ]; then
  kill -TERM "$server"
  status=0
  wait "$server" || status=$?
  server=''
  [ $status = 0 ] || { tail "$work/serve.log" >&2; die "the server exits 0 on SIGTERM (it is $status)"; }
  ok "the server exits 0"
  if ("$run" evop health --url "$url/live") >/dev/null 2>&1; then die "evop health fails when nothing answers"; fi
  ok "evop health fails when nothing answers"
else
  echo "not checked: the server is a child of buildah"
fi

echo "$passed passed, 0 failed"
