#!/usr/bin/env python3
"""A checkpoint that evop wrote, in Hugging Face transformers and in evop serve: are the log-probabilities equal?

usage: pruned_checkpoint.py EVOP DIR     needs: torch, transformers (tests/goldens/requirements.txt)
Scores a prompt through the server (echo with logprobs) and in transformers, and generates 60 greedy tokens in both; exits 1 if they differ.
"""
import json, pathlib, socket, subprocess, sys, tempfile, time, urllib.request

import torch
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4
TEXT = "It was the best of times, it was the worst of times, and the old man looked out over the harbour before he spoke."


def main(evop, directory):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as data, open(f"{data}/log", "w") as log:
        server = subprocess.Popen([evop, "serve", "--model", directory, "--port", str(port), "--admin-addr", "off", "--data-dir", data], stdout=log, stderr=log)
        try:
            check(url, server, directory)
        finally:
            server.terminate()
            server.wait()


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request))


def check(url, server, directory):
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{url}/ready")
            break
        except OSError:
            assert server.poll() is None, "evop serve ended"
            time.sleep(0.1)
    heterogeneous = "auto_map" in json.loads(pathlib.Path(directory, "config.json").read_text())
    if heterogeneous:
        try:
            AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
            sys.exit("stock transformers loaded a heterogeneous checkpoint without being told to trust its code")
        except ValueError as refusal:
            print("without trust_remote_code: refused,", str(refusal).split(".")[0][:100])
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=heterogeneous, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    ids = post(f"{url}/tokenize", {"prompt": TEXT, "add_special_tokens": False})["tokens"]
    scored = post(f"{url}/v1/completions", {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1})["choices"][0]["logprobs"]["token_logprobs"]
    greedy = post(f"{url}/v1/completions", {"prompt": ids, "max_tokens": 60, "temperature": 0, "ignore_eos": True, "return_token_ids": True})["choices"][0]["token_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = [logits[i - 1, ids[i]].item() for i in range(1, len(ids))]
        tokens = list(ids)
        for _ in range(60):
            tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
    worst = max(abs(a - b) for a, b in zip(scored[1:], expected))
    equal = sum(1 for a, b in zip(greedy, tokens[len(ids):]) if a == b)
    print(f"{directory}: {'heterogeneous' if heterogeneous else 'plain'} {model.config.model_type}, {model.config.num_hidden_layers} layers: "
          f"largest difference of {len(expected)} log-probabilities {worst:.1e}, {equal} of 60 greedy tokens equal")
    sys.exit(0 if worst < TOLERANCE and equal == 60 else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
