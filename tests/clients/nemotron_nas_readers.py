"""How vLLM and llama.cpp's converter read a Nemotron-NAS directory: their rules, put down as code of our own.

vLLM       vllm/model_executor/models/nemotron_nas.py (and llama.py, config/model.py): which parameters it makes of the config, and of what shape
llama.cpp  conversion/deci.py, src/models/deci.cpp: which layers and widths its converter makes of the JSON
Both functions return {tensor name: shape} under the checkpoint's names, or raise ValueError with the reason for which the tool would stop or go wrong.
"""


def rounded(ffn_mult, hidden):
    """Both tools' `_ffn_mult_to_intermediate_size`."""
    width = int(2 * ffn_mult * hidden / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


def shapes_of_layers(config, layers, attention_bias, output_bias, mlp_bias):
    """{name: shape} of (query heads, key/value heads, channels) a layer; 0 is absent."""
    hidden, d = config["hidden_size"], config["head_dim"]
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [config["vocab_size"], hidden]
    for i, (heads, kv_heads, ffn) in enumerate(layers):
        linear = {}
        if heads:
            shapes[f"model.layers.{i}.input_layernorm.weight"] = [hidden]
            linear |= {f"self_attn.{n}_proj": ([rows * d, hidden], attention_bias) for n, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
            linear["self_attn.o_proj"] = ([hidden, heads * d], output_bias)
        if ffn:
            shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = [hidden]
            linear |= {f"mlp.{n}_proj": ([ffn, hidden], mlp_bias) for n in ("gate", "up")}
            linear["mlp.down_proj"] = ([hidden, ffn], mlp_bias)
        for name, (shape, bias) in linear.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
            if bias:
                shapes[f"model.layers.{i}.{name}.bias"] = shape[:1]
    return shapes


def vllm(config):
    """`config` is what AutoConfig made with the directory's own class: vLLM reads blocks by attribute."""
    heads = config.num_attention_heads
    blocks = config.block_configs
    if len(blocks) < config.num_hidden_layers:
        raise ValueError(f"{len(blocks)} blocks for {config.num_hidden_layers} layers")
    # NemotronNasModelArchConfigConvertor.get_total_num_kv_heads: the first attention's; none is an error
    if all(block.attention.no_op for block in blocks):
        raise ValueError("no attention to take a number of key/value heads from")
    # DeciLMDecoderLayer.forward: without a residual from an attention the first MLP's norm gives one tensor where two are expected
    if blocks[0].attention.no_op:
        raise ValueError("the first layer has no attention")
    layers = []
    for block in blocks:
        kv_heads = 0 if block.attention.no_op else heads // block.attention.n_heads_in_group
        if kv_heads and heads % kv_heads:
            raise ValueError(f"{heads} query heads over {kv_heads} key/value heads")
        ffn = 0
        if not block.ffn.no_op:
            ffn = rounded(block.ffn.ffn_mult, config.hidden_size) if hasattr(block.ffn, "ffn_mult") else block.ffn.intermediate_size
            if getattr(block.ffn, "hidden_act", config.hidden_act) != "silu":
                raise ValueError("LlamaMLP knows silu alone")
        layers.append((heads if kv_heads else 0, kv_heads, ffn))
    biased = getattr(config, "attention_bias", False) or getattr(config, "bias", False)
    # LlamaAttention takes head_dim where it is given
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    plain = {name: getattr(config, name) for name in ("hidden_size", "vocab_size", "tie_word_embeddings")} | {"head_dim": head_dim}
    return shapes_of_layers(plain, layers, getattr(config, "qkv_bias", biased), biased, getattr(config, "mlp_bias", False))


def llama_cpp(config):
    """`config` is config.json as a dict."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    layers = []
    for i, block in enumerate(config["block_configs"]):
        attention, ffn = block["attention"], block["ffn"]
        if attention["n_heads_in_group"] is None:
            if attention["replace_with_linear"]:
                raise ValueError(f"layer {i}: an attention replaced by a matrix")
            kv_heads = 0
        else:
            kv_heads = heads // attention["n_heads_in_group"]
        if "ffn_mult" not in ffn:
            raise ValueError(f"layer {i}: KeyError: ffn_mult")
        if not isinstance(ffn["ffn_mult"], float | None):
            raise ValueError(f"layer {i}: ffn_mult isn't a float")
        width = 0 if ffn["ffn_mult"] is None else rounded(ffn["ffn_mult"], hidden)
        if kv_heads and not width:
            raise ValueError(f"layer {i}: deci.cpp forgets the attention of a layer without an MLP")
        layers.append((heads if kv_heads else 0, kv_heads, width))
    if not layers[0][0]:
        raise ValueError("llama.cpp takes head sizes from the first layer's attention")
    # set_gguf_parameters: key_length is hidden size / heads, whatever head_dim says
    plain = {name: config[name] for name in ("hidden_size", "vocab_size", "tie_word_embeddings")} | {"head_dim": hidden // heads}
    # biases are optional in deci.cpp: whatever is in the file
    return shapes_of_layers(plain, layers, config["attention_bias"], config["attention_bias"], config["mlp_bias"])
