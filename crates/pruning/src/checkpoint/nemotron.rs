//! The dialect of NVIDIA's Nemotron-NAS models (`DeciLMForCausalLM`): a Llama with `block_configs`.
//!
//! Two tools read it apart from ours. vLLM (`nemotron_nas.py`) builds a layer from `no_op`, `n_heads_in_group`, and `ffn_mult` if the field is
//! there, else `intermediate_size`. llama.cpp's converter (`conversion/deci.py`) takes an attention without `n_heads_in_group` and an MLP whose
//! `ffn_mult` is null for absent, and knows widths by `ffn_mult` alone. Both round 2/3 * ffn_mult * hidden up to a multiple of 256. What is
//! written here is what both agree on; where that can't be, a note says for which of them.

use super::config_json::{base, check};
use super::hf::{finish, write_file};
use super::plan::{Plan, Projection};
use super::{Contents, FileType, Written, weights};
use crate::{Error, Result};
use evop_model::{Activation, Architecture, LayerShape};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Configuration and model classes: vLLM reads blocks by attribute and takes the configuration class from here; transformers takes both.
const MODELING: &str = include_str!("modeling_nemotron_nas.py");
const CLASS: &str = "DeciLMForCausalLM";

/// Writes the directory.
pub(super) fn write(contents: &Contents<'_>, numbers: Option<FileType>, directory: &Path) -> Result<Written> {
    let dtype = weights::dtype(numbers)?;
    let mut plan = Plan::new(contents)?;
    expressible(&plan)?;
    plan.complete_biases(&Projection::ATTENTION);
    plan.complete_biases(&Projection::MLP);
    let mut notes: Vec<String> = plan.left_out_note().into_iter().collect();
    let json = config_json(&plan, weights::torch_name(&plan, dtype), &mut notes)?;
    notes.extend(vllm_notes(&plan));
    notes.extend(llama_cpp_notes(&plan));
    check(&plan, &json, false, &directory.join("config.json"))?;
    let weight_bytes = weights::write(contents, &plan, dtype, directory)?;
    let mut files = vec![directory.join(weights::FILE)];
    write_file(directory, "modeling_nemotron_nas.py", MODELING.as_bytes(), &mut files)?;
    finish(contents, &json, directory, &mut files)?;
    Ok(Written { architecture: CLASS.into(), files, weight_bytes, notes })
}

/// A Llama in all but name, with as many query heads in every attention.
fn expressible(plan: &Plan) -> Result<()> {
    let config = &plan.config;
    let refuse = |what: &str| Err(Error::Format(format!("{what}, and nemotron-nas is a Llama: expected --format hf")));
    match config.architecture {
        Architecture::Opt => return refuse("an OPT model has LayerNorms and learned positions"),
        Architecture::Qwen3 => return refuse("a Qwen3 model normalises queries and keys"),
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 => {}
    }
    if config.activation != Activation::Silu {
        return refuse("the MLP's activation is not silu");
    }
    let heads = plan.most_heads();
    if heads == 0 {
        return Err(Error::Format("a model without any attention can't be written as nemotron-nas: expected --format hf".into()));
    }
    let differs = |s: &LayerShape| s.kv_groups > 0 && s.kv_groups * s.group_size != heads;
    match config.layers.iter().position(|l| differs(&l.shape)) {
        None => Ok(()),
        Some(layer) => Err(Error::Format(format!(
            "nemotron-nas has the same number of query heads in every attention, and {} has {} of {heads}: expected --format hf or gguf",
            layer_name(plan, layer),
            config.layers[layer].shape.kv_groups * config.layers[layer].shape.group_size
        ))),
    }
}

/// The new number of a layer, and the old one where they differ.
fn layer_name(plan: &Plan, layer: usize) -> String {
    match plan.kept.get(layer) {
        Some(old) if *old != layer => format!("layer {layer} (layer {old} of the original)"),
        _ => format!("layer {layer}"),
    }
}

fn config_json(plan: &Plan, torch_dtype: &str, notes: &mut Vec<String>) -> Result<Map<String, Value>> {
    let config = &plan.config;
    let mut json = base(plan, torch_dtype)?;
    for gone in ["sliding_window", "use_sliding_window", "max_window_layers", "layer_types"] {
        json.remove(gone);
    }
    let mut set = |field: &str, value: Value| json.insert(field.to_string(), value);
    set("model_type", json!("nemotron-nas"));
    set("architectures", json!([CLASS]));
    set("auto_map", json!({ "AutoConfig": "modeling_nemotron_nas.NemotronNasConfig", "AutoModelForCausalLM": format!("modeling_nemotron_nas.{CLASS}") }));
    set("num_key_value_heads", Value::Null);
    set("hidden_act", json!("silu"));
    set("attention_bias", json!(plan.biases.contains(&Projection::O)));
    set("mlp_bias", json!(plan.biases.contains(&Projection::Down)));
    if let Some(window) = super::shortest_window(config) {
        set("max_position_embeddings", json!(window));
        notes.push(super::window_note(window, config));
    }
    set("block_configs", config.layers.iter().map(|l| block(l.shape, config.hidden_size)).collect());
    Ok(json)
}

fn block(shape: LayerShape, hidden: usize) -> Value {
    let in_group = if shape.kv_groups > 0 { json!(shape.group_size) } else { Value::Null };
    let attention = json!({ "n_heads_in_group": in_group, "no_op": shape.kv_groups == 0, "replace_with_linear": false });
    let mut ffn = Map::new();
    let mut set = |field: &str, value: Value| ffn.insert(field.to_string(), value);
    match (shape.ffn, ffn_mult(shape.ffn, hidden)) {
        (0, _) => {
            set("ffn_mult", Value::Null);
            set("intermediate_size", Value::Null);
        }
        (width, Some(mult)) => {
            set("ffn_mult", json!(mult));
            set("intermediate_size", json!(width));
        }
        // vLLM would take the rounded width of any `ffn_mult` that is there
        (width, None) => drop(set("intermediate_size", json!(width))),
    }
    set("no_op", json!(shape.ffn == 0));
    set("replace_with_linear", json!(false));
    json!({ "attention": attention, "ffn": ffn })
}

/// The multiplier that vLLM and llama.cpp read as `width`; `None` for widths that aren't multiples of 256.
fn ffn_mult(width: usize, hidden: usize) -> Option<f64> {
    let mult = 3.0 * width as f64 / (2.0 * hidden as f64);
    let read = ((2.0 * mult * hidden as f64 / 3.0) as usize).next_multiple_of(256);
    (read == width).then_some(mult)
}

fn vllm_notes(plan: &Plan) -> Vec<String> {
    let mut notes = vec!["vLLM: give --trust-remote-code, which lets it read the configuration class in modeling_nemotron_nas.py".to_string()];
    if plan.config.layers[0].shape.kv_groups == 0 {
        notes.push(format!("vLLM: {} has no attention, and its DeciLM stops at an MLP that comes first", layer_name(plan, 0)));
    }
    notes
}

fn llama_cpp_notes(plan: &Plan) -> Vec<String> {
    let config = &plan.config;
    let mut reasons = Vec::new();
    let layer_where = |which: &dyn Fn(&LayerShape) -> bool| config.layers.iter().position(|l| which(&l.shape));
    if let Some(layer) = layer_where(&|s| s.ffn > 0 && ffn_mult(s.ffn, config.hidden_size).is_none()) {
        reasons.push(format!("{} has {} MLP channels, not a multiple of 256", layer_name(plan, layer), config.layers[layer].shape.ffn));
    }
    if let Some(layer) = layer_where(&|s| s.ffn == 0) {
        reasons.push(format!("{} has an attention and no MLP, and it would forget the attention", layer_name(plan, layer)));
    }
    if config.layers[0].shape.kv_groups == 0 {
        reasons.push("the first layer has no attention".into());
    }
    let heads = plan.most_heads();
    if config.hidden_size / heads != config.head_dim {
        reasons.push(format!("heads are {} wide, not hidden size / heads", config.head_dim));
    }
    if reasons.is_empty() {
        return Vec::new();
    }
    vec![format!("llama.cpp's converter can't read it ({}): use --format gguf", reasons.join("; "))]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiples_of_256_have_a_multiplier_and_other_widths_none() {
        for hidden in [48, 576, 896, 2048, 4096, 5120, 8192, 16384] {
            for width in (1..=120).map(|n| n * 256) {
                let mult = ffn_mult(width, hidden).unwrap_or_else(|| panic!("{width} of {hidden}"));
                assert_eq!(((2.0 * mult * hidden as f64 / 3.0) as usize).next_multiple_of(256), width);
                assert_eq!(ffn_mult(width + 64, hidden), None);
            }
        }
    }
}
