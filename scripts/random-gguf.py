#!/usr/bin/env python3
"""A GGUF of random weights in a known model's shape, whose tokens are bytes and made-up words: for speed and memory alone. The shapes are those of `evop bench --random`.

usage: random-gguf.py SHAPE TYPE OUT.gguf          (needs gguf and numpy from PyPI)

SHAPE: smollm-135m or llama-3.2-1b. TYPE: q8_0, bf16, f16 or f32.
"""
import sys

import gguf
import numpy

# hidden size, MLP channels, layers, query heads, key/value heads, vocabulary, context
SHAPES = {"smollm-135m": (576, 1536, 30, 9, 3, 49152, 8192), "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, 131072)}


def byte_letters():
    """A letter for each of the 256 bytes, as GPT-2's tokenizer has them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in SHAPES:
        raise SystemExit(__doc__)
    shape, kind, out = sys.argv[1:]
    hidden, ffn, layers, heads, groups, vocab, context = SHAPES[shape]
    kind = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = byte_letters() + ["th"]
    tokens += [f"<t{id}>" for id in range(len(tokens), vocab)]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(vocab - 1)
    random = numpy.random.default_rng(31)

    def matrix(name, rows, columns):
        values = (random.random((rows, columns), dtype=numpy.float32) - 0.5) * (2.0 / columns**0.5)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name):
        writer.add_tensor(name, numpy.ones(hidden, dtype=numpy.float32))

    kv = hidden // heads * groups
    matrix("token_embd.weight", vocab, hidden)
    norm("output_norm.weight")
    for layer in range(layers):
        block = f"blk.{layer}."
        norm(block + "attn_norm.weight")
        norm(block + "ffn_norm.weight")
        for name, rows, columns in [("attn_q", hidden, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden), ("attn_output", hidden, hidden),
                                    ("ffn_gate", ffn, hidden), ("ffn_up", ffn, hidden), ("ffn_down", hidden, ffn)]:
            matrix(f"{block}{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main()
