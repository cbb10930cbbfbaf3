#!/usr/bin/env python3
"""Decode and prefill speed beside llama.cpp's, on the same GGUF files, in turns.

usage: compare-llama-cpp.py EVOP LLAMA_BIN_DIRECTORY TYPE[@SHAPE]=FILE.gguf ... [--threads 2] [--rounds 5] [--prompt 128]

TYPE is evop's --dtype for that file: q8_0, bf16, f16, f32 or stored. With a SHAPE the file is one of random-gguf.py's, and evop measures random weights of that shape. LLAMA_BIN_DIRECTORY has llama-bench and llama-batched-bench, built on this machine.
Prints a table of medians: tokens a second of decoding 1, 4 and 16 sequences (--prompt tokens each, 64 new ones) and of a prompt of 512; and below it the share of the
machine's measured bandwidth that evop reads weights, keys and values at, decoding one sequence.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

BATCHES = [1, 4, 16]


def run(command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def evop(args, kind, file):
    kind, _, shape = kind.partition("@")
    model = ["--random", shape] if shape else ["--model", file]
    common = ["--threads", str(args.threads), *model, "--dtype", kind, "--repeats", "1", "--json"]
    decode = json.loads(run([args.evop, "bench", "decode", "--batch", ",".join(map(str, BATCHES)), "--prompt", str(args.prompt), *common]))
    prefill = json.loads(run([args.evop, "bench", "prefill", "--length", "512", *common]))
    return [line["tokens_per_second"][0] for line in decode + prefill], decode[0]["share_of_bandwidth"]


def llama_cpp(args, file):
    """One sequence and prompts by llama-bench, several sequences by llama-batched-bench (which is slower than llama-bench for one)."""
    def bench(*options):
        command = [os.path.join(args.llama, "llama-bench"), "-m", file, "-t", str(args.threads), "-r", "1", "-o", "json", *options]
        return json.loads(run(command))[0]["avg_ts"]

    batched = run([os.path.join(args.llama, "llama-batched-bench"), "-m", file, "-t", str(args.threads), "-c", "8192", "-npp", str(args.prompt), "-ntg", "64",
                   "-npl", ",".join(map(str, BATCHES[1:])), "--output-format", "jsonl"]).splitlines()
    several = [json.loads(line)["speed_tg"] for line in batched if line.startswith("{")]
    return [bench("-p", "0", "-n", "64", "-d", str(args.prompt)), *several, bench("-p", "512", "-n", "0")]


def shown(speed):
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evop")
    parser.add_argument("llama", metavar="LLAMA_BIN_DIRECTORY")
    parser.add_argument("files", nargs="+", metavar="TYPE[@SHAPE]=FILE.gguf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    args = parser.parse_args()
    print("| type | measure | evop | llama.cpp | ratio |\n| --- | --- | --- | --- | --- |")
    bandwidth = []
    for kind, file in (of.split("=", 1) for of in args.files):
        ours, theirs, shares = [], [], []
        for round in range(args.rounds):
            speeds, share = evop(args, kind, file)
            ours.append(speeds)
            shares.append(share)
            theirs.append(llama_cpp(args, file))
            print(f"{kind}, round {round + 1} of {args.rounds}: evop {ours[-1]}, llama.cpp {theirs[-1]}", file=sys.stderr, flush=True)
        names = [f"decode, {n} at once" for n in BATCHES] + ["prefill 512"]
        for name, a, b in zip(names, zip(*ours), zip(*theirs)):
            a, b = statistics.median(a), statistics.median(b)
            print(f"| {kind.partition('@')[0]} | {name} | {shown(a)} | {shown(b)} | {a / b:.2f} |", flush=True)
        bandwidth.append(f"{kind}: {statistics.median(shares):.0%}")
    print("\nof the machine's bandwidth, decode, 1 at once: " + ", ".join(bandwidth))


if __name__ == "__main__":
    main()
