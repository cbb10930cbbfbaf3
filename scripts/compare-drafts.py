#!/usr/bin/env python3
"""What a form's guesses are worth, and how fast one request at a time is with them, beside the same model without.

usage: compare-drafts.py EVOP NAME=pattern.json ... --prompts FILE [--model MODEL] [--most 1,4] [--requests 9] [--long 16] [-- options of evop serve]

Every form is tried with each limit of --most tokens before a check. FILE has a prompt a line.

First with --speculate-always, which guesses whatever it costs: --long greedy answers of 640 tokens, four at a time, which must equal those without drafts; that says how often
guesses are right. Then as it is meant to be used: greedy requests of 96 tokens with and without in turns, the median speed-up and the tokens drafted for each answered one.
"""
import argparse
import statistics

from served import Server

SHORT, LONG = 96, 640


def guesses(server):
    """Drafted, and right."""
    return [int(server.metric(f"vllm:spec_decode_num_{kind}_tokens_total")) for kind in ["draft", "accepted"]]


def same(name, found, expected):
    if found != expected:
        raise SystemExit(f"{name}: another answer than without drafts")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evop")
    parser.add_argument("forms", nargs="+", metavar="NAME=pattern.json")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--model")
    parser.add_argument("--most", default="1,4")
    parser.add_argument("--requests", type=int, default=9)
    parser.add_argument("--long", type=int, default=16)
    args, serve = parser.parse_known_args()
    options = [o for o in serve if o != "--"] + (["--model", args.model] if args.model else [])
    prompts = [line.strip() for line in open(args.prompts, encoding="utf-8") if line.strip()]
    some = lambda count: [prompts[i % len(prompts)] for i in range(count)]
    long = [(prompt, None) for prompt in some(args.long)]
    compared = 0
    print("| drafts by | at most | right, of so many drafted | drafted for a token, where it may choose | speed-up |\n| --- | --- | --- | --- | --- |")
    for form in args.forms:
        name = form.split("=", 1)[0]
        # with the form too: it says in which order the weights are loaded, which rounds sums otherwise
        alone = [*options, "--pattern", form]
        plain = Server(args.evop, alone)
        expected = plain.answers(long, LONG, 4)
        plain.stop()
        for most in args.most.split(","):
            drafts = [*alone, "--speculate", name, "--speculate-tokens", most]
            always = Server(args.evop, [*drafts, "--speculate-always"])
            same(name, always.answers(long, LONG, 4), expected)
            compared += sum(map(len, expected))
            drafted, right = guesses(always)
            always.stop()
            # anew each time: a process that has been there for longer lies in larger pages, and is faster by up to a tenth
            plain, drafting, ratios = Server(args.evop, alone), Server(args.evop, drafts), []
            for prompt in some(args.requests):
                (own, own_time), (other, other_time) = plain.answer(prompt, SHORT), drafting.answer(prompt, SHORT)
                same(name, other, own)
                ratios.append(own_time / other_time)
            chosen = guesses(drafting)[0] / SHORT / args.requests
            plain.stop()
            drafting.stop()
            print(f"| `@{name}` | {most} | {right / max(drafted, 1):.0%} of {drafted:,} | {chosen:.2f} | {statistics.median(ratios):.2f}x |", flush=True)
    print(f"\n{compared:,} greedy tokens with drafts equal those without")


main()
