#!/usr/bin/env python3
"""Small random GGUF files with everything a loader needs, their logits by transformers, and their tokens by reference tokenizers.

usage: make_gguf_goldens.py [OUT] [--only NAME]     OUT defaults to crates/model/tests/goldens

Each case is a folder `gguf_NAME`:
  model.gguf           llama.cpp's layout: its names, its rotary permutation of q and k (llama only), mixed tensor types
  golden.safetensors   as make_model_goldens.py, for the weights as they read after dequantisation
  tokens.json          strings and a chat, with the ids that the tokenizer in the metadata must give
The reference tokenizers are the real ones of each kind (`tokenizers` with the pipeline that the models' own tokenizer.json has; the
sentencepiece library), only with a small vocabulary trained here. They never see the GGUF file.
"""
import argparse
import gzip
import io
import json
import pathlib
import shutil
import zlib

import gguf
import numpy as np
import sentencepiece
import torch
from gguf import GGMLQuantizationType as T
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from jinja2 import Environment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, logging

from make_model_goldens import LENGTHS, ROOT, ROWS_130, randomise, save_tensors

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
HF_TO_GGUF = {v: k for k, v in NAMES.items()}


# --- rotary order: Hugging Face rotates (i, i + d/2), llama.cpp's llama rotates (2i, 2i + 1); rows of a head are reordered to suit

def permute(w, heads):
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def unpermute(w, heads):
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def hf_state_dict(path):
    """The weights in a GGUF file, dequantised to f32, under Hugging Face names and in its rotary order."""
    reader = gguf.GGUFReader(path)
    meta = lambda key: reader.fields[key].contents()
    arch = meta("general.architecture")
    heads = {"attn_q": meta(f"{arch}.attention.head_count"), "attn_k": meta(f"{arch}.attention.head_count_kv")}
    state = {}
    for t in reader.tensors:
        if t.name == "rope_freqs.weight":
            continue
        *block, part, kind = t.name.split(".")
        name = f"model.layers.{block[1]}.{NAMES[part]}.{kind}" if block else f"{NAMES[part]}.{kind}"
        w = dequantize(t.data, t.tensor_type).reshape([int(n) for n in reversed(t.shape)])
        if arch == "llama" and part in heads:
            w = unpermute(w, heads[part])
        state[name] = torch.from_numpy(np.array(w, dtype=np.float32))
    return state


# --- tokenizers

SMOLLM, QWEN2, LLAMA_BPE = "smollm", "qwen2", "llama-bpe"
# the patterns that the models' own tokenizer.json carry
SPLIT = {
    QWEN2: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    LLAMA_BPE: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3_CHAT = ("{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim "
               "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
INST_CHAT = "{% for message in messages %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
TEXTS = [
    "", " ", "a", "Hello, world!", "The old man said that he would not go there again.", "don't I'll WE'VE you'd it's", "12345 and 3.14159, 1,000,000", "²½٣ⅷ",
    "  two leading and   three inner spaces  ", "tabs\tand\nnewlines\n\n\nand\r\nreturns \n x", "héllo naïve Straße 日本語 привет 🙂👍🏽", "the zebra and zebra",
    "fn main() { println!(\"{}\", x[0] += 1); } // ok", "http://example.com/a_b?c=d&e=%20", "\u00a0no-break\u2003em\u200bzero", "....!!!???---", "x" * 40,
]


class ByteLevelBpe:
    """Byte-level BPE as GPT-2 started it; `pre` picks how text is cut into words, by llama.cpp's name."""

    def __init__(self, pre, front=(), back=(), user_defined=()):
        self.pre, self.bos, self.eos, self.user_defined = pre, None, None, set(user_defined)
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = self.words()
        trainer = trainers.BpeTrainer(vocab_size=256 + 64, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
        trained.train_from_iterator(corpus(), trainer)
        learnt = json.loads(trained.to_str())["model"]
        self.merges = [" ".join(m) for m in learnt["merges"]]
        words = sorted(learnt["vocab"], key=learnt["vocab"].get)
        # a whole word that no merge builds: only a tokenizer that looks words up first (Llama 3's ignore_merges) may produce it
        assert "Ġzebra" not in words
        self.special = [*front, *back]
        self.tokens = [*front, *words, "Ġzebra", *back]
        self.reference = self.build()

    def words(self):
        if self.pre == SMOLLM:
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT[self.pre]), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    def build(self):
        ids = {t: i for i, t in enumerate(self.tokens)}
        tok = Tokenizer(models.BPE(vocab=ids, merges=[tuple(m.split(" ")) for m in self.merges], ignore_merges=self.pre == LLAMA_BPE))
        tok.pre_tokenizer, tok.decoder = self.words(), decoders.ByteLevel()
        if self.pre == QWEN2:
            tok.normalizer = normalizers.NFC()
        tok.add_tokens([AddedToken(t, special=t not in self.user_defined, normalized=False) for t in self.special])
        if self.pre == LLAMA_BPE:
            bos = "<|begin_of_text|>"
            tok.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids[bos])])
        return tok

    def write(self, w):
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre(self.pre)
        w.add_token_list(self.tokens)
        kinds = dict.fromkeys(self.special, gguf.TokenType.CONTROL) | dict.fromkeys(self.user_defined, gguf.TokenType.USER_DEFINED)
        w.add_token_types([kinds.get(t, gguf.TokenType.NORMAL) for t in self.tokens])
        w.add_token_merges(self.merges)

    def encode(self, text, add_special_tokens):
        return self.reference.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens):
        return self.reference.decode(ids, skip_special_tokens=skip_special_tokens)

    def texts(self):
        return TEXTS + [f"{s}user\n hi{s} {s}" for s in self.special] + (["e\u0301te\u0301"] if self.pre == QWEN2 else [])


class SentencePiece:
    """SentencePiece BPE with byte fallback as Llama 2 has it: no normalisation, one space put before the text."""

    special = ["<s>", "</s>"]

    def __init__(self):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()), model_writer=model, model_type="bpe", vocab_size=3 + 256 + 96, byte_fallback=True, character_coverage=0.98,
            normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2)
        self.reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        self.tokens = [self.reference.id_to_piece(i) for i in range(len(self.reference))]

    def write(self, w):
        sp, kinds = self.reference, []
        for i in range(len(sp)):
            kinds.append(gguf.TokenType.UNKNOWN if sp.is_unknown(i) else gguf.TokenType.CONTROL if sp.is_control(i)
                         else gguf.TokenType.BYTE if sp.is_byte(i) else gguf.TokenType.NORMAL)
        w.add_tokenizer_model("llama")
        w.add_token_list(self.tokens)
        w.add_token_scores([sp.get_score(i) for i in range(len(sp))])
        w.add_token_types(kinds)
        w.add_unk_token_id(sp.unk_id())

    def encode(self, text, add_special_tokens):
        # llama.cpp and sentencepiece agree that an empty text stays empty
        return self.reference.encode(text, add_bos=add_special_tokens)

    def decode(self, ids, skip_special_tokens):
        return self.reference.decode(ids)

    def texts(self):
        return TEXTS


def corpus():
    with gzip.open(ROOT / "models/tiny/held-out.txt.gz", "rt", encoding="utf-8") as f:
        return f.read(200_000).splitlines()


# --- tensors

def k_quant_blocks(rng, shape, kind, std=0.09):
    """Rows of k-quant blocks with random bits. gguf-py can't quantise to these types but reads them, and any bits are a valid block:
    all that must be chosen are the f16 scales, here so that the weights have mean 0 and the wanted spread."""
    block, size = GGML_QUANT_SIZES[kind]
    offset_d, offset_min, min_per_d, unit_std = {
        T.Q2_K: (80, 82, 1.5, 13.0), T.Q3_K: (108, None, 0, 42.0), T.Q4_K: (0, 2, 7.5, 255.0), T.Q5_K: (0, 2, 15.5, 510.0), T.Q6_K: (208, None, 0, 1370.0)}[kind]
    data = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    put = lambda offset, values: data[..., offset:offset + 2].view(np.float16).__setitem__((..., 0), values)
    d = rng.uniform(0.5, 1.5, data.shape[:2]) * std / unit_std
    put(offset_d, d)
    if offset_min is not None:
        put(offset_min, d * min_per_d)
    return data.reshape(shape[0], -1)


def rope_freqs(config):
    """The divisors of the rotary frequencies that llama.cpp's converter stores for Llama 3: 1 up to high_freq, `factor` from low_freq, smooth between."""
    s = config["rope_scaling"]
    inverse = 1.0 / config["rope_theta"] ** (np.arange(0, config["head_dim"], 2, dtype=np.float64) / config["head_dim"])
    turns = s["original_max_position_embeddings"] * inverse / (2 * np.pi)
    smooth = np.clip((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"]), 0, 1)
    return (1.0 / ((1 - smooth) / s["factor"] + smooth)).astype(np.float32)


class Case:
    def __init__(self, arch, config, tokenizer, types, chat_template, bos=None, eos=None, add_bos=None, rotary_tensor=False):
        self.arch, self.config, self.tokenizer, self.types, self.chat_template = arch, config, tokenizer, types, chat_template
        self.bos, self.eos, self.add_bos, self.rotary_tensor = bos, eos, add_bos, rotary_tensor
        self.config |= {"vocab_size": len(tokenizer.tokens), "max_position_embeddings": 256}


SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False}
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MIXED = {"token_embd": T.Q8_0, "output": T.Q8_0, "attn_q": T.Q4_0, "attn_k": T.Q4_1, "attn_v": T.Q5_0, "attn_output": T.Q5_1,
         "ffn_gate": T.F16, "ffn_up": T.BF16, "ffn_down": T.Q8_0}
K_QUANTS = {"token_embd": T.Q4_K, "output": T.Q6_K, "attn_q": T.Q2_K, "attn_k": T.Q3_K, "attn_v": T.Q6_K, "attn_output": T.Q4_K,
            "ffn_gate": T.Q5_K, "ffn_up": T.Q4_K, "ffn_down": T.Q6_K}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def cases():
    yield "llama_smollm", Case(
        "llama", SHAPE | {"tie_word_embeddings": True}, ByteLevelBpe(SMOLLM, front=CHATML_TOKENS),
        MIXED, CHATML, "<|im_start|>", "<|im_end|>", add_bos=False)
    # no add_bos in the metadata: llama.cpp then puts BOS first for the pre-tokenizer llama-bpe and for sentencepiece models
    yield "llama_llama3", Case(
        "llama", SHAPE | {"head_dim": 32, "rope_theta": 500.0, "rope_scaling": LLAMA3}, ByteLevelBpe(LLAMA_BPE, back=LLAMA3_TOKENS),
        MIXED | {"token_embd": T.F16, "ffn_gate": T.Q4_1, "ffn_up": T.Q5_0}, LLAMA3_CHAT, "<|begin_of_text|>", "<|eot_id|>", rotary_tensor=True)
    yield "llama_spm_linear", Case(
        "llama", SHAPE | {"rope_scaling": LINEAR}, SentencePiece(),
        MIXED | {"token_embd": T.BF16, "output": T.F32}, INST_CHAT, "<s>", "</s>", add_bos=True)
    yield "llama_k_quants", Case(
        "llama", SHAPE | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 64}, SentencePiece(),
        K_QUANTS, INST_CHAT, "<s>", "</s>")
    shape = {k: v for k, v in SHAPE.items() if k != "head_dim"} | {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
    qwen = lambda: ByteLevelBpe(QWEN2, back=[*CHATML_TOKENS, "<tool_call>"], user_defined=["<tool_call>"])
    yield "qwen2", Case("qwen2", shape | {"tie_word_embeddings": True}, qwen(), MIXED, CHATML, "<|endoftext|>", "<|im_end|>", add_bos=False)
    yield "qwen3", Case("qwen3", shape | {"head_dim": 32}, qwen(), MIXED, CHATML, "<|endoftext|>", "<|im_end|>", add_bos=False)


def write_gguf(case, path, name):
    c, w = case.config, gguf.GGUFWriter(path, case.arch)
    w.add_name(name)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_freq_base(c["rope_theta"])
    w.add_vocab_size(c["vocab_size"])
    if "head_dim" in c:
        w.add_key_length(c["head_dim"])
        w.add_value_length(c["head_dim"])
        w.add_rope_dimension_count(c["head_dim"])
    if c.get("rope_scaling", {}).get("rope_type") == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(c["rope_scaling"]["factor"])
    case.tokenizer.write(w)
    w.add_bos_token_id(case.tokenizer.tokens.index(case.bos))
    w.add_eos_token_id(case.tokenizer.tokens.index(case.eos))
    if case.add_bos is not None:
        w.add_add_bos_token(case.add_bos)
    w.add_chat_template(case.chat_template)
    if case.rotary_tensor:
        w.add_tensor("rope_freqs.weight", rope_freqs(c))

    seed = zlib.crc32(name.encode())
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.arch, **c), dtype=torch.float32)
    randomise(model)
    heads = {"attn_q": c["num_attention_heads"], "attn_k": c["num_key_value_heads"]}
    for hf_name, p in model.state_dict().items():
        if hf_name == "lm_head.weight" and c["tie_word_embeddings"]:
            continue
        *path_parts, kind = hf_name.split(".")
        block = f"blk.{path_parts[2]}." if path_parts[1:2] == ["layers"] else ""
        part = HF_TO_GGUF[".".join(path_parts[3:] if block else path_parts)]
        data = p.numpy()
        if case.arch == "llama" and part in heads:
            data = permute(data, heads[part])
        type_ = case.types[part] if data.ndim == 2 else T.F32
        data = k_quant_blocks(rng, data.shape, type_) if case.types is K_QUANTS and data.ndim == 2 else quantize(data, type_)
        w.add_tensor(f"{block}{part}.{kind}", data, raw_dtype=type_)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def golden_logits(case, path, seed):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.arch, **case.config), dtype=torch.float32, attn_implementation="eager").eval()
    state = hf_state_dict(path)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if case.config["tie_word_embeddings"] else []), (missing, unexpected)
    model.tie_weights()
    generator, golden = torch.Generator().manual_seed(seed), {}
    for n in LENGTHS:
        ids = torch.randint(0, case.config["vocab_size"], (n,), generator=generator)
        with torch.no_grad():
            full = model(ids[None]).logits[0].contiguous()
        assert torch.isfinite(full).all() and full.std() > 0.5
        golden[f"ids_{n}"], golden[f"logits_{n}"] = ids, full
    golden["rows_130"], golden["logits_130"] = torch.tensor(ROWS_130), golden["logits_130"][ROWS_130].contiguous()
    return golden


def expected_tokens(case):
    tok = case.tokenizer
    bos_is_first = case.add_bos if case.add_bos is not None else True
    entries = []
    for text in tok.texts():
        ids = tok.encode(text, add_special_tokens=False)
        entries.append({"text": text, "ids": ids, "ids_with_bos": tok.encode(text, add_special_tokens=True),
                        "decoded": tok.decode(ids, False), "decoded_without_special_tokens": tok.decode(ids, True)})
        assert (entries[-1]["ids_with_bos"] != ids) == bos_is_first
    # as transformers renders templates
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(case.chat_template)
    rendered = template.render(messages=CHAT, add_generation_prompt=True, bos_token=case.bos, eos_token=case.eos)
    already_there = rendered.startswith(case.bos)
    return {"add_bos": bos_is_first, "bos_token": case.bos, "bos_token_id": tok.tokens.index(case.bos), "eos_token": case.eos, "eos_token_id": tok.tokens.index(case.eos),
            "cases": entries, "chat": {"messages": CHAT, "text": rendered, "ids": tok.encode(rendered, add_special_tokens=bos_is_first and not already_there)}}


def make(name, case, out):
    folder = out / f"gguf_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_gguf(case, folder / "model.gguf", name)
    golden = golden_logits(case, folder / "model.gguf", zlib.crc32(name.encode()) + 1)
    save_tensors(golden, folder / "golden.safetensors")
    lines = json.dumps(expected_tokens(case), ensure_ascii=True, indent=1)
    (folder / "tokens.json").write_text(lines + "\n")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"gguf_{name:20} {size / 1e3:6.0f} kB  vocabulary {case.config['vocab_size']}  logits std {golden['logits_130'].std():.2f}")
    return size


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("out", nargs="?", type=pathlib.Path, default=ROOT / "crates/model/tests/goldens")
    args.add_argument("--only")
    args = args.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    total = sum(make(name, case, args.out) for name, case in cases() if args.only in (None, name))
    print(f"{total / 1e6:.2f} MB")
