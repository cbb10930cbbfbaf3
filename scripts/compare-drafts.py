#!/usr/bin/env python3
"""How fast one request at a time is with a form that drafts, beside the same model without, in turns.

usage: compare-drafts.py EVOP NAME=pattern.json ... --prompts FILE [--model MODEL] [--most 1,4] [--requests 9] [-- options of evop serve]

Every form is tried with each limit of --most tokens before a check. FILE has a prompt a line. Prints a table: the part of the drafted tokens that was right, tokens drafted
for each answered one, and the median speed-up of a greedy request of 96 tokens.
"""
import argparse
import json
import statistics
import subprocess
import tempfile
import time
import urllib.request

TOKENS = 96


class Server:
    def __init__(self, evop, options):
        self.data = tempfile.TemporaryDirectory()
        command = [evop, "serve", "--port", "0", "--admin-addr", "off", "--data-dir", self.data.name, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.url = "http://" + json.loads(self.process.stdout.readline())["address"]
        while self.get("/ready") is None:
            time.sleep(0.1)

    def get(self, path):
        try:
            return urllib.request.urlopen(self.url + path).read().decode()
        except OSError:
            return None

    def seconds(self, prompt):
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
        started = time.monotonic()
        text = json.load(urllib.request.urlopen(request))["choices"][0]["text"]
        return time.monotonic() - started, text

    def metric(self, name):
        return sum(float(line.rsplit(" ", 1)[1]) for line in self.get("/metrics").splitlines() if line.startswith(name + "{") or line.startswith(name + " "))

    def stop(self):
        self.process.terminate()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evop")
    parser.add_argument("forms", nargs="+", metavar="NAME=pattern.json")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--model")
    parser.add_argument("--most", default="1,4")
    parser.add_argument("--requests", type=int, default=9)
    args, serve = parser.parse_known_args()
    options = [o for o in serve if o != "--"] + (["--model", args.model] if args.model else [])
    prompts = [line.strip() for line in open(args.prompts, encoding="utf-8") if line.strip()]
    print("| drafts by | at most | right, of those drafted | drafted for a token | speed-up |\n| --- | --- | --- | --- | --- |")
    for form in args.forms:
        name = form.split("=", 1)[0]
        for most in args.most.split(","):
            # with the form too: it says in which order the weights are loaded, which rounds sums otherwise. Anew each time: a process that has been there for
            # longer lies in larger pages, and is faster by up to a tenth
            alone = Server(args.evop, [*options, "--pattern", form])
            drafting = Server(args.evop, [*options, "--pattern", form, "--speculate", name, "--speculate-tokens", most])
            ratios = []
            for i in range(args.requests):
                prompt = prompts[i % len(prompts)]
                (own, expected), (with_drafts, text) = alone.seconds(prompt), drafting.seconds(prompt)
                if text != expected:
                    raise SystemExit(f"{name}: another answer to {prompt!r}")
                ratios.append(own / with_drafts)
            drafted, right = (drafting.metric(f"vllm:spec_decode_num_{kind}_tokens_total") for kind in ["draft", "accepted"])
            print(f"| `@{name}` | {most} | {right / max(drafted, 1):.0%} | {drafted / TOKENS / args.requests:.2f} | {statistics.median(ratios):.2f}x |", flush=True)
            drafting.stop()
            alone.stop()


main()
