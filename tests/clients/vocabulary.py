#!/usr/bin/env python3
"""What `evop vocab` writes, in Hugging Face transformers: the corpus has the parent's tokens, and the model its logits and its greedy text.

usage: vocabulary.py EVOP CORPUS PARENT [PARENT ...]     needs: torch, transformers, tokenizers

CORPUS  plain text, gzipped or not
PARENT  a Hugging Face directory or a .gguf file
Prints a line a check; the exit status is 1 if one failed.
"""
import gzip
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

UNSEEN = "日本語 привет 🙂👍🏽 Zyxwvutsrq @#€"
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Hello"}]
failures = 0


def check(what, holds, seen=""):
    global failures
    failures += not holds
    print(f"{'ok' if holds else 'FAILED'}  {what}{': ' if seen else ''}{seen}")


def check_tokenizer(name, old, new, corpus):
    def same(text):
        before, after = (t(text)["input_ids"] for t in (old, new))
        return len(before), old.convert_ids_to_tokens(before) == new.convert_ids_to_tokens(after), old.decode(before) == new.decode(after)

    count, tokens, text = same(corpus)
    check(f"{name}: the corpus has the same tokens and text", tokens and text, f"{count} tokens, {len(old)} -> {len(new)} in the vocabulary")
    text = lambda t: t.decode(t(UNSEEN, add_special_tokens=False)["input_ids"])
    check(f"{name}: text that the corpus doesn't have comes back", text(old) == text(new), repr(text(new)))
    if old.chat_template:
        _, tokens, text = same(old.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True))
        check(f"{name}: a conversation has the same tokens", tokens and text)
    special = lambda t: [t.bos_token, t.eos_token, t.pad_token, t.all_special_tokens]
    check(f"{name}: special tokens", special(old) == special(new) and new.convert_tokens_to_ids(new.all_special_tokens) == new.all_special_ids)


@torch.no_grad()
def check_model(name, parent, out, old, new, prompts):
    models = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32, output_loading_info=True) for d in (parent, out)]
    wrong = {what: found for what, found in models[1][1].items() if found}
    check(f"{name}: weights are complete", not wrong, str(wrong or ""))
    (dense, _), (cut, _) = models
    check(f"{name}: a row a token", cut.get_input_embeddings().weight.shape[0] == cut.get_output_embeddings().weight.shape[0] == cut.config.vocab_size == len(new))
    kept = torch.tensor(old.convert_tokens_to_ids(new.convert_ids_to_tokens(range(len(new)))))
    encoded = lambda prompt: [torch.tensor([t(prompt)["input_ids"]]) for t in (old, new)]
    ids = encoded(prompts[0])
    difference = (dense(ids[0]).logits[..., kept] - cut(ids[1]).logits).abs().max().item()
    check(f"{name}: logits of the kept tokens", difference < 1e-4, f"largest difference {difference:.1e}")
    for prompt in prompts:
        generated = [m.generate(i, max_new_tokens=20, do_sample=False)[0, i.shape[1]:] for m, i in zip((dense, cut), encoded(prompt))]
        texts = [t.decode(g) for t, g in zip((old, new), generated)]
        if set(generated[0].tolist()) <= set(kept.tolist()):
            return check(f"{name}: greedy text", texts[0] == texts[1], repr(texts[1]))
        print(f"--  {name}: the parent's greedy text has tokens that are gone: {texts[0]!r}, now {texts[1]!r}")


def prompts(text):
    """Beginnings of long lines: a word that is cut may have other tokens than the corpus."""
    return [line[:200].rsplit(" ", 1)[0] for line in sorted(text.split("\n")[:100], key=len)[:-6:-1]]


def main():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    evop, corpus, parents = sys.argv[1], pathlib.Path(sys.argv[2]), [pathlib.Path(p) for p in sys.argv[3:]]
    text = (gzip.open if corpus.suffix == ".gz" else open)(corpus, "rt", encoding="utf-8", newline="").read()
    for parent in parents:
        name = parent.parent.name if parent.suffix == ".gguf" else parent.resolve().name
        with tempfile.TemporaryDirectory() as work:
            out, directory = pathlib.Path(work, "out"), parent
            if parent.suffix == ".gguf":
                directory = pathlib.Path(work, "parent")
                subprocess.run([evop, "export", parent, "--format", "hf", "--out", directory], check=True, stdout=subprocess.DEVNULL)
            result = subprocess.run([evop, "vocab", "--model", parent, "--corpus", corpus, "--out", out, "--json"], check=True, stdout=subprocess.PIPE)
            report = json.loads(result.stdout)["vocabulary"]
            check(f"{name}: parameters", report["parameters"][0] > report["parameters"][1], f"{report['parameters'][0]} -> {report['parameters'][1]}")
            old, new = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(out)
            check_tokenizer(name, old, new, text)
            check_model(name, directory, out, old, new, prompts(text))
    print(f"{failures} failed" if failures else "all passed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
