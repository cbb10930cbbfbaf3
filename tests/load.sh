#!/usr/bin/env bash
# A load that misbehaves, on the bundled model: CLIENTS streaming clients (256), of which 30 % hang up, some read slowly and some send half of a
# body, for SECONDS (300) against a server with a short queue. Fails on any error but a 429 with Retry-After, on key/value blocks that stay held,
# and if the server's memory grows by more than 2 % between the end of a warm-up and the end.
#
#   cargo build --release && tests/load.sh [SECONDS [CLIENTS]]
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-300}
clients=${2:-256}
warm_up=${WARM_UP:-$((seconds / 3 < 30 ? 30 : seconds / 3))}
evop=${EVOP:-target/release/evop}
# more would hide what a load leaves behind
allowed_growth=1.02

directory=$(mktemp -d)
server=
finish() {
  if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; fi
  rm -rf "$directory"
}
trap finish EXIT

# (blocks are taken from the system when they are first used: a small pool has been used up when the warm-up ends)
env -u EVOP_MODEL "$evop" serve --port 0 --admin-addr off --data-dir "$directory" --log warn --max-queue 64 --max-concurrent 32 \
  --kv-memory 48MiB \
  >"$directory/out" 2>"$directory/log" &
server=$!
until grep -q address "$directory/out" 2>/dev/null; do
  kill -0 "$server" || { cat "$directory/log"; exit 1; }
  sleep 0.1
done
url=http://$(sed -n 's/.*"address":"\([^"]*\)".*/\1/p' "$directory/out")
until "$evop" health --url "$url/ready" >/dev/null 2>&1; do sleep 0.1; done

load() {
  "$evop" bench serve --url "$url" --concurrency "$clients" --seconds "$1" --seed "$2" --prompt-tokens 64 --output-tokens 96 \
    --disconnect 0.3 --slow-readers 0.05 --half-bodies 0.05
}
resident() { sed -n 's/^VmRSS:[[:space:]]*\([0-9]*\) kB/\1/p' "/proc/$server/status"; }

echo "== warm-up: $warm_up s"
load "$warm_up" 1
before=$(resident)
echo "== load: $seconds s"
load "$seconds" 2
after=$(resident)

echo "resident: $before KiB after the warm-up, $after KiB after the load"
awk -v before="$before" -v after="$after" -v most="$allowed_growth" 'BEGIN { exit !(after <= before * most) }' \
  || { echo "FAILED: the server's memory grew by more than 2 %"; exit 1; }
if grep -iE '"level":"ERROR"|panic' "$directory/log"; then echo "FAILED: the server logged errors"; exit 1; fi
echo "ok: no error but 429 with Retry-After, nothing held, memory steady"
