#!/usr/bin/env python3
"""Checks crates/pruning/src/checkpoint/modeling_evop.py, the code by which Hugging Face transformers runs a checkpoint whose layers differ.

usage: hf_heterogeneous.py [PARENT_DIR ...]

For every parent (a directory with config.json and model.safetensors, and small random ones of all four families, made here) a few checkpoints are
written by hand: sub-blocks dropped, MLPs narrowed, key/value groups removed. Each must
  be refused by AutoModelForCausalLM without trust_remote_code;
  load with it, no weight missing or left over, and give the logits of the parent itself, run by stock code with what was pruned set to zero;
  generate the same tokens with a growing cache, a static cache and none, and in a padded batch as alone;
  survive save_pretrained.
Prints a line a check; the exit status is 1 if one failed.
"""
import contextlib
import io
import json
import pathlib
import shutil
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, logging

MODELING = pathlib.Path(__file__).resolve().parents[2] / "crates/pruning/src/checkpoint/modeling_evop.py"
STOCK = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PARTS = {"attention": ("self_attn.", "input_layernorm."), "mlp": ("mlp.", "post_attention_layernorm.")}
failures = 0


def check(what, passed, detail=""):
    global failures
    failures += not passed
    print(f"{'ok' if passed else 'not ok'} - {what}{': ' if detail else ''}{detail}", flush=True)


# ---- what is pruned ----------------------------------------------------------------------------------------------------

def patterns(config):
    """Name -> {layer: {"skip": [...], "ffn": channels, "groups": key/value heads}}; layer 0 without attention is the hard case for a cache."""
    ffn = config["intermediate_size"]
    drops = {0: {"skip": ["attention"]}, 1: {"skip": ["mlp"]}, 3: {"skip": ["attention", "mlp"]}, 4: {"skip": ["mlp"]}}
    widths = {l: dict(p) for l, p in drops.items()}
    widths[0]["ffn"], widths[2] = ffn // 2, {"ffn": ffn // 4}
    result = {"drops": drops, "drops and widths": widths}
    if (config.get("num_key_value_heads") or config["num_attention_heads"]) > 1:
        result["drops, widths and groups"] = widths | {1: {"skip": ["mlp"], "groups": 1}, 5: {"groups": 1}}
    return result


def head_sizes(config):
    """(query heads of a group, width of a head)"""
    heads = config["num_attention_heads"]
    return heads // (config.get("num_key_value_heads") or heads), config.get("head_dim") or config["hidden_size"] // heads


def write_pruned(parent, pattern, out):
    """The checkpoint as EvoP would write it."""
    config = json.loads((parent / "config.json").read_text())
    weights = load_file(parent / "model.safetensors")
    group_size, head_dim = head_sizes(config)
    overrides = {}
    for layer, kept in pattern.items():
        prefix, own = f"model.layers.{layer}.", {}

        def cut(name, dim, size):
            for kind in ("weight", "bias"):
                key = f"{prefix}{name}.{kind}"
                if key in weights and not (kind == "bias" and dim == 1):
                    weights[key] = weights[key].narrow(dim, 0, size).contiguous()

        if "ffn" in kept:
            own["intermediate_size"] = kept["ffn"]
            for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                cut(f"mlp.{name}", dim, kept["ffn"])
        if "groups" in kept:
            own["num_key_value_heads"] = kept["groups"]
            for name, dim, heads in (("q_proj", 0, group_size), ("k_proj", 0, 1), ("v_proj", 0, 1), ("o_proj", 1, group_size)):
                cut(f"self_attn.{name}", dim, kept["groups"] * heads * head_dim)
        if "skip" in kept:
            own["skip"] = kept["skip"]
            gone = tuple(prefix + part for sub_block in kept["skip"] for part in PARTS[sub_block])
            weights = {name: w for name, w in weights.items() if not name.startswith(gone)}
        overrides[str(layer).zfill(len(str(config["num_hidden_layers"] - 1)))] = own
    family = config["model_type"]
    name = f"Evop{STOCK[family]}"
    config |= {
        "model_type": f"evop_{family}",
        "architectures": [name],
        "auto_map": {"AutoConfig": f"modeling_evop.{name.replace('ForCausalLM', 'Config')}", "AutoModelForCausalLM": f"modeling_evop.{name}"},
        "per_layer_config": overrides,
        "allow_global_per_layer_attribute_access": True,
        "evop_group_size": group_size,
    }
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    shutil.copy(MODELING, out)


@torch.no_grad()
def parent_with_zeros(parent, pattern):
    """Stock code and whole weights: what was pruned adds nothing because its output columns are zero."""
    model = load(parent)
    group_size, head_dim = head_sizes(json.loads((parent / "config.json").read_text()))
    for layer, kept in pattern.items():
        block = model.model.layers[layer]
        if "ffn" in kept:
            block.mlp.down_proj.weight[:, kept["ffn"]:] = 0
        if "groups" in kept:
            block.self_attn.o_proj.weight[:, kept["groups"] * group_size * head_dim:] = 0
        for name in kept.get("skip", []):
            for parameter in (block.self_attn.o_proj if name == "attention" else block.mlp.down_proj).parameters():
                parameter.zero_()
    return model


# ---- loading and running -----------------------------------------------------------------------------------------------

def load(folder, trust_remote_code=None):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code, output_loading_info=True)
    wrong = {what: sorted(map(str, info[what])) for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(what)}
    if wrong:
        raise ValueError(f"{folder} does not fit {type(model).__name__}: {wrong}")
    return model.eval()


def refused(folder, trust_remote_code):
    """None, or what happened instead."""
    # undecided, transformers asks on the terminal
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return f"loaded as {type(load(folder, trust_remote_code)).__name__}"
    except ValueError as error:
        return None if "custom code" in str(error) else f"refused for another reason: {error}"
    finally:
        sys.stdin = stdin


def generate(model, ids, steps=24, **options):
    pad = {} if "attention_mask" in options else {"attention_mask": torch.ones_like(ids)}
    out = model.generate(ids, do_sample=False, min_new_tokens=steps, max_new_tokens=steps, pad_token_id=0, **pad, **options)
    return out[:, ids.shape[1]:].tolist()


@torch.no_grad()
def stepwise(model, ids, chunks):
    """Logits of the whole text, computed in chunks over one cache."""
    cache, logits, start = None, [], 0
    for size in chunks:
        out = model(ids[:, start:start + size], cache=cache, use_cache=True)
        cache, start = out.cache, start + size
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


@torch.no_grad()
def check_one(name, parent, pattern, folder):
    write_pruned(parent, pattern, folder)
    for answer in (None, False):
        reason = refused(folder, answer)
        check(f"{name}: refused with trust_remote_code={answer}", reason is None, reason or "")
    model, expected = load(folder, trust_remote_code=True), parent_with_zeros(parent, pattern)
    ids = torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(7))
    reference, ours = expected(ids).logits, model(ids).logits
    difference, tolerance = (reference - ours).abs().max().item(), 1e-4 * reference.abs().max().item()
    pruning = (reference - load(parent)(ids).logits).abs().max().item()
    check(f"{name}: logits of the parent with zeros", difference < tolerance and pruning > 0.1, f"difference {difference:.1e}, to the whole parent {pruning:.1f}")

    chunks = (17, 1, 9, 1, 12)
    logits, cache = stepwise(model, ids, chunks)
    difference = (stepwise(expected, ids, chunks)[0] - logits).abs().max().item()
    check(f"{name}: the same through a cache, in chunks", difference < tolerance and cache.get_seq_length() == 40, f"difference {difference:.1e}")

    prompt = ids[:1, :13]
    tokens = generate(expected, prompt)
    for label, options in (("a growing cache", {}), ("no cache", {"use_cache": False}), ("a static cache", {"cache_implementation": "static"})):
        check(f"{name}: generate() with {label} as the parent with zeros", generate(model, prompt, **options) == tokens)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt[:, :8]], 1)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, :5] = 0
    batch = generate(model, torch.cat([prompt, padded]), attention_mask=mask)
    check(f"{name}: generate() in a padded batch as alone", batch == tokens + generate(model, prompt[:, :8]))

    hidden = model(ids, output_hidden_states=True).hidden_states
    check(f"{name}: a hidden state a layer", len(hidden) == model.config.num_hidden_layers + 1)
    again = folder.with_name(folder.name + "-saved")
    model.save_pretrained(again)
    check(f"{name}: save_pretrained and back", torch.equal(load(again, trust_remote_code=True)(ids).logits, ours))


# ---- parents -----------------------------------------------------------------------------------------------------------

def make_parents(folder):
    """Small random models; windows short enough to matter at 40 tokens."""
    common = dict(vocab_size=300, hidden_size=64, intermediate_size=512, num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=2,
                  max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    mixed = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    windows = dict(use_sliding_window=True, sliding_window=12, max_window_layers=0)
    cases = {
        "llama": {}, "llama-heads": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}, "mistral": {"sliding_window": 12}, "mistral-full": {"sliding_window": None},
        "qwen2": {}, "qwen2-mixed": windows | {"layer_types": mixed},
        # no attention slides any more once those of layers 0 and 3 are gone
        "qwen3": {"head_dim": 32}, "qwen3-mixed": windows | {"layer_types": ["sliding_attention", *mixed[1:5], "full_attention", "full_attention"]},
    }
    for name, options in cases.items():
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split("-")[0], **(common | options)), dtype=torch.float32)
        for parameter in model.parameters():
            # the usual 0.02 would make every layer's share of the logits vanish beside the embedding's
            parameter.data.normal_(0, 0.15).add_(1.0 if parameter.dim() == 1 else 0.0)
        model.save_pretrained(folder / name)
        yield name, folder / name


def main():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    given = [(p.resolve().name, p) for p in map(pathlib.Path, sys.argv[1:])]
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        for name, parent in [*given, *make_parents(work)]:
            config = json.loads((parent / "config.json").read_text())
            for number, (what, pattern) in enumerate(patterns(config).items()):
                check_one(f"{name}, {what}", parent, pattern, work / f"pruned-{name}-{number}")
    print(f"{failures} failed" if failures else "all passed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
