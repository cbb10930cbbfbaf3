//! What the `config.json` of every Hugging Face directory has in common.

use super::plan::{Plan, Projection};
use crate::{Error, Result};
use evop_model::{Architecture, Config, LayerConfig, LayerShape, Positions, RopeScaling};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Fields that would contradict what is written: other dialects of layers that differ, other code, other places.
const GONE: [&str; 9] = [
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
    "block_configs",
    "layer_inter_size",
    "layer_head_num",
    "auto_map",
    "_name_or_path",
    "dtype",
    "quantization_config",
];

/// The contents' own config with what is left of the layers: every global value the widest layer's.
///
/// # Errors
/// [`Error::Format`] for rotary frequencies that no config can express.
pub(super) fn base(plan: &Plan, torch_dtype: &str) -> Result<Map<String, Value>> {
    let config = &plan.config;
    let mut json = config.json.clone();
    json.retain(|field, _| !GONE.contains(&field.as_str()) && !field.starts_with("evop_"));
    if let Positions::Rope(rope) = &config.positions {
        if let Some(RopeScaling::Divisors(_)) = rope.scaling {
            return Err(Error::Format(
                "the file's `rope_freqs.weight` is not of Llama 3's kind and can't be expressed in a config.json: expected --format gguf".into(),
            ));
        }
        // the family's default may not be the default of what it is written as
        if json.get("rope_theta").is_none_or(Value::is_null) && json.get("rope_parameters").is_none_or(Value::is_null) {
            json.insert("rope_theta".into(), json!(rope.theta));
        }
    }
    let mut set = |field: &str, value: Value| json.insert(field.to_string(), value);
    set("num_hidden_layers", json!(config.num_layers()));
    set("torch_dtype", json!(torch_dtype));
    set("tie_word_embeddings", json!(config.tie_word_embeddings));
    let opt = config.architecture == Architecture::Opt;
    let widest = widest(plan);
    // a config asks for a width even where no layer has any
    set(if opt { "ffn_dim" } else { "intermediate_size" }, json!(widest.ffn.max(1)));
    if !opt {
        set("num_key_value_heads", json!(widest.kv_groups.max(1)));
        set("num_attention_heads", json!(plan.most_heads().max(1)));
        set("head_dim", json!(config.head_dim));
        set("rms_norm_eps", json!(config.norm_eps));
    }
    windows(plan, &mut json);
    Ok(json)
}

/// The most of everything that a layer has.
pub(super) fn widest(plan: &Plan) -> LayerShape {
    let most = |of: fn(&LayerShape) -> usize| plan.config.layers.iter().map(|l| of(&l.shape)).max().unwrap_or(0);
    LayerShape { kv_groups: most(|s| s.kv_groups), group_size: most(|s| s.group_size), ffn: most(|s| s.ffn) }
}

/// Which layers slide, by their new numbers.
fn windows(plan: &Plan, json: &mut Map<String, Value>) {
    let layers = &plan.config.layers;
    let listed = json.get("layer_types").is_some_and(Value::is_array);
    if layers.iter().any(|l| l.sliding_window.is_some()) && (listed || json.contains_key("max_window_layers")) {
        let kind = |l: &LayerConfig| if l.sliding_window.is_some() { "sliding_attention" } else { "full_attention" };
        json.insert("layer_types".into(), layers.iter().map(kind).collect());
    } else if let Some(Value::Array(types)) = json.get("layer_types") {
        let types = plan.kept.iter().filter_map(|l| types.get(*l).cloned()).collect();
        json.insert("layer_types".into(), types);
    }
}

/// Holds what a reader makes of a config against what it was written for.
///
/// # Errors
/// [`Error::Format`] for what the dialect can't say, such as windows of several lengths.
pub(super) fn check(plan: &Plan, json: &Map<String, Value>, windows: bool, path: &Path) -> Result<()> {
    let read = Config::from_json(&Value::Object(json.clone()).to_string(), path)?;
    let meant = &plan.config;
    let scaling = |c: &Config| if let Positions::Rope(rope) = &c.positions { Some((rope.theta, rope.scaling.clone())) } else { None };
    let globals = |c: &Config| (c.hidden_size, c.head_dim, c.vocab_size, c.qk_norm, c.tie_word_embeddings, c.norm_eps, c.activation);
    if globals(&read) != globals(meant) || scaling(&read) != scaling(meant) {
        return Err(Error::Format(format!("{}: the model can't be expressed: expected another format", path.display())));
    }
    for (layer, (read, meant)) in read.layers.iter().zip(&meant.layers).enumerate() {
        if read.shape != meant.shape {
            return Err(Error::Format(format!("layer {layer} is {:?} and would be read as {:?}: expected another format", meant.shape, read.shape)));
        }
        if windows && meant.shape.kv_groups > 0 && read.sliding_window != meant.sliding_window {
            return Err(Error::Format(format!(
                "layer {layer} has an attention window of {:?} and would be read with {:?}: a config has one window length for all layers",
                meant.sliding_window, read.sliding_window
            )));
        }
    }
    Ok(())
}

/// The class of a family that transformers has.
pub(super) fn class(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Llama => "LlamaForCausalLM",
        Architecture::Mistral => "MistralForCausalLM",
        Architecture::Qwen2 => "Qwen2ForCausalLM",
        Architecture::Qwen3 => "Qwen3ForCausalLM",
        Architecture::Opt => "OPTForCausalLM",
    }
}

/// Says of a family's bias flags what is there, completing biases where a flag stands for several projections. Returns the projections whose
/// biases the family has no flag for; every layer has them then, too.
pub(super) fn bias_flags(plan: &mut Plan, json: &mut Map<String, Value>) -> Vec<Projection> {
    let flags: &[(&str, &[Projection])] = match plan.config.architecture {
        Architecture::Llama => &[("attention_bias", &Projection::ATTENTION), ("mlp_bias", &Projection::MLP)],
        Architecture::Qwen3 => &[("attention_bias", &Projection::ATTENTION)],
        Architecture::Mistral | Architecture::Qwen2 | Architecture::Opt => &[],
    };
    let always: &[Projection] = match plan.config.architecture {
        Architecture::Qwen2 => &Projection::QKV,
        Architecture::Opt => &[Projection::Q, Projection::K, Projection::V, Projection::O, Projection::Up, Projection::Down],
        _ => &[],
    };
    for (flag, of) in flags {
        plan.complete_biases(of);
        json.insert((*flag).into(), json!(of.iter().any(|p| plan.biases.contains(p))));
    }
    let expressed = |p: &Projection| always.contains(p) || flags.iter().any(|(_, of)| of.contains(p));
    let extra: Vec<Projection> = plan.biases.iter().filter(|p| !expressed(p)).copied().collect();
    extra.iter().for_each(|p| plan.complete_biases(&[*p]));
    extra
}
