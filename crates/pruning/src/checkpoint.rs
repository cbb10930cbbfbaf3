//! Writing what a pattern leaves as a Hugging Face checkpoint that other tools load too.
//!
//! Whole layers only: a plain config of the parent's family with fewer layers. Anything else: transformers' `per_layer_config`, with the
//! modelling file that builds each layer from it, and a `model_type` of our own: stock code given the parent's would load it silently wrong.

use crate::storage;
use crate::{Error, Result};
use candle_core::DType;
use evop_model::{Architecture, Checkpoint, Config, Pattern, Source, TensorNames};
use safetensors::tensor::{Dtype as SafeDtype, View};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

/// The modelling file that a heterogeneous checkpoint carries for transformers.
const MODELING: &str = include_str!("modeling_evop.py");

/// Which tensor of the parent becomes which tensor of the result.
struct Plan {
    config: Map<String, Value>,
    heterogeneous: bool,
    /// New name -> the parent's name.
    tensors: BTreeMap<String, String>,
}

/// Writes config, weights, tokenizer and templates of `parent` under `pattern` into `directory`.
///
/// The directory is not yet a checkpoint: its `evop.json` is the run's last word.
///
/// # Errors
/// [`Error::Io`] for a full disk or a directory that can't be written; nothing half-written keeps its final name.
pub fn write(parent: &Checkpoint, pattern: &Pattern, directory: &Path) -> Result<()> {
    let plan = plan(parent, pattern)?;
    std::fs::create_dir_all(directory).map_err(|e| Error::io(directory, e))?;
    for (name, contents) in parent.tokenizer_files() {
        storage::write(&directory.join(name), contents)?;
    }
    if plan.heterogeneous {
        storage::write(&directory.join("modeling_evop.py"), MODELING.as_bytes())?;
    }
    let source = parent.source().as_ref();
    let failed = RefCell::new(None);
    let views: Vec<(&String, Lazy<'_>)> = plan.tensors.iter().map(|(new, old)| Ok((new, Lazy::new(source, old, &failed)?))).collect::<Result<_>>()?;
    let metadata = [("format".to_string(), "pt".to_string())].into();
    storage::write_with(&directory.join("model.safetensors"), |part| match safetensors::serialize_to_file(views, Some(metadata), part) {
        Err(safetensors::SafeTensorError::IoError(error)) => Err(error),
        Err(other) => Err(std::io::Error::other(other)),
        Ok(()) => failed.take().map_or(Ok(()), |error| Err(std::io::Error::other(error))),
    })?;
    storage::write_json(&directory.join("config.json"), &plan.config)
}

/// SHA-256 over names, shapes, types and bytes of all tensors, in order of names: what a pattern was found for.
pub fn fingerprint(source: &dyn Source) -> Result<String> {
    let mut hash = Sha256::new();
    for name in source.names() {
        let raw = source.raw(&name)?;
        hash.update(format!("{name} {:?} {:?}\n", raw.dtype, raw.shape));
        hash.update(&raw.bytes);
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

fn plan(parent: &Checkpoint, pattern: &Pattern) -> Result<Plan> {
    let names = TensorNames::of(parent.config().architecture);
    let pruned = parent.config().with_pattern(pattern);
    if let Some(layer) = (0..pruned.num_layers()).find(|l| narrows(parent.config(), &pruned, *l)) {
        return Err(Error::option("pattern", format!("layer {layer} keeps part of a sub-block: only whole sub-blocks can be written")));
    }
    let source = parent.source();
    let mut tensors = BTreeMap::new();
    // a layer without any sub-block is gone; the others move up
    let kept: Vec<usize> = (0..pruned.num_layers()).filter(|l| pruned.layers[*l].shape.kv_groups + pruned.layers[*l].shape.ffn > 0).collect();
    for name in source.names() {
        let layer = (0..pruned.num_layers()).find(|l| name.starts_with(&names.layer_prefix(*l)));
        let Some(layer) = layer else {
            if !(name == names.head() && pruned.tie_word_embeddings) {
                tensors.insert(name.clone(), name);
            }
            continue;
        };
        let Some(new_layer) = kept.iter().position(|l| *l == layer) else { continue };
        let suffix = &name[names.layer_prefix(layer).len()..];
        let shape = pruned.layers[layer].shape;
        let of_attention = name == names.attention_norm(layer) || suffix.starts_with("self_attn");
        if (of_attention && shape.kv_groups > 0) || (!of_attention && shape.ffn > 0) {
            tensors.insert(format!("{}{suffix}", names.layer_prefix(new_layer)), name);
        }
    }
    let mut config = pruned;
    config.layers = kept.iter().map(|l| config.layers[*l].clone()).collect();
    let heterogeneous = config.layers.iter().any(|l| l.shape != config.layers[0].shape || l.shape.kv_groups == 0 || l.shape.ffn == 0);
    if heterogeneous && config.architecture == Architecture::Opt {
        return Err(Error::option("--space", "an OPT model whose layers differ can't be written for other tools yet: expected layer"));
    }
    let json = config_json(&config, parent.config(), &kept, heterogeneous, dtype_name(source.as_ref(), tensors.values()));
    Ok(Plan { config: json, heterogeneous, tensors })
}

fn narrows(parent: &Config, pruned: &Config, layer: usize) -> bool {
    let (before, after) = (parent.layers[layer].shape, pruned.layers[layer].shape);
    (after.kv_groups > 0 && after.kv_groups < before.kv_groups) || (after.ffn > 0 && after.ffn < before.ffn)
}

fn dtype_name<'a>(source: &dyn Source, mut names: impl Iterator<Item = &'a String>) -> &'static str {
    match names.next().and_then(|n| source.raw(n).ok()).map(|raw| raw.dtype) {
        Some(DType::BF16) => "bfloat16",
        Some(DType::F16) => "float16",
        _ => "float32",
    }
}

/// The parent's config with what the pattern changed, per-layer dialects of the parent replaced by our own.
fn config_json(config: &Config, parent: &Config, kept: &[usize], heterogeneous: bool, dtype: &str) -> Map<String, Value> {
    let mut json = parent.json.clone();
    for gone in [
        "per_layer_config",
        "allow_global_per_layer_attribute_access",
        "block_configs",
        "layer_inter_size",
        "layer_head_num",
        "auto_map",
        "evop_group_size",
        "_name_or_path",
        "dtype",
    ] {
        json.remove(gone);
    }
    let mut set = |field: &str, value: Value| json.insert(field.to_string(), value);
    set("model_type", json!(config.architecture.model_type()));
    set("num_hidden_layers", json!(config.num_layers()));
    set("torch_dtype", json!(dtype));
    set("tie_word_embeddings", json!(config.tie_word_embeddings));
    let widest_ffn = config.layers.iter().map(|l| l.shape.ffn).max().unwrap_or(0);
    let most_groups = config.layers.iter().map(|l| l.shape.kv_groups).max().unwrap_or(0);
    let group_size = config.layers.iter().map(|l| l.shape.group_size).max().unwrap_or(0);
    if config.architecture == Architecture::Opt {
        set("ffn_dim", json!(widest_ffn));
    } else {
        set("intermediate_size", json!(widest_ffn));
        set("num_key_value_heads", json!(most_groups));
        set("num_attention_heads", json!(most_groups * group_size));
        set("head_dim", json!(config.head_dim));
    }
    if config.layers.iter().any(|l| l.sliding_window.is_some()) && parent.json.get("layer_types").is_some() | parent.json.contains_key("max_window_layers") {
        let kind = |l: &evop_model::LayerConfig| if l.sliding_window.is_some() { "sliding_attention" } else { "full_attention" };
        set("layer_types", config.layers.iter().map(kind).collect());
    } else if let Some(Value::Array(types)) = parent.json.get("layer_types") {
        set("layer_types", kept.iter().filter_map(|l| types.get(*l).cloned()).collect());
    }
    let plain = plain_architecture(config.architecture);
    if !heterogeneous {
        set("architectures", json!([plain]));
        return json;
    }
    // a list an absent sub-block, overrides of a width that isn't the widest
    let digits = (config.num_layers().max(2) - 1).to_string().len();
    let mut overrides = Map::new();
    for (layer, of_layer) in config.layers.iter().enumerate() {
        let mut own = Map::new();
        if of_layer.shape.ffn > 0 && of_layer.shape.ffn < widest_ffn {
            own.insert("intermediate_size".into(), json!(of_layer.shape.ffn));
        }
        if of_layer.shape.kv_groups > 0 && of_layer.shape.kv_groups < most_groups {
            own.insert("num_key_value_heads".into(), json!(of_layer.shape.kv_groups));
        }
        let skipped: Vec<&str> =
            [("attention", of_layer.shape.kv_groups), ("mlp", of_layer.shape.ffn)].iter().filter(|(_, n)| *n == 0).map(|(name, _)| *name).collect();
        if !skipped.is_empty() {
            own.insert("skip".into(), json!(skipped));
        }
        if !own.is_empty() {
            overrides.insert(format!("{layer:0digits$}"), Value::Object(own));
        }
    }
    set("per_layer_config", Value::Object(overrides));
    set("allow_global_per_layer_attribute_access", json!(true));
    // stock code goes by model_type alone, and would fill what is missing with random numbers: a type of our own makes it refuse
    set("model_type", json!(format!("evop_{}", config.architecture.model_type())));
    set("evop_group_size", json!(group_size));
    let ours = format!("Evop{plain}");
    set(
        "auto_map",
        json!({ "AutoConfig": format!("modeling_evop.{}", ours.replace("ForCausalLM", "Config")), "AutoModelForCausalLM": format!("modeling_evop.{ours}") }),
    );
    set("architectures", json!([ours]));
    json
}

fn plain_architecture(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Llama => "LlamaForCausalLM",
        Architecture::Mistral => "MistralForCausalLM",
        Architecture::Qwen2 => "Qwen2ForCausalLM",
        Architecture::Qwen3 => "Qwen3ForCausalLM",
        Architecture::Opt => "OPTForCausalLM",
    }
}

/// A tensor that is read when it is written, so that a whole model never sits in memory.
struct Lazy<'a> {
    source: &'a dyn Source,
    name: &'a str,
    dtype: SafeDtype,
    shape: Vec<usize>,
    /// The first error of any tensor: the serialiser's interface has no place for one.
    failed: &'a RefCell<Option<evop_model::Error>>,
}

impl<'a> Lazy<'a> {
    fn new(source: &'a dyn Source, name: &'a str, failed: &'a RefCell<Option<evop_model::Error>>) -> Result<Self> {
        let raw = source.raw(name)?;
        let dtype = match raw.dtype {
            DType::BF16 => SafeDtype::BF16,
            DType::F16 => SafeDtype::F16,
            _ => SafeDtype::F32,
        };
        Ok(Self { source, name, dtype, shape: raw.shape, failed })
    }
}

impl View for Lazy<'_> {
    fn dtype(&self) -> SafeDtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.source.raw(self.name) {
            Ok(raw) => raw.bytes,
            Err(error) => {
                self.failed.borrow_mut().get_or_insert(error);
                Cow::Borrowed(&[])
            }
        }
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}
