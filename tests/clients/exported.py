#!/usr/bin/env python3
"""What `evop export` writes, read by others: Hugging Face transformers, the `gguf` package, and the rules of vLLM and llama.cpp's converter.

usage: exported.py EVOP [PARENT_DIR ...]     needs: torch, transformers, tokenizers, gguf (tests/goldens/requirements.txt)

For every parent (a Hugging Face directory, and small random ones of all four families, made here), patterns of whole layers, one width, dropped
sub-blocks, widths and key/value groups are exported.
  hf            transformers gives the logits of the parent itself with what was pruned set to zero
  nemotron-nas  the same, and every tensor has the shape that vLLM (and llama.cpp's converter, unless a note says otherwise) expects
  gguf          keys and shapes are those that llama.cpp's loader asks for, the numbers the parent's
Prints a line a check; the exit status is 1 if one failed.
"""
import itertools
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, logging

import hf_heterogeneous as common
import nemotron_nas_readers as readers
from hf_heterogeneous import check, head_sizes, load, make_parents, parent_with_zeros

RANDOM = torch.Generator().manual_seed(7)


def patterns(config):
    """Name -> {layer: what hf_heterogeneous calls a pattern}"""
    ffn, groups, depth = config["intermediate_size"], config.get("num_key_value_heads") or config["num_attention_heads"], config["num_hidden_layers"]
    both = ["attention", "mlp"]
    width = ffn // 2
    result = {
        "layers": {1: {"skip": both}, 4: {"skip": both}},
        "one width": {l: {"ffn": width} for l in range(depth)} | {2: {"skip": both}},
        "drops": {1: {"skip": ["mlp"]}, 2: {"skip": ["attention"]}, 3: {"skip": both}},
        "drops and widths": {0: {"ffn": width, "skip": ["attention"]}, 1: {"skip": ["mlp"]}, 2: {"ffn": ffn // 4}, 3: {"skip": both}, 5: {"skip": ["attention"]}},
        "widths": {1: {"ffn": width}, 2: {"skip": ["attention"], "ffn": width}, 4: {"skip": both}},
    }
    if groups > 1:
        result["one width, fewer groups"] = {l: {"ffn": width, "groups": 1} for l in range(depth)}
        result["widths and groups"] = {0: {"groups": 1}, 1: {"skip": ["attention"], "ffn": width}, 3: {"groups": 1, "ffn": ffn // 4}, 4: {"skip": both}}
    if groups > 3:
        # three query heads don't divide the hidden size
        result["an odd number of heads"] = {l: {"groups": 3} for l in range(depth)}
    return result


def genes(config, pattern):
    """The same as evop's pattern.json."""
    groups = config.get("num_key_value_heads") or config["num_attention_heads"]
    result = []
    for layer in range(config["num_hidden_layers"]):
        kept = pattern.get(layer, {})
        skip = kept.get("skip", [])
        result.append({
            "kv_groups": 0 if "attention" in skip else kept.get("groups", groups), "ffn": 0 if "mlp" in skip else kept.get("ffn", config["intermediate_size"]),
        })
    return result


def export(evop, parent, pattern, out_format, out, *options):
    """evop's own JSON, or the text of its refusal."""
    file = out.with_suffix(".json")
    file.write_text(json.dumps(pattern))
    command = [evop, "export", str(parent), "--pattern", str(file), "--format", out_format, "--out", str(out), "--json", *options]
    run = subprocess.run(command, capture_output=True, text=True)
    return json.loads(run.stdout) if run.returncode == 0 else run.stderr


def shapes_in(folder):
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}


@torch.no_grad()
def check_logits(name, folder, expected, dense):
    config = json.loads((folder / "config.json").read_text())
    ids = torch.randint(0, config["vocab_size"], (2, 40), generator=RANDOM)
    model, reference = load(folder, trust_remote_code="auto_map" in config), expected(ids).logits
    difference, largest = (reference - model(ids).logits).abs().max().item(), reference.abs().max().item()
    assert (reference - dense(ids).logits).abs().max().item() > 1e-2 * largest, "the pattern changes nothing"
    prompt = ids[:1, :9]
    greedy = [m.generate(prompt, do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=0, attention_mask=torch.ones_like(prompt)).tolist() for m in (expected, model)]
    check(f"{name}: transformers' logits and greedy tokens ({type(model).__name__})", difference < 1e-4 * largest and greedy[0] == greedy[1], f"difference {difference:.1e}")


def check_nemotron_nas(name, folder, written):
    found = shapes_in(folder)
    notes = " ".join(written["notes"])
    for tool, noted, read in (
        ("vLLM", "vLLM: layer" in notes, lambda: readers.vllm(AutoConfig.from_pretrained(folder, trust_remote_code=True))),
        ("llama.cpp's converter", "llama.cpp's converter can't read it" in notes, lambda: readers.llama_cpp(json.loads((folder / "config.json").read_text()))),
    ):
        try:
            wrong = {n: (found.get(n), shape) for n, shape in read().items() if found.get(n) != shape} or {n: s for n, s in found.items() if n not in read()}
            reason = f"{len(wrong)} tensors differ: {next(iter(wrong.items()))}" if wrong else None
        except ValueError as error:
            reason = str(error)
        check(f"{name}: {tool} reads it, or a note says that it doesn't", (reason is not None) == noted, reason or "reads it")


def check_gguf(name, file, parent, pattern, written):
    """src/llama-model.cpp, src/models/deci.cpp and llama.cpp: what they ask of keys and tensors; and that the numbers are the parent's."""
    reader = GGUFReader(file)
    value = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.ggml.")}
    arch, depth = value["general.architecture"], 0
    depth = value[f"{arch}.block_count"]
    per_layer = lambda key: (v if isinstance(v := value[f"{arch}.{key}"], list) else [v] * depth)
    heads, kv_heads, ffn = (per_layer(k) for k in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"))
    hidden, d = value[f"{arch}.embedding_length"], value[f"{arch}.attention.key_length"]
    tensors = {t.name: t for t in reader.tensors}
    shape = lambda n: [int(s) for s in reversed(tensors[n].shape)] if n in tensors else None
    expected = {"token_embd.weight": [value[f"{arch}.vocab_size"], hidden], "output_norm.weight": [hidden]}
    for i in range(depth):
        rows = {"attn_norm": [hidden], "attn_q": [heads[i] * d, hidden], "attn_k": [kv_heads[i] * d, hidden], "attn_v": [kv_heads[i] * d, hidden], "attn_output": [hidden, heads[i] * d]}
        expected |= {f"blk.{i}.{n}.weight": s for n, s in rows.items() if heads[i]}
        rows = {"ffn_norm": [hidden], "ffn_gate": [ffn[i], hidden], "ffn_up": [ffn[i], hidden], "ffn_down": [hidden, ffn[i]]}
        expected |= {f"blk.{i}.{n}.weight": s for n, s in rows.items() if ffn[i]}
    wrong = {n: (shape(n), s) for n, s in expected.items() if shape(n) != s}
    rules = {
        "the first layer has heads": heads[0] > 0, "every layer with heads has an MLP": all(ffn), "key/value heads divide heads": all(not h or h % k == 0 for h, k in zip(heads, kv_heads)),
        "equal layers aren't deci": (arch == "deci") == isinstance(value[f"{arch}.attention.head_count"], list),
        "rope": value[f"{arch}.rope.dimension_count"] == d, "a token a row": len(reader.fields["tokenizer.ggml.tokens"].data) == expected["token_embd.weight"][0],
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    check(f"{name}: {arch} keys and shapes", not wrong and not broken, f"{broken} {dict(list(wrong.items())[:2])}" if wrong or broken else "")

    config = json.loads((parent / "config.json").read_text())
    group_size, head_dim = head_sizes(config)
    kept = [i for i, g in enumerate(pattern) if g["kv_groups"] or g["ffn"]]
    numbers = lambda n: dequantize(tensors[n].data, tensors[n].tensor_type).reshape(shape(n))
    worst = 0.0
    with safe_open(parent / "model.safetensors", "pt") as file:
        for new, old in enumerate(kept):
            gene, weight = pattern[old], lambda part: file.get_tensor(f"model.layers.{old}.{part}.weight").float().numpy()
            pairs = []
            if gene["kv_groups"]:
                q, k = weight("self_attn.q_proj")[: gene["kv_groups"] * group_size * head_dim], weight("self_attn.k_proj")[: gene["kv_groups"] * head_dim]
                if arch in ("llama", "deci"):
                    q, k = (w.reshape(-1, 2, head_dim // 2, hidden).swapaxes(1, 2).reshape(w.shape) for w in (q, k))
                pairs += [("attn_q", q), ("attn_k", k), ("attn_output", weight("self_attn.o_proj")[:, : len(q)])]
            if gene["ffn"]:
                pairs += [("ffn_down", weight("mlp.down_proj")[:, : gene["ffn"]])]
            else:
                worst = max(worst, *(abs(numbers(f"blk.{new}.{n}.weight")).max() for n in ("ffn_gate", "ffn_up", "ffn_down")))
            worst = max([worst, *(np.abs(numbers(f"blk.{new}.{n}.weight") - w).max() for n, w in pairs)])
    check(f"{name}: the parent's numbers in llama.cpp's order, zeros in what llama.cpp insists on", worst == 0.0, f"largest difference {worst}")


def check_parent(evop, name, parent, work):
    config, dense = json.loads((parent / "config.json").read_text()), load(parent)
    for number, (what, pattern) in enumerate(patterns(config).items()):
        label, at = f"{name}, {what}", work / f"{name}-{number}"
        kept, expected = genes(config, pattern), parent_with_zeros(parent, pattern)
        out = at.with_name(at.name + "-hf")
        export(evop, parent, kept, "hf", out)
        check_logits(f"{label}, hf", out, expected, dense)
        out = at.with_name(at.name + "-nas")
        written = export(evop, parent, kept, "nemotron-nas", out)
        if isinstance(written, str):
            reasons = {"qwen3": "normalises queries", "widths and groups": "same number of query heads"}
            check(f"{label}, nemotron-nas: refused", any(key in label and reason in written for key, reason in reasons.items()), written.strip())
        else:
            check_nemotron_nas(f"{label}, nemotron-nas", out, written)
            if not windowed(config):
                check_logits(f"{label}, nemotron-nas", out, expected, dense)
        out = at.with_suffix(".gguf")
        written = export(evop, parent, kept, "gguf", out)
        if isinstance(written, str):
            check(f"{label}, gguf: refused", "qwen3" in label and "Qwen3" in written, written.strip())
        else:
            check_gguf(f"{label}, gguf", out, parent, kept, written)


@torch.no_grad()
def check_biases(evop, name, parent, work):
    """Biases that the family has not, as a repair of pruned layers adds them."""
    folder, out = work / f"{name}-biased", work / f"{name}-biased-hf"
    shutil.copytree(parent, folder)
    weights, expected = load_file(folder / "model.safetensors"), load(parent)
    for layer, part in itertools.product((1, 3), ("self_attn.o_proj", "mlp.down_proj")):
        module = expected.model.layers[layer].get_submodule(part)
        module.bias = torch.nn.Parameter(torch.randn(module.out_features, generator=RANDOM))
        weights[f"model.layers.{layer}.{part}.bias"] = module.bias.data
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    written = export(evop, folder, genes(config, {}), "hf", out)
    check_logits(f"{name}, with biases on o_proj and down_proj, hf", out, expected, load(parent))
    check(f"{name}, with biases, hf: a note says why it isn't plain", "has a bias" in " ".join(written["notes"]) or config["model_type"] == "llama")


def windowed(config):
    """Whether 40 tokens see more of each other in a format without windows."""
    return config["model_type"] == "mistral" and (config.get("sliding_window") or 4096) < 40 or config.get("use_sliding_window")


def give_tokenizer(folder):
    """Bytes as tokens, cut into words as GPT-2 does."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def main():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    evop, given = sys.argv[1], [(p.resolve().name, p) for p in map(pathlib.Path, sys.argv[2:])]
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        for name, parent in [*given, *make_parents(work)]:
            if not (parent / "tokenizer.json").exists():
                give_tokenizer(parent)
            check_parent(evop, name, parent, work)
            if name in ("llama", "mistral", "qwen2", "qwen3"):
                check_biases(evop, name, parent, work)
    print(f"{common.failures} failed" if common.failures else "all passed")
    return int(common.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
