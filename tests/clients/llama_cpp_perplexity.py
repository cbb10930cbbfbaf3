#!/usr/bin/env python3
"""A GGUF that evop wrote, in llama.cpp and in evop: is the perplexity of a text the same?

usage: llama_cpp_perplexity.py EVOP LLAMA_PERPLEXITY FILE.gguf TEXT [--window N] [--chunks N] [--tolerance X]

llama-perplexity cuts the text into windows and counts the tokens of each one's second half (from N/2 + 1 on). The same tokens are scored here
through evop's server (a completion of no tokens that echoes its prompt with log-probabilities). Exits 1 when the mean negative log-likelihoods
differ by more than the tolerance: 1e-4 nats suits f32 files. 16-bit and quantised weights make llama.cpp round the activations, too.
"""
import argparse
import json
import math
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request


def llama_cpp(binary, model, text, window, chunks):
    """The mean negative log-likelihood of a token, and the tokens counted."""
    options = ["-c", str(window), "-b", str(window), "--chunks", str(chunks), "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", "2"]
    # its log is written by a thread of its own, and a short run may end before the last line is out
    for _ in range(5):
        run = subprocess.run([binary, "-m", model, "-f", text, *options], capture_output=True, text=True)
        output = run.stdout + run.stderr
        found = re.search(r"Final estimate: PPL = ([0-9.]+)", output)
        if found or run.returncode:
            break
    if not found:
        sys.exit(f"llama-perplexity gave none (status {run.returncode}):\n{output[-3000:]}")
    per_chunk = [float(v) for v in re.findall(r"\[\d+\]([0-9.]+)", run.stdout)]
    return math.log(float(found[1])), len(per_chunk)


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request))


def evop(binary, model, text, window, chunks):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as data, open(f"{data}/log", "w") as log:
        server = subprocess.Popen([binary, "serve", "--model", model, "--port", str(port), "--admin-addr", "off", "--data-dir", data], stdout=log, stderr=log)
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{url}/ready")
                    break
                except OSError:
                    assert server.poll() is None, "evop serve ended"
                    time.sleep(0.1)
            tokenize = lambda special: post(f"{url}/tokenize", {"prompt": pathlib.Path(text).read_text(), "add_special_tokens": special})["tokens"]
            tokens = tokenize(True)
            begin = tokens[:1] if tokens != tokenize(False) else []
            scores = []
            for chunk in range(chunks):
                # where a tokenizer puts a token before a text, llama-perplexity has it in place of every window's first
                ids = begin + tokens[chunk * window:(chunk + 1) * window][len(begin):]
                answer = post(f"{url}/v1/completions", {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1})
                scores += answer["choices"][0]["logprobs"]["token_logprobs"][window // 2 + 1:]
        finally:
            server.terminate()
            server.wait()
    return -sum(scores) / len(scores), len(scores)


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("evop", "llama_perplexity", "model", "text"):
        args.add_argument(name)
    args.add_argument("--window", type=int, default=512)
    args.add_argument("--chunks", type=int, default=10)
    args.add_argument("--tolerance", type=float, default=1e-4)
    args = args.parse_args()
    theirs, chunks = llama_cpp(args.llama_perplexity, args.model, args.text, args.window, args.chunks)
    ours, tokens = evop(args.evop, args.model, args.text, args.window, args.chunks)
    print(f"{args.model}: {tokens} tokens of {chunks} windows of {args.window}: llama.cpp {theirs:.6f} nats (perplexity {math.exp(theirs):.4f}), "
          f"evop {ours:.6f} ({math.exp(ours):.4f}), difference {abs(theirs - ours):.1e}")
    return int(not abs(theirs - ours) <= args.tolerance or chunks != args.chunks)


if __name__ == "__main__":
    sys.exit(main())
