//! Hugging Face directories.
//!
//! Equal layers make a plain config of the family. Anything else: transformers' `per_layer_config`, with the modelling file that builds each
//! layer from it, and a `model_type` of our own: stock code given the family's would load it silently wrong.

use super::config_json::{base, bias_flags, check, class, widest};
use super::plan::{Plan, Projection};
use super::{Contents, FileType, Written, weights};
use crate::{Error, Result, storage};
use evop_model::{Architecture, LayerShape};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// The modelling file that a checkpoint carries for transformers when no class of its own can build it.
const MODELING: &str = include_str!("modeling_evop.py");

/// Writes the directory.
pub(super) fn write(contents: &Contents<'_>, numbers: Option<FileType>, directory: &Path) -> Result<Written> {
    let dtype = weights::dtype(numbers)?;
    let mut plan = Plan::new(contents)?;
    let mut json = base(&plan, weights::torch_name(&plan, dtype))?;
    let family = plan.config.architecture;
    let extra_biases = bias_flags(&mut plan, &mut json);
    let mut notes: Vec<String> = plan.left_out_note().into_iter().collect();
    let reason = not_plain(&plan, &extra_biases);
    if family == Architecture::Opt {
        refuse_opt(contents, &plan, reason.as_deref())?;
    }
    let architecture = match &reason {
        None => {
            json.insert("model_type".into(), json!(family.model_type()));
            class(family).to_string()
        }
        Some(reason) => {
            heterogeneous(&plan, &extra_biases, &mut json);
            notes.push(format!(
                "{reason}: transformers loads it by the modelling file beside it (5.15 or newer, trust_remote_code=True); for vLLM: --format nemotron-nas"
            ));
            format!("Evop{}", class(family))
        }
    };
    json.insert("architectures".into(), json!([architecture]));
    check(&plan, &json, true, &directory.join("config.json"))?;
    let weight_bytes = weights::write(contents, &plan, dtype, directory)?;
    let mut files = vec![directory.join(weights::FILE)];
    if reason.is_some() {
        write_file(directory, "modeling_evop.py", MODELING.as_bytes(), &mut files)?;
    }
    finish(contents, &json, directory, &mut files)?;
    Ok(Written { architecture, files, weight_bytes, notes })
}

/// The companions, and last the config.
pub(super) fn finish(contents: &Contents<'_>, json: &Map<String, Value>, directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for (name, bytes) in contents.companions {
        write_file(directory, name, bytes, files)?;
    }
    let path = directory.join("config.json");
    storage::write_json(&path, json)?;
    files.push(path);
    Ok(())
}

pub(super) fn write_file(directory: &Path, name: &str, bytes: &[u8], files: &mut Vec<PathBuf>) -> Result<()> {
    let path = directory.join(name);
    storage::write(&path, bytes)?;
    files.push(path);
    Ok(())
}

/// Why transformers' own class can't build the model; `None` when it can.
fn not_plain(plan: &Plan, extra_biases: &[Projection]) -> Option<String> {
    let config = &plan.config;
    if !plan.is_uniform() {
        return Some("the layers differ".into());
    }
    if let Some(projection) = extra_biases.first() {
        return Some(format!("`{}` has a bias, which a plain {} has not", projection.module(), config.architecture.model_type()));
    }
    let heads = plan.most_heads();
    if config.architecture == Architecture::Llama && !config.hidden_size.is_multiple_of(heads) {
        return Some(format!("{heads} query heads don't divide a hidden size of {}, which a plain llama asks for", config.hidden_size));
    }
    None
}

/// transformers derives an OPT head's width from the hidden size, and there is no modelling file for OPT.
fn refuse_opt(contents: &Contents<'_>, plan: &Plan, reason: Option<&str>) -> Result<()> {
    let fewer_heads =
        (plan.most_heads() * plan.config.head_dim != contents.config.hidden_size).then_some("attentions have fewer heads than the hidden size asks for");
    match reason.or(fewer_heads) {
        None => Ok(()),
        Some(reason) => Err(Error::Format(format!(
            "an OPT model can't be written when {reason}: expected whole layers removed, or one MLP width in all layers (--space layer)"
        ))),
    }
}

/// `per_layer_config` and the code that goes with it.
fn heterogeneous(plan: &Plan, extra_biases: &[Projection], json: &mut Map<String, Value>) {
    let layers = &plan.config.layers;
    let widest = widest(plan);
    let digits = (layers.len().max(2) - 1).to_string().len();
    let overrides: Map<String, Value> = layers
        .iter()
        .enumerate()
        .map(|(l, layer)| (format!("{l:0digits$}"), override_of(layer.shape, widest)))
        .filter(|(_, own)| !own.is_empty())
        .map(|(l, own)| (l, Value::Object(own)))
        .collect();
    let family = plan.config.architecture;
    let ours = format!("Evop{}", class(family));
    let mut set = |field: &str, value: Value| json.insert(field.to_string(), value);
    if !overrides.is_empty() {
        set("per_layer_config", Value::Object(overrides));
        set("allow_global_per_layer_attribute_access", json!(true));
    }
    // stock code goes by model_type alone, and would fill what is missing with random numbers: a type of our own makes it refuse
    set("model_type", json!(format!("evop_{}", family.model_type())));
    if widest.kv_groups > 0 {
        set("evop_group_size", json!(widest.group_size));
        set("num_attention_heads", json!(widest.kv_groups * widest.group_size));
    }
    if !extra_biases.is_empty() {
        set("evop_biases", extra_biases.iter().map(|p| p.module()).collect());
    }
    set(
        "auto_map",
        json!({ "AutoConfig": format!("modeling_evop.{}", ours.replace("ForCausalLM", "Config")), "AutoModelForCausalLM": format!("modeling_evop.{ours}") }),
    );
}

/// What one layer has that isn't the widest layer's: transformers' names, and the size of a group where groups differ.
fn override_of(shape: LayerShape, widest: LayerShape) -> Map<String, Value> {
    let mut own = Map::new();
    let mut skipped = Vec::new();
    match shape.kv_groups {
        0 => skipped.push("attention"),
        groups => {
            if groups != widest.kv_groups {
                own.insert("num_key_value_heads".into(), json!(groups));
            }
            if shape.group_size != widest.group_size {
                own.insert("evop_group_size".into(), json!(shape.group_size));
            }
        }
    }
    match shape.ffn {
        0 => skipped.push("mlp"),
        ffn if ffn != widest.ffn => drop(own.insert("intermediate_size".into(), json!(ffn))),
        _ => {}
    }
    if !skipped.is_empty() {
        own.insert("skip".into(), json!(skipped));
    }
    own
}
