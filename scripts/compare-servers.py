#!/usr/bin/env python3
"""Requests a second and resident memory beside llama-server, on the same GGUF file: both servers run, 16 clients ask one and then the other, in turns.

usage: compare-servers.py EVOP LLAMA_BIN_DIRECTORY FILE.gguf [--dtype TYPE] [--threads 2] [--rounds 5] [--requests 64] [--kv-memory SIZE]

LLAMA_BIN_DIRECTORY has llama-server, built on this machine. Prompts of 128 random tokens, answers of 64; both sides have room for 16 sequences of 512 tokens, keys and
values in f16. TYPE is evop's --dtype, by default the file's own types. --kv-memory is for these 8,192 tokens: as much as the model needs, if it is left away.
"""
import argparse
import json
import os
import socket
import statistics
import subprocess
import time
import urllib.request

from served import Server

CLIENTS, CONTEXT = 16, 512


def memory(process):
    """(resident, the most that ever was), MB."""
    with open(f"/proc/{process.pid}/status", encoding="utf-8") as status:
        fields = dict(line.split(":", 1) for line in status)
    return [int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM")]


def wait(url, process):
    while process.poll() is None:
        try:
            urllib.request.urlopen(url)
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{process.args[0]} ended before it was ready")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evop")
    parser.add_argument("llama", metavar="LLAMA_BIN_DIRECTORY")
    parser.add_argument("file", metavar="FILE.gguf")
    parser.add_argument("--dtype", default="stored")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", default="64")
    parser.add_argument("--kv-memory")
    args = parser.parse_args()
    evop = Server(args.evop, ["--model", args.file, "--dtype", args.dtype, "--threads", args.threads, "--max-concurrent", str(CLIENTS), "--max-model-len", str(CONTEXT),
                              "--kv-dtype", "f16", "--log", "warn", *(["--kv-memory", args.kv_memory] if args.kv_memory else [])])
    port = free_port()
    llama = subprocess.Popen([os.path.join(args.llama, "llama-server"), "-m", args.file, "-t", args.threads, "-tb", args.threads, "-np", str(CLIENTS),
                              "-c", str(CLIENTS * CONTEXT), "--cache-ram", "0", "--no-webui", "--port", port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    urls = [evop.url, f"http://127.0.0.1:{port}"]
    try:
        wait(urls[1] + "/health", llama)
        reports = [[], []]
        for number in range(args.rounds):
            for url, own in zip(urls, reports):
                bench = subprocess.run([args.evop, "bench", "serve", "--url", url, "--concurrency", str(CLIENTS), "--requests", args.requests, "--prompt-tokens", "128",
                                        "--output-tokens", "64", "--seed", str(number + 1), "--json"], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                own.append(json.loads(bench.stdout)["levels"][0])
        resident = [memory(process) for process in (evop.process, llama)]
    finally:
        llama.kill()
        evop.stop()
    print("| | evop | llama-server | ratio |\n| --- | --- | --- | --- |")
    medians = lambda pick: [statistics.median(pick(report) for report in own) for own in reports]
    rates = medians(lambda r: r["requests_per_second"])
    spread = [f"{rate:.3g} ({min(r['requests_per_second'] for r in own):.3g} to {max(r['requests_per_second'] for r in own):.3g})" for rate, own in zip(rates, reports)]
    print(f"| requests a second | {spread[0]} | {spread[1]} | {rates[0] / rates[1]:.2f} |")
    for what, name in (("time to first token, median", "time_to_first_token"), ("between tokens, median", "inter_token_latency")):
        own, other = medians(lambda r: r[name]["p50"])
        print(f"| {what} | {own:,.0f} ms | {other:,.0f} ms | |")
    for what, index in (("resident afterwards", 0), ("resident at most", 1)):
        own, other = (of[index] for of in resident)
        print(f"| {what} | {own:,.0f} MB | {other:,.0f} MB | {own / other:.2f} |")


main()
