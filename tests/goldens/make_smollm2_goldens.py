#!/usr/bin/env python3
"""What Hugging Face transformers makes of two real models: SmolLM2-135M-Instruct and the bundled tiny one. Writes smollm2.json and tiny.json.

usage: make_smollm2_goldens.py MODEL_DIR GGUF [--out DIR]
  MODEL_DIR  SmolLM2 as a Hugging Face directory, bf16      GGUF  the same model's .gguf; its weights are read exactly, in f32

Greedy paths are the plain argmax with no early stop: an EOS stays in the path like any other token (`first_eos` says where). `min_gap` is the
smallest distance between the best and the second-best logit along a path: an implementation that is more precise than that must agree on every
token. Perplexity: tokens of the held-out text without special tokens, windows that don't overlap, the remainder dropped, mean negative
log-likelihood over all predicted tokens (window - 1 in each). Everything in f32.
"""
import argparse
import gzip
import json
import math
import pathlib
import platform

import tokenizers
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from make_gguf_goldens import hf_state_dict
from make_model_goldens import ROOT

TINY = ROOT / "models/tiny"
PROMPT = "Once upon a time"
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "You answer in one short sentence."}, {"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "user", "content": "My name is Ada."}, {"role": "assistant", "content": "Nice to meet you, Ada!"},
     {"role": "user", "content": "Write a two-line poem with my name in it."}],
]


def load(folder, state=None):
    if state is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation="eager")
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
        model.tie_weights()
    return model.eval()


@torch.no_grad()
def greedy(model, tokenizer, prompt, steps):
    path, gaps, cache, ids = [], [], None, torch.tensor([prompt])
    for _ in range(steps):
        out = model(ids, cache=cache, use_cache=True, logits_to_keep=1)
        best = out.logits[0, -1].topk(2)
        path.append(best.indices[0].item())
        gaps.append((best.values[0] - best.values[1]).item())
        cache, ids = out.cache, best.indices[None, :1]
    eos = tokenizer.eos_token_id
    return {"ids": path, "text": tokenizer.decode(path, skip_special_tokens=False), "first_eos": path.index(eos) if eos in path else None,
            "min_gap": round(min(gaps), 6), "min_gap_at": gaps.index(min(gaps))}


@torch.no_grad()
def perplexity(model, tokenizer, text, window):
    ids = tokenizer.encode(text, add_special_tokens=False)
    windows = torch.tensor(ids[:len(ids) // window * window]).view(-1, window)
    total = 0.0
    for w in windows.split(max(1, 2048 // window)):
        logp = model(w).logits[:, :-1].double().log_softmax(-1)
        total -= logp.gather(-1, w[:, 1:, None]).sum().item()
    nll = total / (windows.shape[0] * (window - 1))
    return {"characters": len(text), "tokens": len(ids), "window": window, "windows": windows.shape[0], "nll": round(nll, 8), "ppl": round(math.exp(nll), 8)}


def rendered(tokenizer):
    for chat in CHATS:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        yield {"messages": chat, "text": text, "prompt_ids": ids}


def smollm2(folder, gguf, held_out):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats, prompt = list(rendered(tokenizer)), tokenizer.encode(PROMPT, add_special_tokens=False)
    plain = {"prompt": PROMPT, "prompt_ids": prompt}
    result = {"chats": chats, "plain": plain, "perplexity": {}}
    for source, state in (("bf16", None), ("gguf", hf_state_dict(gguf))):
        model = load(folder, state)
        for chat in chats:
            chat[f"greedy_{source}"] = greedy(model, tokenizer, chat["prompt_ids"], 100)
        plain[f"greedy_{source}"] = greedy(model, tokenizer, prompt, 200)
        result["perplexity"][source] = perplexity(model, tokenizer, held_out[:40_000], 512)
    return result


def tiny(held_out):
    tokenizer, model = AutoTokenizer.from_pretrained(TINY), load(TINY)
    chats, prompt = list(rendered(tokenizer)), tokenizer.encode(PROMPT, add_special_tokens=False)
    for chat in chats:
        chat["greedy_bf16"] = greedy(model, tokenizer, chat["prompt_ids"], 100)
    return {"chats": chats, "plain": {"prompt": PROMPT, "prompt_ids": prompt, "greedy_bf16": greedy(model, tokenizer, prompt, 200)},
            "perplexity": {f"bf16_{w}": perplexity(model, tokenizer, held_out[:200_000], w) for w in (256, 1024)}}


def write(path, result):
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    path.write_text(json.dumps({"versions": versions, **result}, ensure_ascii=True) + "\n")
    print(path, json.dumps(result["perplexity"]))
    for entry in [*result["chats"], result["plain"]]:
        for key in (k for k in entry if k.startswith("greedy")):
            print(f"  {key}: min gap {entry[key]['min_gap']} at {entry[key]['min_gap_at']}, first EOS {entry[key]['first_eos']}: {entry[key]['text'][:90]!r}")


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("model_dir", type=pathlib.Path)
    args.add_argument("gguf", type=pathlib.Path)
    args.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    args.add_argument("--threads", type=int, default=1)
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    with gzip.open(TINY / "held-out.txt.gz", "rt", encoding="utf-8", newline="") as f:  # newline="": as the bytes are
        held_out = f.read(200_000)
    write(args.out / "tiny.json", tiny(held_out))
    write(args.out / "smollm2.json", smollm2(args.model_dir, args.gguf, held_out))
