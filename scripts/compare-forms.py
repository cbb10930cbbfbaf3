#!/usr/bin/env python3
"""What forms of a model cost beside the model alone, and how fast requests for several of them are in one batch.

usage: compare-forms.py EVOP NAME=pattern.json ... --prompts FILE [--model MODEL] [--rounds 5] [-- options of evop serve]

FILE has a prompt a line. Prints resident memory with the forms and without after twelve requests, medians of --rounds starts in turns; and how long requests for the model and
each of its forms take at once, against those for one of them after the other, one and four of each, medians of --rounds.
"""
import argparse
import concurrent.futures
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
        while not self.ready():
            time.sleep(0.1)
        self.model = json.load(urllib.request.urlopen(self.url + "/v1/models"))["data"][0]["id"]

    def ready(self):
        try:
            return urllib.request.urlopen(self.url + "/ready").status == 200
        except OSError:
            return False

    def ask(self, model, prompt):
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
        urllib.request.urlopen(request).read()

    def seconds(self, requests):
        started = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
            list(pool.map(lambda request: self.ask(*request), requests))
        return time.monotonic() - started

    def resident(self):
        """MB."""
        status = open(f"/proc/{self.process.pid}/status", encoding="utf-8").read()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6

    def stop(self):
        self.process.terminate()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evop")
    parser.add_argument("forms", nargs="+", metavar="NAME=pattern.json")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=5)
    args, serve = parser.parse_known_args()
    options = [o for o in serve if o != "--"] + (["--model", args.model] if args.model else [])
    patterns = [option for form in args.forms for option in ("--pattern", form)]
    prompts = [line.strip() for line in open(args.prompts, encoding="utf-8") if line.strip()]
    numbered = lambda i: f"{i}. {prompts[i % len(prompts)]}"  # (no two begin alike: nothing is found in the cache)
    asked = iter(range(1 << 30))
    prompt = lambda: numbered(next(asked))
    resident = {"with the forms": [], "without": []}
    for _ in range(args.rounds):
        for which, more in [("with the forms", patterns), ("without", [])]:
            server = Server(args.evop, [*options, *more])
            names = [server.model] + ([f"{server.model}@{form.split('=', 1)[0]}" for form in args.forms] if more else [])
            for i in range(12):
                server.ask(names[i % len(names)], numbered(i))
            resident[which].append(server.resident())
            server.stop()
    print("| | |\n| --- | --- |")
    for which, megabytes in resident.items():
        print(f"| resident memory {which} | {statistics.median(megabytes):.1f} MB ({min(megabytes):.1f} to {max(megabytes):.1f}) |", flush=True)
    server = Server(args.evop, [*options, *patterns])
    models = [server.model, *(f"{server.model}@{form.split('=', 1)[0]}" for form in args.forms)]
    server.seconds([(model, prompt()) for model in models])
    for count in [1, 4]:
        together, apart = [], []
        for _ in range(args.rounds):
            together.append(server.seconds([(model, prompt()) for model in models for _ in range(count)]))
            apart.append(sum(server.seconds([(model, prompt()) for _ in range(count)]) for model in models))
        a, b = statistics.median(together), statistics.median(apart)
        print(f"| {count} for each of {len(models)} at once, against one form after the other | {b / a:.2f}x as fast ({a:.2f} s, {b:.2f} s) |", flush=True)
    server.stop()


main()
