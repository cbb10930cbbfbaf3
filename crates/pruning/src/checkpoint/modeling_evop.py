"""Llama, Mistral, Qwen2 and Qwen3 that their stock classes can't build: a checkpoint that EvoP wrote, for Hugging Face transformers (5.15 or newer).

config.json is the family's, with `per_layer_config` (transformers' own format) saying what a layer has that isn't like the others:
  skip                  ["attention"], ["mlp"] or both: that sub-block, its norm included, is not there and the residual stream passes by
  intermediate_size     width of that layer's MLP
  num_key_value_heads   key/value heads of that layer
  evop_group_size       query heads that share one of them; global, and per layer where it differs. Pruning removes a key/value head together
                        with its query heads, so a layer has num_key_value_heads * evop_group_size of those. They are derived here and not
                        written per layer because a Llama config that overrides num_attention_heads can't be loaded.
and of all layers:
  evop_biases           linear layers with a bias that the family's have not (["self_attn.o_proj", "mlp.down_proj"])
`model_type` is "evop_" and the family's, which makes stock code refuse the checkpoint: under the family's own name it would ignore `skip` and
fill the missing sub-blocks with random numbers.
"""
import copy

from torch import nn
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM


class NoAttention(nn.Module):
    """Stands where a layer has no attention: adds nothing, caches nothing."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states.new_zeros(1), None


class NoMlp(nn.Module):
    """Stands where a layer has no MLP: adds nothing."""

    def forward(self, hidden_states):
        return hidden_states.new_zeros(1)


def build_layer(layer_class, config, index):
    """The family's own layer, made from what the config says of this one; (layer, whether it has attention)."""
    own = config.per_layer_config[index] if config.is_heterogeneous else copy.deepcopy(config)
    group_size = getattr(own, "evop_group_size", None)
    if group_size is not None:
        own.head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
        own.num_attention_heads = own.num_key_value_heads * group_size
    layer = layer_class(own, index)
    for name in getattr(config, "evop_biases", None) or []:
        linear = layer.get_submodule(name)
        layer.set_submodule(name, nn.Linear(linear.in_features, linear.out_features, bias=True))
    skip = getattr(own, "skip", [])
    if "attention" in skip:
        layer.self_attn, layer.input_layernorm = NoAttention(), nn.Identity()
    if "mlp" in skip:
        layer.mlp, layer.post_attention_layernorm = NoMlp(), nn.Identity()
    return layer, "attention" not in skip


def assign_cache_slots(config, layers, with_attention):
    """Gives the attentions the first places of the key/value cache.

    transformers asks the cache's first layer (and the first of each kind, where some layers slide) how long the sequence is, so a place that
    is never written must not come first. A layer without attention takes no side in `layer_types`, so its entry is free to be changed.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds and with_attention:
        kinds = config.layer_types = [kinds[i if i in with_attention else with_attention[0]] for i in range(len(layers))]
    free = list(range(len(layers)))
    for index in with_attention:
        slot = next(s for s in free if not kinds or kinds[s] == kinds[index])
        free.remove(slot)
        layers[index].self_attn.layer_idx = slot


class Heterogeneous:
    """Replaces the layers of a family's model by layers of their own shapes."""

    layer_class = None

    def __init__(self, config):
        if not hasattr(config, "is_heterogeneous"):
            raise ImportError("this checkpoint needs transformers 5.15 or newer")
        if config.model_type == "evop_mistral" and len(set(getattr(config, "layer_types", None) or [])) > 1:
            raise ValueError("a Mistral whose layers differ in their attention window (`layer_types`) is not supported")
        # the family would build every layer at the global width
        depth, config.num_hidden_layers = config.num_hidden_layers, 0
        try:
            super().__init__(config)
        finally:
            config.num_hidden_layers = depth
        layers, has_attention = zip(*(build_layer(self.layer_class, config, i) for i in range(depth)))
        self.model.layers = nn.ModuleList(layers)
        assign_cache_slots(config, layers, [i for i in range(depth) if has_attention[i]])
        self.post_init()

    def _get_static_cache_init_shape(self):
        """None: layers of a static cache take their shapes from the first keys that they are given, not from the global config."""
        return None


class EvopLlamaConfig(LlamaConfig):
    model_type = "evop_llama"

    def validate_architecture(self):
        """A pruned model's query heads need not divide its hidden size: `head_dim` is given."""


class EvopMistralConfig(MistralConfig):
    model_type = "evop_mistral"


class EvopQwen2Config(Qwen2Config):
    model_type = "evop_qwen2"


class EvopQwen3Config(Qwen3Config):
    model_type = "evop_qwen3"


class EvopLlamaForCausalLM(Heterogeneous, LlamaForCausalLM):
    config_class, layer_class = EvopLlamaConfig, LlamaDecoderLayer


class EvopMistralForCausalLM(Heterogeneous, MistralForCausalLM):
    config_class, layer_class = EvopMistralConfig, MistralDecoderLayer


class EvopQwen2ForCausalLM(Heterogeneous, Qwen2ForCausalLM):
    config_class, layer_class = EvopQwen2Config, Qwen2DecoderLayer


class EvopQwen3ForCausalLM(Heterogeneous, Qwen3ForCausalLM):
    config_class, layer_class = EvopQwen3Config, Qwen3DecoderLayer
