#!/usr/bin/env python3
"""What forms of a model cost beside the model alone, and how fast requests for several of them are in one batch.

usage: compare-forms.py EVOP NAME=pattern.json ... --prompts FILE [--model MODEL] [--rounds 5] [-- options of evop serve]

FILE has a prompt a line. Prints resident memory with the forms and without after twelve requests, medians of --rounds starts in turns; and how long requests for the model and
each of its forms take at once, against those for one of them after the other, one and four of each, medians of --rounds.
"""
import argparse
import statistics
import time

from served import Server

TOKENS = 96


def seconds(server, requests):
    started = time.monotonic()
    server.answers(requests, TOKENS, len(requests))
    return time.monotonic() - started


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
                server.answer(numbered(i), TOKENS, names[i % len(names)])
            resident[which].append(server.resident())
            server.stop()
    print("| | |\n| --- | --- |")
    for which, megabytes in resident.items():
        print(f"| resident memory {which} | {statistics.median(megabytes):.1f} MB ({min(megabytes):.1f} to {max(megabytes):.1f}) |", flush=True)
    server = Server(args.evop, [*options, *patterns])
    models = [server.model, *(f"{server.model}@{form.split('=', 1)[0]}" for form in args.forms)]
    seconds(server, [(prompt(), model) for model in models])
    for count in [1, 4]:
        together, apart = [], []
        for _ in range(args.rounds):
            together.append(seconds(server, [(prompt(), model) for model in models for _ in range(count)]))
            apart.append(sum(seconds(server, [(prompt(), model) for _ in range(count)]) for model in models))
        a, b = statistics.median(together), statistics.median(apart)
        print(f"| {count} for each of {len(models)} at once, against one form after the other | {b / a:.2f}x as fast ({a:.2f} s, {b:.2f} s) |", flush=True)
    server.stop()


main()
