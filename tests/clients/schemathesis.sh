#!/usr/bin/env bash
# Serves the bundled model and asks it what its own /openapi.json allows, and what it doesn't: no answer may be a 5xx or differ from what the
# document says. About two minutes.
# usage: schemathesis.sh SCHEMATHESIS EVOP
set -euo pipefail
schemathesis=$(realpath "$1") evop=$(realpath "$2")
work=$(mktemp -d)
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# a short context bounds what one request can cost
cd "$work"  # schemathesis leaves files where it runs
"$evop" serve --max-model-len 128 --port "$port" --admin-addr off --data-dir "$work/data" >"$work/log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true; rm -rf "$work"' EXIT
for _ in $(seq 200); do
  "$evop" health --url "http://127.0.0.1:$port/ready" 2>/dev/null && break
  kill -0 $server 2>/dev/null || { cat "$work/log"; exit 1; }
  sleep 0.1
done
ask() {
  "$schemathesis" run "$@" --no-color --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
    --request-timeout 60 --seed 1 --generation-database none --suppress-health-check all --continue-on-failure || { tail -20 "$work/log"; exit 1; }
}
# the examples once more as streams, short ones, of which it sees the end: what is made at random seldom asks for one
python3 - "http://127.0.0.1:$port/openapi.json" >streams.json <<'PYTHON'
import json, sys, urllib.request
document = json.load(urllib.request.urlopen(sys.argv[1]))
posts = (item["post"] for item in document["paths"].values() if "post" in item)
for post in posts:
    if "text/event-stream" in post["responses"]["200"]["content"]:
        name = post["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        example = document["components"]["schemas"][name]["example"]
        example.update({key: 2 for key in example if key.startswith("max_")}, stream=True)
json.dump(document, sys.stdout)
PYTHON
ask streams.json --url "http://127.0.0.1:$port" --phases examples
ask "http://127.0.0.1:$port/openapi.json" --phases examples,coverage,fuzzing --max-examples 60 --max-time 100
