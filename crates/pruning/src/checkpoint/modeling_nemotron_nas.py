"""Nemotron-NAS (`DeciLMForCausalLM`) checkpoints that EvoP wrote, for Hugging Face transformers 5 and for vLLM.

config.json is a Llama's with `block_configs`, one object a layer:
  attention   n_heads_in_group: query heads that share a key/value head; no_op: there is no attention, and no norm before it
  ffn         intermediate_size: width of the MLP; ffn_mult: the same as vLLM and llama.cpp read it; no_op: there is no MLP, and no norm before it
All attentions have `num_attention_heads` query heads. vLLM has a model of its own and takes the configuration class alone from here.
"""
import copy

from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM


class Block(dict):
    """A JSON object whose fields are attributes too; a field that isn't there is no attribute."""

    def __getattr__(self, name):
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return Block(value) if isinstance(value, dict) else value


class NemotronNasConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __setattr__(self, name, value):
        if name == "block_configs":
            value = [Block(block) for block in value]
        super().__setattr__(name, value)

    def validate_architecture(self):
        """A pruned model's query heads need not divide its hidden size: `head_dim` is given."""


class NoAttention(nn.Module):
    """Stands where a layer has no attention: adds nothing, caches nothing."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states.new_zeros(1), None


class NoMlp(nn.Module):
    """Stands where a layer has no MLP: adds nothing."""

    def forward(self, hidden_states):
        return hidden_states.new_zeros(1)


def build_layer(config, index, cache_slot):
    """Llama's layer, made from what the layer's block says of it."""
    own, block = copy.deepcopy(config), config.block_configs[index]
    if not block.attention.no_op:
        own.num_key_value_heads = config.num_attention_heads // block.attention.n_heads_in_group
    if not block.ffn.no_op:
        own.intermediate_size = block.ffn.intermediate_size
    layer = LlamaDecoderLayer(own, cache_slot)
    if block.attention.no_op:
        layer.self_attn, layer.input_layernorm = NoAttention(), nn.Identity()
    if block.ffn.no_op:
        layer.mlp, layer.post_attention_layernorm = NoMlp(), nn.Identity()
    return layer


class DeciLMForCausalLM(LlamaForCausalLM):
    config_class = NemotronNasConfig

    def __init__(self, config):
        # Llama would build every layer alike
        depth, config.num_hidden_layers = config.num_hidden_layers, 0
        try:
            super().__init__(config)
        finally:
            config.num_hidden_layers = depth
        # transformers asks the cache's first layer how long the sequence is, so the attentions take the first places
        with_attention = [i for i in range(depth) if not config.block_configs[i].attention.no_op]
        order = with_attention + [i for i in range(depth) if i not in with_attention]
        self.model.layers = nn.ModuleList(build_layer(config, i, order.index(i)) for i in range(depth))
        self.post_init()

    def _get_static_cache_init_shape(self):
        """None: layers of a static cache take their shapes from the first keys that they are given, not from the config."""
        return None
