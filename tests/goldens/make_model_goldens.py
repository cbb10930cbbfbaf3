#!/usr/bin/env python3
"""Golden logits of small random models, computed by Hugging Face transformers: what `crates/model` must reproduce.

usage: make_model_goldens.py [OUT] [--only NAME]     OUT defaults to crates/model/tests/goldens

Each case is a checkpoint folder as it could lie on the Hub, and `golden.safetensors`: for prompts of 1, 7 and 130 tokens the ids and the
logits in f32 with eager attention. Of the 130 rows only those named by `rows_130` are kept (the first, a middle stretch, the last), to stay small.
The reference is loaded from the files that are committed, so it sees exactly what the Rust loader sees. Every case that exists for one setting
also proves that the setting matters: `differs_from` names config values under which the logits must come out differently.
"""
import argparse
import json
import pathlib
import shutil
import tempfile
import zlib

import torch
from safetensors.torch import save
from transformers import AutoConfig, AutoModelForCausalLM, logging

ROOT = pathlib.Path(__file__).resolve().parents[2]
VOCAB = 64
LENGTHS = (1, 7, 130)
ROWS_130 = [*range(0, 9), *range(60, 71), *range(120, 130)]

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}
MISTRAL = {k: v for k, v in LLAMA.items() if k not in ("attention_bias", "mlp_bias", "rope_scaling")} | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None, "head_dim": None}
QWEN2 = {k: v for k, v in LLAMA.items() if k not in ("attention_bias", "mlp_bias", "rope_scaling")} | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "use_sliding_window": False, "sliding_window": 16, "max_window_layers": 2}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16, "attention_bias": False, "rope_scaling": None}
OPT = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": VOCAB, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 160, "activation_function": "relu", "do_layer_norm_before": True,
    "dropout": 0.1, "attention_dropout": 0.0, "layerdrop": 0.0, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "torch_dtype": "float32",
}
# yarn's ramp between kept and interpolated frequencies is only a ramp when it spans several of them: a wide head and a small theta see to that
YARN = {"head_dim": 16, "rope_theta": 100.0}
yarn = lambda **more: YARN | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64} | more}
SLIDING = {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 16}


class Case:
    def __init__(self, name, config, differs_from=None, storage=torch.float32, shard_bytes=None, keep_head=False, new_style=False):
        self.name, self.config, self.differs_from, self.storage = name, config, differs_from, storage
        self.shard_bytes, self.keep_head, self.new_style = shard_bytes, keep_head, new_style


CASES = [
    Case("llama_tied_mha", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    Case("llama_tied_gqa2", LLAMA | {"tie_word_embeddings": True}),
    Case("llama_tied_mqa", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    Case("llama_untied", LLAMA),
    # transformers 5 trusts two different tensors in the file more than a config that claims that they are one
    Case("llama_tie_conflict", LLAMA | {"tie_word_embeddings": True}, keep_head=True),
    Case("llama_biases", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    Case("llama_head_dim", LLAMA | {"head_dim": 16}),
    Case("llama_defaults", {k: v for k, v in LLAMA.items() if k not in (
        "num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings", "attention_bias", "mlp_bias", "rms_norm_eps", "torch_dtype")}),
    Case("llama_sharded", LLAMA | {"tie_word_embeddings": True}, shard_bytes=32_000),
    Case("llama_bf16", LLAMA | {"torch_dtype": "bfloat16"}, storage=torch.bfloat16),
    Case("llama_rope_linear", LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}, {"rope_scaling": None}),
    Case("llama_rope_dynamic", LLAMA | {"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"rope_scaling": None}),
    Case("llama_rope_llama3", LLAMA | {"head_dim": 16, "rope_theta": 500.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}, {"rope_scaling": None}),
    Case("llama_rope_yarn", LLAMA | yarn(), {"rope_scaling": None}),
    Case("llama_rope_yarn_attention_factor", LLAMA | yarn(attention_factor=1.3), yarn()),
    Case("llama_rope_yarn_betas", LLAMA | yarn(beta_fast=8, beta_slow=0.5), yarn()),
    Case("llama_rope_yarn_mscale", LLAMA | yarn(mscale=1.0, mscale_all_dim=0.5), yarn()),
    Case("llama_rope_yarn_no_truncate", LLAMA | yarn(truncate=False), yarn()),
    # without original_max_position_embeddings, max_position_embeddings is taken for it, and factor stays what it is
    Case("llama_rope_yarn_no_original", LLAMA | YARN | {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 4.0}}, {"rope_scaling": None}),
    Case("llama_rope_parameters", LLAMA | yarn(beta_fast=8), {"rope_scaling": None}, new_style=True),
    Case("mistral_full", MISTRAL),
    Case("mistral_sliding", MISTRAL | {"sliding_window": 16}, {"sliding_window": 17}),
    Case("qwen2_tied", QWEN2 | {"tie_word_embeddings": True}),
    Case("qwen2_untied", QWEN2),
    Case("qwen2_yarn", QWEN2 | {"rope_theta": 100.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}, {"rope_scaling": None}),
    Case("qwen2_max_window_layers", QWEN2 | SLIDING | {"max_window_layers": 1}, {"max_window_layers": 2}),
    Case("qwen2_layer_types", QWEN2 | SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, {"layer_types": ["full_attention"] * 3}),
    Case("qwen3_tied", QWEN3 | {"tie_word_embeddings": True}),
    Case("qwen3_untied", QWEN3),
    Case("qwen3_bias", QWEN3 | {"attention_bias": True}),
    Case("opt_tied", OPT),
    Case("opt_untied_gelu", OPT | {"tie_word_embeddings": False, "activation_function": "gelu"}, {"activation_function": "relu"}),
    Case("opt_post_norm", OPT | {"do_layer_norm_before": False}),
    # opt-350m: embeddings narrower than the hidden state, with a projection in and one out, and post-norm
    Case("opt_350m", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    # Galactica: no biases, norms without weights
    Case("opt_no_bias", OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"}),
]


def randomise(model):
    """Weights under which a mistake shows: attention far from uniform, logits of several units, biases and norms that are not the identity."""
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.ndim == 1:
                p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
            else:
                p.normal_(0.0, 0.4 if "embed" in name or "lm_head" in name else 0.25)


def save_tensors(tensors, path):
    # not save_file, which leaves files that only their owner may read
    path.write_bytes(save(tensors, {"format": "pt"}))


def write_checkpoint(case, folder):
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(case.config, indent=1) + "\n")
    config = AutoConfig.from_pretrained(folder)
    if case.keep_head:
        config.tie_word_embeddings = False  # so that the head gets numbers of its own; the file still says true
    torch.manual_seed(zlib.crc32(case.name.encode()))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    model.to(case.storage)
    if case.shard_bytes:
        model.save_pretrained(folder, max_shard_size=case.shard_bytes)
        for shard in folder.glob("*.safetensors"):
            shard.chmod(0o644)
    else:
        shared = {} if config.tie_word_embeddings is False else {"lm_head.weight"}
        save_tensors({k: v.contiguous() for k, v in model.state_dict().items() if k not in shared}, folder / "model.safetensors")
    if case.new_style:
        config.save_pretrained(folder)
    else:
        config_file.write_text(json.dumps(case.config, indent=1) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)


def logits(folder, ids):
    # a fresh model each time: dynamic RoPE keeps the longest length that it has seen
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].contiguous()


def check_that_the_setting_matters(case, folder, ids, expected):
    with tempfile.TemporaryDirectory() as other:
        other = pathlib.Path(other)
        for f in folder.glob("model*"):
            shutil.copy(f, other)
        (other / "config.json").write_text(json.dumps(case.config | case.differs_from))
        gap = (logits(other, ids) - expected).abs().max().item()
    assert gap > 0.05, f"{case.name}: logits hardly change ({gap:.2g}) with {case.differs_from}"
    return gap


def make(case, out):
    folder = out / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_checkpoint(case, folder)
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + 1)
    golden, note = {}, ""
    for n in LENGTHS:
        ids = torch.randint(0, VOCAB, (n,), generator=generator)
        full = logits(folder, ids.tolist())
        assert torch.isfinite(full).all() and full.std() > 0.5, case.name
        golden[f"ids_{n}"], golden[f"logits_{n}"] = ids, full
        if n == 130:
            if case.differs_from is not None:
                note = f"  without the setting: {check_that_the_setting_matters(case, folder, ids.tolist(), full):.2f} apart"
            golden["rows_130"], golden["logits_130"] = torch.tensor(ROWS_130), full[ROWS_130].contiguous()
    save_tensors(golden, folder / "golden.safetensors")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{case.name:34} {size / 1e3:6.0f} kB  logits std {golden['logits_130'].std():.2f}{note}")
    return size


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("out", nargs="?", type=pathlib.Path, default=ROOT / "crates/model/tests/goldens")
    args.add_argument("--only")
    args = args.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    total = sum(make(case, args.out) for case in CASES if args.only in (None, case.name))
    print(f"{total / 1e6:.2f} MB")
