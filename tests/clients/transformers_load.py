#!/usr/bin/env python3
"""Loads a checkpoint with Hugging Face transformers and prints its logits, so that ours can be compared with them.

usage: echo '[1, 2, 3]' | transformers_load.py DIR [--reference-logits FILE] [--tolerance X] [--trust-remote-code]

stdin  a JSON list of token ids
stdout {"architecture", "parameters", "shape": [T, vocab], "logits": [[…], …]}, f32 with eager attention
FILE   the logits to compare with: JSON (a list of T rows, or an object with `logits`) or .safetensors with `logits`. The result then has
       `max_difference` in place of `logits`, and the exit status is 1 when it exceeds the tolerance.
A checkpoint with weights that are missing, left over or of another shape is refused: transformers would fill the gaps with random numbers.
"""
import argparse
import json
import sys

import torch
from transformers import AutoModelForCausalLM, logging


def load(folder, trust_remote_code):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code, output_loading_info=True)
    wrong = {what: sorted(map(str, info[what])) for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(what)}
    if wrong:
        sys.exit(f"{folder} does not fit {type(model).__name__}: {json.dumps(wrong)}")
    return model.eval()


def reference(path):
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file
        return load_file(path)["logits"].float()
    with open(path) as f:
        value = json.load(f)
    return torch.tensor(value["logits"] if isinstance(value, dict) else value, dtype=torch.float32)


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("dir")
    args.add_argument("--reference-logits", metavar="FILE")
    args.add_argument("--tolerance", type=float, default=1e-3)
    args.add_argument("--trust-remote-code", action="store_true")
    args = args.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    ids = json.load(sys.stdin)
    model = load(args.dir, args.trust_remote_code)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    result = {"architecture": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters()), "shape": list(logits.shape)}
    status = 0
    if args.reference_logits:
        expected = reference(args.reference_logits)
        if expected.shape != logits.shape:
            sys.exit(f"{args.reference_logits} has shape {list(expected.shape)}, the model gives {list(logits.shape)}")
        difference = (logits - expected).abs().max().item()
        # "not <=" so that NaN counts as a difference
        result["max_difference"], status = difference, int(not difference <= args.tolerance)
    else:
        result["logits"] = logits.tolist()
    json.dump(result, sys.stdout)
    print()
    return status


if __name__ == "__main__":
    sys.exit(main())
