//! `block_configs`: how NVIDIA's Nemotron-NAS and Puzzletron (Model-Optimizer) checkpoints say what each layer has.
//!
//! Nemotron-NAS and Puzzletron's first format: `{"attention": {…}, "ffn": {…}}`. Puzzletron's second:
//! `{"subblock_configs": [{"kind": "attention", …}, {"kind": "ffn", …}]}`, where a value that isn't there is the config's global one and a kind
//! that isn't there is absent.

use crate::config::{Fields, LayerShape};
use crate::heterogeneous::grouped;
use crate::{Error, Result};
use serde_json::Value;

/// What a block that says nothing has.
#[derive(Clone, Copy)]
pub(crate) struct Inherited {
    pub heads: usize,
    pub kv_groups: usize,
    pub head_dim: usize,
}

/// What a block has.
pub(crate) struct Block {
    pub shape: LayerShape,
    /// The attention's window where the block speaks of it; `Some(None)` sees everything.
    pub window: Option<Option<usize>>,
}

/// What would change the computation in ways that this crate doesn't follow.
const UNSUPPORTED: [&str; 9] =
    ["replace_with_linear", "window_length", "num_sink_tokens", "mamba", "llama4", "moe", "parallel_blocks", "k_eq_v", "kv_source_layer"];

/// Reads the entry of one layer.
pub(crate) fn block_config(fields: &Fields<'_>, layer: usize, num_layers: usize, inherited: Inherited) -> Result<Block> {
    let Some(Value::Array(blocks)) = fields.get("block_configs") else {
        return Err(fields.wrong("block_configs", "a list with one object a layer"));
    };
    if blocks.len() != num_layers {
        return Err(Error::config(fields.path, format!("`block_configs`: expected {num_layers} entries, found {}", blocks.len())));
    }
    let block = SubBlock { fields: *fields, json: &blocks[layer], layer, inherited, inherits: blocks[layer].get("subblock_configs").is_some() };
    block.supported()?;
    let (mut shape, mut window) = (LayerShape { kv_groups: 0, group_size: 0, ffn: 0 }, None);
    if let Some(attention) = block.half("attention")? {
        (shape, window) = (attention.heads()?, attention.window()?);
    }
    if let Some(ffn) = block.half("ffn")? {
        shape.ffn = ffn.width()?;
    }
    Ok(Block { shape, window })
}

/// A block, or one of its halves.
struct SubBlock<'a> {
    fields: Fields<'a>,
    json: &'a Value,
    layer: usize,
    inherited: Inherited,
    /// Puzzletron's second format.
    inherits: bool,
}

impl<'a> SubBlock<'a> {
    fn wrong(&self, what: &str) -> Error {
        Error::config(self.fields.path, format!("`block_configs[{}]`: {what}", self.layer))
    }

    fn own(&self) -> Result<Fields<'a>> {
        let json = self.json.as_object().ok_or_else(|| self.wrong(&format!("expected an object, found {}", self.json)))?;
        Ok(Fields { json, path: self.fields.path })
    }

    fn supported(&self) -> Result<()> {
        let own = self.own()?;
        match UNSUPPORTED.iter().find(|name| own.get(name).is_some_and(|v| *v != Value::Bool(false))) {
            Some(name) => Err(self.wrong(&format!("`{name}` is not supported"))),
            None => Ok(()),
        }
    }

    /// The attention or the MLP; `None`: the layer has none.
    fn half(&self, name: &str) -> Result<Option<Self>> {
        let json = match self.json.get("subblock_configs") {
            None => Some(self.json.get(name).ok_or_else(|| self.wrong(&format!("expected an object `{name}`")))?),
            Some(Value::Array(parts)) => {
                let kind = |part: &Value| part.get("kind").and_then(Value::as_str).map(str::to_string);
                if let Some(other) = parts.iter().find(|p| !matches!(kind(p).as_deref(), Some("attention" | "ffn"))) {
                    return Err(self.wrong(&format!("`subblock_configs`: expected `kind` attention or ffn, found {other}")));
                }
                let mut found = parts.iter().filter(|p| kind(p).as_deref() == Some(name));
                let first = found.next();
                if found.next().is_some() {
                    return Err(self.wrong(&format!("`subblock_configs`: expected one `{name}`, found several")));
                }
                first
            }
            Some(other) => return Err(self.wrong(&format!("`subblock_configs`: expected a list, found {other}"))),
        };
        let Some(json) = json else { return Ok(None) };
        let half = SubBlock { json, ..*self };
        half.supported()?;
        Ok(if half.own()?.bool_or("no_op", false)? { None } else { Some(half) })
    }

    fn heads(&self) -> Result<LayerShape> {
        let (own, Inherited { heads, kv_groups, head_dim }) = (self.own()?, self.inherited);
        let heads = own.usize_or("num_query_heads", heads)?;
        for name in ["qk_head_dim", "v_head_dim"] {
            if own.usize_or(name, head_dim)? != head_dim {
                return Err(self.wrong(&format!("`{name}` other than the model's head_dim {head_dim} is not supported")));
            }
        }
        let stated = own.optional_usize("num_key_value_heads")?.or(own.optional_usize("num_kv_heads")?);
        let kv_groups = match (stated, own.optional_usize("n_heads_in_group")?) {
            (Some(kv), _) => kv,
            (None, Some(in_group)) if in_group > 0 && heads.is_multiple_of(in_group) => heads / in_group,
            (None, Some(in_group)) => return Err(self.wrong(&format!("`n_heads_in_group`: expected a divisor of the {heads} query heads, found {in_group}"))),
            (None, None) if self.inherits => kv_groups,
            (None, None) => 0,
        };
        grouped(&self.fields, heads, kv_groups, 0)
    }

    fn window(&self) -> Result<Option<Option<usize>>> {
        let own = self.own()?;
        Ok(match own.get("sliding_window_size") {
            None => None,
            Some(Value::String(full)) if full == "full" => Some(None),
            Some(_) => Some(Some(own.positive("sliding_window_size")?)),
        })
    }

    fn width(&self) -> Result<usize> {
        let own = self.own()?;
        match (own.optional_usize("intermediate_size")?, own.get("ffn_mult")) {
            (Some(n), _) => Ok(n),
            (None, None) if self.inherits => self.fields.positive("intermediate_size"),
            (None, None) => Err(self.wrong("expected `intermediate_size`, `ffn_mult` or `no_op` in `ffn`")),
            (None, Some(_)) => {
                let mult = own.f64_or("ffn_mult", 0.0)?;
                if !(mult > 0.0 && mult < 1e6) {
                    return Err(self.wrong(&format!("`ffn_mult`: expected a number above 0, found {mult}")));
                }
                // as DeciLM rounds: two thirds of mult * hidden, up to a multiple of 256
                let width = 2.0 * mult * self.fields.positive("hidden_size")? as f64 / 3.0;
                Ok((width as usize).next_multiple_of(256))
            }
        }
    }
}
