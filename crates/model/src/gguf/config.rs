//! GGUF metadata put into the form of a `config.json`.

use super::metadata::Metadata;
use super::rope::llama3_scaling;
use super::{ROPE_FREQS, ZERO_ATTENTION, ZERO_FEED_FORWARD};
use crate::config::{Config, Positions, ShapeOrigin};
use crate::rope::{RopeParameters, RopeScaling};
use crate::{Error, Result};
use candle_core::quantized::gguf_file::TensorInfo;
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// What each layer has, as the arrays (or single numbers) of the metadata say.
struct Shapes {
    heads: Vec<usize>,
    kv_heads: Vec<usize>,
    ffn: Vec<usize>,
    /// The widest MLP, one of zeros counted: a config asks for a width even where there is no MLP.
    widest_ffn: usize,
}

/// Parses the metadata. `divisors` are the file's `rope_freqs.weight`.
///
/// # Errors
/// [`Error::Config`] that names the key, [`Error::Tensor`] for divisors of another number.
pub(super) fn config(metadata: &Metadata<'_>, tensors: &HashMap<String, TensorInfo>, divisors: Option<Vec<f32>>) -> Result<Config> {
    let name = metadata.text("general.architecture")?.ok_or_else(|| metadata.missing("general.architecture", "a string"))?;
    // deci is Llama whose layers differ
    let (model_type, architecture) = match name {
        "llama" | "deci" => ("llama", "LlamaForCausalLM"),
        "qwen2" => ("qwen2", "Qwen2ForCausalLM"),
        "qwen3" => ("qwen3", "Qwen3ForCausalLM"),
        _ => {
            return Err(Error::config(
                metadata.path,
                format!("`general.architecture`: expected llama, qwen2, qwen3 or deci; found {name:?}: this architecture is not supported"),
            ));
        }
    };
    let key = |suffix: &str| format!("{name}.{suffix}");
    let required = |suffix: &str| metadata.unsigned(&key(suffix))?.ok_or_else(|| metadata.missing(&key(suffix), "a whole number"));
    let hidden = required("embedding_length")?;
    let layers = usize::try_from(required("block_count")?).ok().filter(|n| *n < 1 << 16);
    let layers = layers.ok_or_else(|| metadata.missing(&key("block_count"), "a number of layers"))?;
    let shapes = Shapes::read(metadata, name, layers)?;
    let first = shapes.widest();

    let mut json = Map::new();
    let mut set = |field: &str, value: Value| json.insert(field.to_string(), value);
    set("model_type", json!(model_type));
    set("hidden_size", json!(hidden));
    set("num_hidden_layers", json!(layers));
    set("intermediate_size", json!(shapes.widest_ffn));
    set("num_attention_heads", json!(shapes.heads.get(first)));
    set("num_key_value_heads", json!(shapes.kv_heads.get(first)));
    if let Some(head_dim) = metadata.unsigned(&key("attention.key_length"))? {
        set("head_dim", json!(head_dim));
    } else if let Some(heads) = shapes.heads.first().filter(|heads| **heads > 0) {
        set("head_dim", json!(hidden / *heads as u64));
    }
    let overrides = shapes.overrides();
    let differ = !overrides.is_empty();
    if differ {
        set("per_layer_config", Value::Object(overrides));
    }
    set("max_position_embeddings", json!(required("context_length")?));
    let eps = key("attention.layer_norm_rms_epsilon");
    // stored as f32: the shortest decimal of that f32 is what the config said
    set("rms_norm_eps", json!(shortest(metadata.float(&eps)?.ok_or_else(|| metadata.missing(&eps, "a number"))?)));
    let theta = metadata.float(&key("rope.freq_base"))?.map_or(10_000.0, shortest);
    set("rope_theta", json!(theta));
    let known = divisors.as_ref().and_then(|divisors| llama3_scaling(divisors, theta));
    if let Some(scaling) = known.as_ref().and_then(llama3_json).or(rope_scaling(metadata, name)?) {
        set("rope_scaling", scaling);
    }
    let vocab = metadata.list("tokenizer.ggml.tokens")?.map_or(0, <[_]>::len);
    set("vocab_size", json!(tensors.get("token_embd.weight").and_then(|t| t.shape.dims().first().copied()).unwrap_or(vocab)));
    set("tie_word_embeddings", json!(!tensors.contains_key("output.weight")));
    set("hidden_act", json!("silu"));
    // llama.cpp's biases are optional; a config's flag says that all of them are there
    let biased = |parts: &[&str], width: &[usize]| {
        let mut layers = (0..layers).filter(|l| width[*l] > 0).peekable();
        layers.peek().is_some() && layers.all(|l| parts.iter().all(|part| tensors.contains_key(&format!("blk.{l}.{part}.bias"))))
    };
    if model_type != "qwen2" && biased(&["attn_q", "attn_k", "attn_v", "attn_output"], &shapes.heads) {
        set("attention_bias", json!(true));
    }
    if model_type == "llama" && biased(&["ffn_gate", "ffn_up", "ffn_down"], &shapes.ffn) {
        set("mlp_bias", json!(true));
    }
    for (field, key) in [("bos_token_id", "tokenizer.ggml.bos_token_id"), ("eos_token_id", "tokenizer.ggml.eos_token_id")] {
        if let Some(id) = metadata.unsigned(key)? {
            set(field, json!(id));
        }
    }
    set("architectures", json!([architecture]));
    set("torch_dtype", json!("float32"));
    let mut config = Config::from_map(json, metadata.path)?;
    if let (Some(divisors), Positions::Rope(rope)) = (divisors, &mut config.positions) {
        if divisors.len() != config.head_dim / 2 {
            return Err(Error::Tensor {
                path: metadata.path.into(),
                tensor: ROPE_FREQS.into(),
                expected: format!("{} numbers", config.head_dim / 2),
                found: format!("{}", divisors.len()),
            });
        }
        if known.is_none() {
            rope.scaling = Some(RopeScaling::Divisors(divisors));
        }
    }
    if differ {
        config.layers.iter_mut().for_each(|layer| layer.origin = ShapeOrigin::PerLayerLists);
    }
    Ok(config)
}

impl Shapes {
    fn read(metadata: &Metadata<'_>, architecture: &str, layers: usize) -> Result<Self> {
        let list = |suffix: &str| metadata.per_layer(&format!("{architecture}.{suffix}"), layers);
        let required = |suffix: &str| list(suffix)?.ok_or_else(|| metadata.missing(&format!("{architecture}.{suffix}"), "a whole number"));
        let mut ffn = required("feed_forward_length")?;
        let mut heads = required("attention.head_count")?;
        let mut kv_heads = list("attention.head_count_kv")?.unwrap_or_else(|| heads.clone());
        if let Some(layer) = (0..layers).find(|l| heads[*l] > 0 && kv_heads[*l] == 0) {
            return Err(Error::config(
                metadata.path,
                format!("layer {layer} has query heads and no key/value heads (an attention replaced by a matrix): not supported"),
            ));
        }
        let clear = |key: &str, lists: &mut [&mut Vec<usize>]| -> Result<()> {
            for layer in metadata.layers(key)? {
                for list in &mut *lists {
                    *list.get_mut(layer).ok_or_else(|| metadata.missing(key, &format!("layers below {layers}")))? = 0;
                }
            }
            Ok(())
        };
        let widest_of = |ffn: &[usize]| ffn.iter().max().copied().unwrap_or(0);
        let declared = widest_of(&ffn);
        clear(ZERO_ATTENTION, &mut [&mut heads, &mut kv_heads])?;
        clear(ZERO_FEED_FORWARD, &mut [&mut ffn])?;
        let widest_ffn = if widest_of(&ffn) > 0 { widest_of(&ffn) } else { declared };
        Ok(Self { heads, kv_heads, ffn, widest_ffn })
    }

    /// The layer with the most query heads, whose numbers stand for the model.
    fn widest(&self) -> usize {
        (0..self.heads.len()).max_by_key(|l| (self.heads[*l], self.kv_heads[*l], std::cmp::Reverse(*l))).unwrap_or(0)
    }

    /// transformers' `per_layer_config` of layers that differ.
    fn overrides(&self) -> Map<String, Value> {
        let first = self.widest();
        let mut overrides = Map::new();
        for layer in 0..self.heads.len() {
            let mut own = Map::new();
            let mut skip = Vec::new();
            if self.heads[layer] == 0 {
                skip.push("attention");
            } else if (self.heads[layer], self.kv_heads[layer]) != (self.heads[first], self.kv_heads[first]) {
                own.insert("num_attention_heads".into(), json!(self.heads[layer]));
                own.insert("num_key_value_heads".into(), json!(self.kv_heads[layer]));
            }
            if self.ffn[layer] == 0 {
                skip.push("mlp");
            } else if self.ffn[layer] != self.widest_ffn {
                own.insert("intermediate_size".into(), json!(self.ffn[layer]));
            }
            if !skip.is_empty() {
                own.insert("skip".into(), json!(skip));
            }
            if !own.is_empty() {
                overrides.insert(layer.to_string(), Value::Object(own));
            }
        }
        overrides
    }
}

/// Llama 3.1's scaling as a config says it.
fn llama3_json(rope: &RopeParameters) -> Option<Value> {
    let Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor }) = rope.scaling else { return None };
    Some(json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor, "high_freq_factor": high_freq_factor,
        "original_max_position_embeddings": rope.original_context,
    }))
}

fn rope_scaling(metadata: &Metadata<'_>, architecture: &str) -> Result<Option<Value>> {
    let key = |suffix: &str| format!("{architecture}.rope.scaling.{suffix}");
    let Some(kind) = metadata.text(&key("type"))?.filter(|kind| *kind != "none") else { return Ok(None) };
    let mut scaling = Map::new();
    scaling.insert("rope_type".into(), json!(kind));
    let factor = metadata.float(&key("factor"))?.map(shortest);
    if let Some(factor) = factor {
        scaling.insert("factor".into(), json!(factor));
    }
    if let Some(original) = metadata.unsigned(&key("original_context_length"))? {
        scaling.insert("original_max_position_embeddings".into(), json!(original));
    }
    for (field, suffix) in [("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")] {
        if let Some(value) = metadata.float(&key(suffix))? {
            scaling.insert(field.into(), json!(shortest(value)));
        }
    }
    // llama.cpp multiplies it by what transformers has as a default
    if let (Some(own), Some(factor), "yarn") = (metadata.float(&key("attn_factor"))?, factor, kind) {
        // an f32 ratio of what the config said: a number of six decimals or less is told again
        let product = own * (0.1 * factor.max(1.0).ln() + 1.0);
        let decimal = (product * 1e6).round() / 1e6;
        scaling.insert("attention_factor".into(), json!(if (decimal / product - 1.0).abs() < 1e-7 { decimal } else { product }));
    }
    Ok(Some(Value::Object(scaling)))
}

fn shortest(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}
