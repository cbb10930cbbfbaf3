//! Layers that differ: the dialects in which checkpoints say so, and the tensors' own word where the config is silent.
//!
//! Read: transformers' `per_layer_config`, Nemotron-NAS and Puzzletron `block_configs`, lists with a value a layer
//! (`layer_inter_size`, `layer_head_num`, or a global field that is a list), and the shapes of the tensors.

use crate::block_configs::{Inherited, block_config};
use crate::config::{Architecture, Config, Dialect, Fields, LayerConfig, LayerShape, ShapeOrigin};
use crate::source::{Source, TensorNames};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// The layers as the config declares them.
pub(crate) fn declared_layers(
    fields: &Fields<'_>,
    dialect: Dialect,
    architecture: Architecture,
    num_layers: usize,
    heads: usize,
    head_dim: usize,
) -> Result<Vec<LayerConfig>> {
    let ffn_field = if architecture == Architecture::Opt { "ffn_dim" } else { "intermediate_size" };
    let is_list = |name: &str| fields.get(name).is_some_and(Value::is_array);
    let lists = is_list(ffn_field) || is_list("num_key_value_heads") || fields.get("layer_inter_size").is_some() || fields.get("layer_head_num").is_some();
    let overrides = overrides(fields, num_layers)?;
    let mut layers = Vec::with_capacity(num_layers);
    for layer in 0..num_layers {
        let mut window = sliding_window(fields, architecture, layer, num_layers)?;
        let (shape, origin) = if dialect == Dialect::NemotronNas || fields.get("block_configs").is_some() {
            let inherited = Inherited { heads, kv_groups: kv_heads(fields, architecture, heads)?, head_dim };
            let block = block_config(fields, layer, num_layers, inherited)?;
            window = block.window.unwrap_or(window);
            (block.shape, ShapeOrigin::BlockConfigs)
        } else if lists {
            (listed(fields, ffn_field, layer, num_layers, heads, head_dim)?, ShapeOrigin::PerLayerLists)
        } else {
            let global = grouped(fields, heads, kv_heads(fields, architecture, heads)?, fields.positive(ffn_field)?)?;
            match overrides.get(&layer) {
                Some(over) => {
                    if over.contains_key("sliding_window") {
                        window = Fields { json: over, path: fields.path }.optional_usize("sliding_window")?.filter(|w| *w > 0);
                    }
                    (overridden(fields, over, layer, heads, global, ffn_field)?, ShapeOrigin::PerLayerConfig)
                }
                None => (global, ShapeOrigin::Global),
            }
        };
        layers.push(LayerConfig { shape, origin, sliding_window: window });
    }
    Ok(layers)
}

/// An absent key means the family's default, an explicit null as many as there are query heads (transformers' configuration classes).
fn kv_heads(fields: &Fields<'_>, architecture: Architecture, heads: usize) -> Result<usize> {
    let default = match architecture {
        _ if fields.json.contains_key("num_key_value_heads") => heads,
        Architecture::Llama | Architecture::Opt => heads,
        Architecture::Mistral => 8,
        Architecture::Qwen2 | Architecture::Qwen3 => 32,
    };
    fields.usize_or("num_key_value_heads", default)
}

pub(crate) fn grouped(fields: &Fields<'_>, heads: usize, kv_groups: usize, ffn: usize) -> Result<LayerShape> {
    if kv_groups == 0 {
        return Ok(LayerShape { kv_groups: 0, group_size: 0, ffn });
    }
    if !heads.is_multiple_of(kv_groups) {
        return Err(Error::config(
            fields.path,
            format!(
                "{heads} query heads can't be shared by {kv_groups} key/value heads: expected `num_attention_heads` to be a multiple of `num_key_value_heads`"
            ),
        ));
    }
    Ok(LayerShape { kv_groups, group_size: heads / kv_groups, ffn })
}

/// What `per_layer_config` may change. Anything else would be computed as if the layer were like the others.
const OVERRIDES: [&str; 7] = ["skip", "intermediate_size", "ffn_dim", "num_key_value_heads", "num_attention_heads", "evop_group_size", "sliding_window"];

/// Layer -> its overrides.
fn overrides<'a>(fields: &Fields<'a>, num_layers: usize) -> Result<BTreeMap<usize, &'a Map<String, Value>>> {
    let Some(value) = fields.get("per_layer_config") else { return Ok(BTreeMap::new()) };
    let Value::Object(entries) = value else {
        return Err(fields.wrong("per_layer_config", "an object from layer index to overrides"));
    };
    let wrong = |key: &str, what: String| Error::config(fields.path, format!("`per_layer_config.{key}`: {what}"));
    let mut overrides = BTreeMap::new();
    for (key, value) in entries {
        // keys are zero-padded to one width, so they are compared as numbers
        let Some(layer) = key.parse().ok().filter(|l| *l < num_layers) else {
            return Err(wrong(key, format!("expected a layer index below {num_layers}")));
        };
        let Value::Object(over) = value else {
            return Err(wrong(key, format!("expected an object, found {value}")));
        };
        if let Some(unknown) = over.keys().find(|k| !OVERRIDES.contains(&k.as_str())) {
            return Err(wrong(key, format!("expected overrides of {}; found `{unknown}`, which can't differ between layers", OVERRIDES.join(", "))));
        }
        if overrides.insert(layer, over).is_some() {
            return Err(wrong(key, format!("layer {layer} is there twice")));
        }
    }
    Ok(overrides)
}

fn overridden(fields: &Fields<'_>, over: &Map<String, Value>, layer: usize, heads: usize, global: LayerShape, ffn_field: &str) -> Result<LayerShape> {
    let own = Fields { json: over, path: fields.path };
    let kv_groups = own.usize_or("num_key_value_heads", global.kv_groups)?;
    // pruning takes a key/value head with the query heads that share it; a Llama config can't say so by `num_attention_heads` (modeling_evop.py)
    let group_size = own.optional_usize("evop_group_size")?.or(fields.optional_usize("evop_group_size")?);
    let heads = match (own.optional_usize("num_attention_heads")?, group_size) {
        (Some(heads), _) => heads,
        (None, Some(group_size)) => kv_groups.saturating_mul(group_size),
        (None, None) => heads,
    };
    let mut shape = grouped(fields, heads, kv_groups, own.usize_or(ffn_field, global.ffn)?)?;
    for skipped in match own.get("skip") {
        None => &[][..],
        Some(Value::Array(list)) => list,
        Some(_) => return Err(own.wrong("skip", "a list of \"attention\" and \"mlp\"")),
    } {
        match skipped.as_str() {
            Some("attention") => (shape.kv_groups, shape.group_size) = (0, 0),
            Some("mlp") => shape.ffn = 0,
            _ => {
                return Err(Error::config(
                    fields.path,
                    format!("`per_layer_config` of layer {layer}: `skip`: expected \"attention\" or \"mlp\", found {skipped}"),
                ));
            }
        }
    }
    Ok(shape)
}

fn listed(fields: &Fields<'_>, ffn_field: &str, layer: usize, num_layers: usize, heads: usize, head_dim: usize) -> Result<LayerShape> {
    let at = |name: &str| -> Result<Option<usize>> {
        match fields.get(name) {
            Some(Value::Array(list)) if list.len() == num_layers => {
                list[layer].as_u64().map(|n| Some(n as usize)).ok_or_else(|| fields.wrong(name, "a list of whole numbers"))
            }
            Some(Value::Array(_)) => Err(fields.wrong(name, &format!("a list of {num_layers} numbers, one a layer"))),
            _ => fields.optional_usize(name),
        }
    };
    let ffn = match at("layer_inter_size")? {
        Some(n) => n,
        None => at(ffn_field)?.ok_or_else(|| fields.wrong(ffn_field, "a whole number or a list of them"))?,
    };
    let kv = at("num_key_value_heads")?.unwrap_or(heads);
    match at("layer_head_num")? {
        // pruned Qwen checkpoints: `layer_head_num` query heads, the groups' size as in the parent
        Some(layer_heads) => {
            let group_size = heads / kv.max(1);
            if group_size == 0 || !layer_heads.is_multiple_of(group_size) {
                return Err(Error::config(
                    fields.path,
                    format!("`layer_head_num` of layer {layer}: {layer_heads} is not a multiple of the group size {group_size} (head_dim {head_dim})"),
                ));
            }
            Ok(LayerShape { kv_groups: layer_heads / group_size, group_size: if layer_heads == 0 { 0 } else { group_size }, ffn })
        }
        None => grouped(fields, heads, kv, ffn),
    }
}

fn sliding_window(fields: &Fields<'_>, architecture: Architecture, layer: usize, num_layers: usize) -> Result<Option<usize>> {
    // transformers' default; an explicit null turns it off
    let default = if fields.json.contains_key("sliding_window") { None } else { Some(4096) };
    let Some(window) = fields.optional_usize("sliding_window")?.or(default).filter(|w| *w > 0) else { return Ok(None) };
    match architecture {
        Architecture::Llama | Architecture::Opt => return Ok(None),
        Architecture::Qwen2 | Architecture::Qwen3 if !fields.bool_or("use_sliding_window", false)? => return Ok(None),
        _ => {}
    }
    if let Some(types) = fields.get("layer_types") {
        let kind = types.as_array().filter(|t| t.len() == num_layers).and_then(|t| t[layer].as_str());
        return match kind {
            Some("sliding_attention") => Ok(Some(window)),
            Some("full_attention") => Ok(None),
            _ => Err(fields.wrong("layer_types", &format!("{num_layers} entries, each \"full_attention\" or \"sliding_attention\""))),
        };
    }
    let first = match architecture {
        Architecture::Qwen2 | Architecture::Qwen3 => fields.usize_or("max_window_layers", 28)?,
        _ => 0,
    };
    Ok((layer >= first).then_some(window))
}

/// Replaces global shapes by what the tensors say, and refuses tensors that contradict a config which does speak.
pub(crate) fn resolve(config: &mut Config, source: &dyn Source, names: &TensorNames) -> Result<()> {
    let (first, depth) = (names.layer_prefix(0), config.num_layers());
    let layer_of = |name: &str| name.strip_prefix(first.strip_suffix("0.")?)?.split('.').next()?.parse::<usize>().ok();
    if let Some(extra) = source.names().iter().find(|name| layer_of(name).is_some_and(|l| l >= depth)) {
        return Err(Error::config(&config.path, format!("the config says {depth} layers, the tensors have `{extra}`")));
    }
    for layer in 0..config.num_layers() {
        let found = LayerShape::of_tensors(config, source, names, layer)?;
        let declared = &mut config.layers[layer];
        if found == declared.shape {
            continue;
        }
        let narrower = found.kv_groups <= declared.shape.kv_groups
            && found.ffn <= declared.shape.ffn
            && (found.kv_groups == 0 || found.group_size <= declared.shape.group_size);
        if declared.origin == ShapeOrigin::Global && narrower {
            tracing::warn!(layer, ?found, declared = ?declared.shape, "the config is silent about this layer: its shape is read off the tensors");
            *declared = LayerConfig { shape: found, origin: ShapeOrigin::Tensors, ..declared.clone() };
        } else {
            return Err(contradiction(&config.path, layer, declared.shape, found));
        }
    }
    Ok(())
}

fn contradiction(path: &Path, layer: usize, declared: LayerShape, found: LayerShape) -> Error {
    let text = |s: LayerShape| format!("{} key/value heads of {} query heads each and {} MLP channels", s.kv_groups, s.group_size, s.ffn);
    Error::config(path, format!("layer {layer}: the config says {}, the tensors have {}", text(declared), text(found)))
}

impl LayerShape {
    /// Reads a layer's shape off its tensors, checking that they agree with each other.
    fn of_tensors(config: &Config, source: &dyn Source, names: &TensorNames, layer: usize) -> Result<Self> {
        let rows = |name: &str| source.shape(name).and_then(|s| s.first().copied());
        let (d, hidden) = (config.head_dim, config.hidden_size);
        let check = |name: String, expected: [usize; 2]| -> Result<()> {
            match source.shape(&name) {
                Some(found) if found == expected => Ok(()),
                Some(found) => Err(source.mismatch(&name, &format!("shape {expected:?}"), &format!("shape {found:?}"))),
                None => Err(source.mismatch(&name, &format!("shape {expected:?}"), "nothing: it is missing from the file")),
            }
        };
        let attention = [names.q(layer), names.k(layer), names.v(layer), names.o(layer)];
        let (kv_groups, group_size) = if attention.iter().all(|n| source.shape(n).is_none()) {
            (0, 0)
        } else {
            let declared = config.layers[layer].shape;
            let q = rows(&attention[0]).unwrap_or(declared.kv_groups * declared.group_size * d);
            let k = rows(&attention[1]).unwrap_or(declared.kv_groups * d);
            if q == 0 || k == 0 || q % d != 0 || k % d != 0 || q % k != 0 {
                return Err(source.mismatch(&attention[1], &format!("rows that are a multiple of head_dim {d} and divide q_proj's {q}"), &format!("{k} rows")));
            }
            check(attention[0].clone(), [q, hidden])?;
            check(attention[1].clone(), [k, hidden])?;
            check(attention[2].clone(), [k, hidden])?;
            check(attention[3].clone(), [hidden, q])?;
            (k / d, q / k)
        };
        let mlp: Vec<String> =
            if config.gated_mlp { vec![names.gate(layer), names.up(layer), names.down(layer)] } else { vec![names.up(layer), names.down(layer)] };
        let ffn = if mlp.iter().all(|n| source.shape(n).is_none()) {
            0
        } else {
            let ffn = rows(&mlp[0]).unwrap_or(config.layers[layer].shape.ffn);
            for name in &mlp[..mlp.len() - 1] {
                check(name.clone(), [ffn, hidden])?;
            }
            check(mlp[mlp.len() - 1].clone(), [hidden, ffn])?;
            ffn
        };
        Ok(Self { kv_groups, group_size, ffn })
    }
}
