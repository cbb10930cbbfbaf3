#!/usr/bin/env bash
# Serves a checkpoint on a free port with a key, and runs the scripts of openai's, anthropic's, litellm's and langchain's clients against it; then compares evop eval with lm-evaluation-harness, and smaller vocabularies with their parents.
# usage: run.sh PYTHON EVOP MODEL_DIR
set -euo pipefail
python=$1 evop=$2 model=$3
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
EVOP_API_KEYS=test-key "$evop" serve --model "$model" --served-model-name pruned --port "$port" --admin-addr off --data-dir "$work/data" 2>"$work/log" &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true; rm -rf "$work"' EXIT
for _ in $(seq 200); do
  "$evop" health --url "http://127.0.0.1:$port/ready" 2>/dev/null && break
  kill -0 $server 2>/dev/null || { cat "$work/log"; exit 1; }
  sleep 0.1
done
"$python" "$here/openai_client.py" --base-url "http://127.0.0.1:$port/v1" --api-key test-key --model pruned
"$python" "$here/other_apis.py" --base-url "http://127.0.0.1:$port/v1" --api-key test-key --model pruned
"$python" "$here/structured_client.py" --base-url "http://127.0.0.1:$port/v1" --api-key test-key --model pruned
"$python" "$here/frameworks_client.py" --base-url "http://127.0.0.1:$port/v1" --api-key test-key --model pruned
"$python" "$here/lm_eval_tasks.py" "$evop" "$here/../../models/tiny"
"$python" "$here/lm_eval_tasks.py" "$evop" "$here/../../models/tiny" "$here/../../models/tiny/continuations.jsonl.gz" --limit 100 --api
books=$here/../../models/tiny/calibration.txt.gz
"$python" "$here/vocabulary.py" "$evop" "$books" "$here/../../models/tiny"
gzip -dc "$books" | sed -n 1,25p > "$work/text.txt"
"$python" "$here/vocabulary.py" "$evop" "$work/text.txt" "$here"/../../crates/model/tests/goldens/gguf_{llama_spm_linear,llama_llama3,qwen2}/model.gguf
