#!/usr/bin/env python3
"""Makes models/tiny/continuations.jsonl.gz, the multiple-choice set `books`, from the bundled held-out books. Standard library only.

usage: make_continuations.py [--out FILE]

An item is a few sentences of a book, broken off within a sentence (`query`), and four ways to go on (`choices`): the six words that follow in the
book (`gold` says which of the four) and three runs of six words that follow a break elsewhere in the same book, as long as the true one to within
two characters. No model has a say in what is taken. Each paragraph gives at most one item; the order of the choices is drawn.
"""
import argparse
import collections
import gzip
import json
import pathlib
import random
import re

MODEL = pathlib.Path(__file__).resolve().parents[2] / "models/tiny"
SEED = 31
ITEMS_OF_A_BOOK = 80
WORDS = 6
CONTEXT_CHARACTERS = range(200, 451)
LENGTH_TOLERANCE = 2
SENTENCE = re.compile(r"""\S.*?[.!?]["'”’)\]_]*(?=\s+["'“‘(\[_]*[A-Z]|$)""")

Break = collections.namedtuple("Break", "query continuation")


def paragraphs(book):
    """Paragraphs of prose, white space collapsed: no headings, lists, tables or lines set off in italics."""
    for paragraph in re.split(r"\n\s*\n", book):
        paragraph = " ".join(paragraph.split())
        if paragraph and paragraph[0] not in "#-*|>!_":
            yield paragraph


def breaks(paragraph, rng):
    """One place within each sentence but the first, three words in or later, with enough text before it and six words after it."""
    sentences = SENTENCE.findall(paragraph)
    if " ".join(sentences) != paragraph:
        return
    for number, sentence in enumerate(sentences[1:], 1):
        words = sentence.split(" ")
        if len(words) < WORDS + 3:
            continue
        first = number - 1
        while first > 0 and len(" ".join(sentences[first:number])) < CONTEXT_CHARACTERS.start:
            first -= 1
        cut = rng.randint(3, len(words) - WORDS)
        query = " ".join(sentences[first:number] + words[:cut])
        if len(query) in CONTEXT_CHARACTERS:
            yield Break(query, " " + " ".join(words[cut:cut + WORDS]))


def items(book, rng):
    candidates = [rng.choice(found) for p in paragraphs(book) if (found := list(breaks(p, rng)))]
    rng.shuffle(candidates)
    made = []
    for true in candidates:
        alike = [b.continuation for b in candidates
                 if b.continuation != true.continuation and abs(len(b.continuation) - len(true.continuation)) <= LENGTH_TOLERANCE]
        if len(set(alike)) < 3:
            continue
        choices = rng.sample(sorted(set(alike)), 3)
        gold = rng.randrange(4)
        choices.insert(gold, true.continuation)
        made.append({"query": true.query, "choices": choices, "gold": gold})
        if len(made) == ITEMS_OF_A_BOOK:
            return made
    raise SystemExit(f"only {len(made)} items of {ITEMS_OF_A_BOOK} in a book")


def main(out):
    with gzip.open(MODEL / "held-out.txt.gz", "rt", encoding="utf-8") as f:
        books = [book for book in re.split(r"(?m)^(?=# Title: )", f.read()) if book.strip()]
    rng = random.Random(SEED)
    made = [item for book in books for item in items(book, rng)]
    rng.shuffle(made)  # so that the first N are of all books
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in made]
    out.write_bytes(gzip.compress("".join(lines).encode(), 9, mtime=0))
    print(f"{out}: {len(lines)} items from {len(books)} books, {out.stat().st_size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=MODEL / "continuations.jsonl.gz")
    main(parser.parse_args().out)
