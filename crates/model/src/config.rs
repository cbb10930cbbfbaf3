//! A model's configuration, parsed from a Hugging Face `config.json` (or from GGUF metadata put into the same form).

use crate::heterogeneous;
use crate::rope::RopeParameters;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// The families that can be run. A family is data ([`Config`]'s fields), not code of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3, TinyLlama, SmolLM.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen 2 and 2.5: biases on q, k, v.
    Qwen2,
    /// Qwen 3: RMS norm on every query and key head.
    Qwen3,
    /// OPT: LayerNorm, learned positions, biases everywhere.
    Opt,
}

impl Architecture {
    const ALL: [(&'static str, Self); 5] =
        [("llama", Self::Llama), ("mistral", Self::Mistral), ("qwen2", Self::Qwen2), ("qwen3", Self::Qwen3), ("opt", Self::Opt)];

    /// `model_type` as Hugging Face spells it.
    pub fn model_type(self) -> &'static str {
        Self::ALL.iter().find(|(_, a)| *a == self).map_or("", |(name, _)| name)
    }
}

/// Which normalisation the blocks use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// x / rms(x) * weight.
    Rms,
    /// (x - mean) / std, then * weight + bias where it is affine.
    Layer {
        /// Has a weight and a bias.
        affine: bool,
    },
}

/// The MLP's non-linearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x).
    Silu,
    /// x * Phi(x), by erf.
    Gelu,
    /// The tanh approximation of GELU.
    GeluTanh,
    /// max(x, 0).
    Relu,
}

/// How positions enter the model.
#[derive(Debug, Clone, PartialEq)]
pub enum Positions {
    /// Rotary embeddings on queries and keys.
    Rope(RopeParameters),
    /// A learned vector a position, stored `offset` rows into its table (OPT: 2).
    Learned {
        /// Rows before position 0.
        offset: usize,
    },
}

/// What one layer has. Zero means that the sub-block is absent; different widths a layer are the normal case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerShape {
    /// Key/value heads (groups of query heads that share one key and value head).
    pub kv_groups: usize,
    /// Query heads in one group.
    pub group_size: usize,
    /// Channels between the MLP's up and down projections.
    pub ffn: usize,
}

/// Where a layer's shape was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShapeOrigin {
    /// The config's global values.
    Global,
    /// transformers' `per_layer_config`.
    PerLayerConfig,
    /// Nemotron-NAS / Puzzletron `block_configs`.
    BlockConfigs,
    /// Lists with a value a layer (`layer_inter_size`, `layer_head_num`, `intermediate_size` as a list; a GGUF's arrays).
    PerLayerLists,
    /// The config says nothing; the tensors themselves.
    Tensors,
}

/// One layer's part of the configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerConfig {
    /// Heads and channels.
    pub shape: LayerShape,
    /// Where `shape` stands.
    pub origin: ShapeOrigin,
    /// Keys further back than this many positions (the query's own counted) are not seen.
    pub sliding_window: Option<usize>,
}

/// Everything that the forward pass needs to know, besides the weights.
#[derive(Debug, Clone)]
pub struct Config {
    /// The family.
    pub architecture: Architecture,
    /// Entries of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of one attention head.
    pub head_dim: usize,
    /// Longest context that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// RMS or LayerNorm.
    pub norm: NormKind,
    /// Added to the variance.
    pub norm_eps: f64,
    /// Normalise before a sub-block (all but OPT-350m).
    pub pre_norm: bool,
    /// RoPE or learned.
    pub positions: Positions,
    /// MLP non-linearity.
    pub activation: Activation,
    /// down(act(gate) * up) rather than fc2(act(fc1)).
    pub gated_mlp: bool,
    /// q, k and v must have biases.
    pub qkv_bias: bool,
    /// The attention's output projection must have a bias.
    pub output_bias: bool,
    /// The MLP's projections must have biases.
    pub mlp_bias: bool,
    /// RMS norm on every query and key head.
    pub qk_norm: bool,
    /// The output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// One entry a layer.
    pub layers: Vec<LayerConfig>,
    /// First token of a sequence, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// The JSON that all this was read from, to be rewritten by checkpoint writers.
    pub json: Map<String, Value>,
    /// The file it was read from, for errors.
    pub path: PathBuf,
}

impl Config {
    /// Parses a `config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] that names the field, what was expected and what was found.
    pub fn from_json(text: &str, path: &Path) -> Result<Self> {
        let json: Value = serde_json::from_str(text).map_err(|e| Error::config(path, format!("not valid JSON: {e}")))?;
        let Value::Object(json) = json else {
            return Err(Error::config(path, "expected a JSON object"));
        };
        Self::from_map(json, path)
    }

    pub(crate) fn from_map(json: Map<String, Value>, path: &Path) -> Result<Self> {
        let fields = Fields { json: &json, path };
        let (architecture, dialect) = architecture(&fields)?;
        let hidden_size = fields.positive("hidden_size")?;
        let num_layers = fields.positive("num_hidden_layers")?;
        if num_layers > MAX_LAYERS {
            return Err(fields.wrong("num_hidden_layers", &format!("at most {MAX_LAYERS}")));
        }
        let heads = fields.positive("num_attention_heads")?;
        let opt = architecture == Architecture::Opt;
        if opt && fields.usize_or("word_embed_proj_dim", hidden_size)? != hidden_size {
            return Err(Error::config(path, "`word_embed_proj_dim` differs from `hidden_size`: embedding projections (OPT-350m) are not supported"));
        }
        let head_dim = match fields.optional_usize("head_dim")? {
            None if architecture == Architecture::Qwen3 => 128,
            Some(0) | None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            Some(0) | None => {
                return Err(Error::config(path, format!("`hidden_size` {hidden_size} is not a multiple of `num_attention_heads` {heads}")));
            }
            Some(d) if d < 1 << 28 => d,
            Some(_) => return Err(fields.wrong("head_dim", "a smaller number")),
        };
        if !opt && !head_dim.is_multiple_of(2) {
            return Err(Error::config(path, format!("`head_dim`: expected an even number (rotary embeddings turn pairs), found {head_dim}")));
        }
        if fields.f64_or("partial_rotary_factor", 1.0)? != 1.0 {
            return Err(Error::config(path, "`partial_rotary_factor` other than 1 is not supported"));
        }
        let max_position_embeddings = fields.positive("max_position_embeddings")?;
        let positions =
            if opt { Positions::Learned { offset: 2 } } else { Positions::Rope(RopeParameters::from_config(&json, max_position_embeddings, path)?) };
        let activation_field = if opt { "activation_function" } else { "hidden_act" };
        let activation = match fields.str_or(activation_field, if opt { "relu" } else { "silu" })? {
            "silu" | "swish" => Activation::Silu,
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            other => return Err(Error::config(path, format!("`{activation_field}`: expected silu, gelu, gelu_new or relu, found {other:?}"))),
        };
        let attention_bias = fields.bool_or("attention_bias", false)?;
        let opt_bias = opt && fields.bool_or("enable_bias", true)?;
        let layers = heterogeneous::declared_layers(&fields, dialect, architecture, num_layers, heads, head_dim)?;
        Ok(Self {
            architecture,
            vocab_size: fields.positive("vocab_size")?,
            hidden_size,
            head_dim,
            max_position_embeddings,
            norm: if opt { NormKind::Layer { affine: fields.bool_or("layer_norm_elementwise_affine", true)? } } else { NormKind::Rms },
            norm_eps: if opt { 1e-5 } else { fields.f64_or("rms_norm_eps", 1e-6)? },
            pre_norm: !opt || fields.bool_or("do_layer_norm_before", true)?,
            positions,
            activation,
            gated_mlp: !opt,
            qkv_bias: match architecture {
                Architecture::Qwen2 => true,
                Architecture::Opt => opt_bias,
                Architecture::Mistral => false,
                Architecture::Llama | Architecture::Qwen3 => attention_bias,
            },
            output_bias: match architecture {
                Architecture::Opt => opt_bias,
                Architecture::Mistral | Architecture::Qwen2 => false,
                Architecture::Llama | Architecture::Qwen3 => attention_bias,
            },
            mlp_bias: opt_bias || (architecture == Architecture::Llama && fields.bool_or("mlp_bias", false)?),
            qk_norm: architecture == Architecture::Qwen3,
            tie_word_embeddings: fields.bool_or("tie_word_embeddings", opt)?,
            layers,
            bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: fields.token_ids("eos_token_id")?,
            path: path.to_path_buf(),
            json,
        })
    }

    fn norm_parameters(&self) -> usize {
        match self.norm {
            NormKind::Rms => self.hidden_size,
            NormKind::Layer { affine: true } => 2 * self.hidden_size,
            NormKind::Layer { affine: false } => 0,
        }
    }

    /// Number of decoder layers, those without any sub-block included.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Parameters of layer `l`: projections, biases and norms of the sub-blocks that exist.
    pub fn layer_parameters(&self, layer: usize) -> (usize, usize) {
        let LayerShape { kv_groups, group_size, ffn } = self.layers[layer].shape;
        let (hidden, d) = (self.hidden_size, self.head_dim);
        let (q, kv) = (kv_groups * group_size * d, kv_groups * d);
        let norm = self.norm_parameters();
        let attention = if kv_groups == 0 {
            0
        } else {
            let biases = if self.qkv_bias { q + 2 * kv } else { 0 } + if self.output_bias { hidden } else { 0 };
            2 * hidden * q + 2 * hidden * kv + biases + norm + if self.qk_norm { 2 * d } else { 0 }
        };
        let mlp = if ffn == 0 {
            0
        } else {
            let projections = if self.gated_mlp { 3 } else { 2 };
            let biases = if self.mlp_bias { (projections - 1) * ffn + hidden } else { 0 };
            projections * hidden * ffn + biases + norm
        };
        (attention, mlp)
    }

    /// Parameters of all decoder layers (what structured pruning papers call block parameters).
    pub fn block_parameters(&self) -> usize {
        (0..self.num_layers()).map(|l| self.layer_parameters(l)).map(|(a, m)| a + m).sum()
    }

    /// All parameters; a tied head counts once.
    pub fn parameters(&self) -> usize {
        let embedding = self.vocab_size * self.hidden_size;
        let positions = match self.positions {
            Positions::Learned { offset } => (self.max_position_embeddings + offset) * self.hidden_size,
            Positions::Rope(_) => 0,
        };
        let final_norm = if self.pre_norm { self.norm_parameters() } else { 0 };
        embedding * if self.tie_word_embeddings { 1 } else { 2 } + positions + final_norm + self.block_parameters()
    }

    /// Bytes of key/value cache that one token takes, with `bytes_per_element` bytes a number.
    pub fn kv_bytes_per_token(&self, bytes_per_element: usize) -> usize {
        self.layers.iter().map(|l| 2 * l.shape.kv_groups * self.head_dim * bytes_per_element).sum()
    }
}

/// Far above any model; keeps a damaged file from asking for gigabytes of layer descriptions.
const MAX_LAYERS: usize = 1 << 16;

/// Finds the family, and whether the file is in the Nemotron-NAS dialect (`block_configs`).
fn architecture(fields: &Fields<'_>) -> Result<(Architecture, Dialect)> {
    let model_type = fields.str_or("model_type", "")?;
    if model_type == "nemotron-nas" {
        return Ok((Architecture::Llama, Dialect::NemotronNas));
    }
    // a heterogeneous checkpoint of ours: named so that stock code doesn't take it for a plain one (modeling_evop.py)
    let family = model_type.strip_prefix("evop_").unwrap_or(model_type);
    if let Some((_, found)) = Architecture::ALL.iter().find(|(name, _)| *name == family) {
        return Ok((*found, Dialect::HuggingFace));
    }
    let supported: Vec<_> = Architecture::ALL.iter().map(|(name, _)| *name).collect();
    Err(Error::config(
        fields.path,
        format!("`model_type`: expected one of {}, nemotron-nas; found {model_type:?}: this architecture is not supported", supported.join(", ")),
    ))
}

/// How a config says what its layers have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    HuggingFace,
    NemotronNas,
}

/// Typed access to a JSON object, with errors that name the field.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub json: &'a Map<String, Value>,
    pub path: &'a Path,
}

impl<'a> Fields<'a> {
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.json.get(name).filter(|v| !v.is_null())
    }

    pub fn wrong(&self, name: &str, expected: &str) -> Error {
        let found = self.get(name).map_or_else(|| "nothing".to_string(), ToString::to_string);
        Error::config(self.path, format!("`{name}`: expected {expected}, found {found}"))
    }

    pub fn optional_usize(&self, name: &str) -> Result<Option<usize>> {
        match self.get(name) {
            None => Ok(None),
            Some(v) => v.as_u64().and_then(|n| usize::try_from(n).ok()).map(Some).ok_or_else(|| self.wrong(name, "a whole number")),
        }
    }

    pub fn usize_or(&self, name: &str, default: usize) -> Result<usize> {
        Ok(self.optional_usize(name)?.unwrap_or(default))
    }

    /// A size: bounded so that products of two sizes can't overflow.
    pub fn positive(&self, name: &str) -> Result<usize> {
        match self.optional_usize(name)? {
            Some(n) if n > 0 && n < 1 << 28 => Ok(n),
            _ => Err(self.wrong(name, "a whole number above 0")),
        }
    }

    pub fn f64_or(&self, name: &str, default: f64) -> Result<f64> {
        self.get(name).map_or(Ok(default), |v| v.as_f64().ok_or_else(|| self.wrong(name, "a number")))
    }

    pub fn bool_or(&self, name: &str, default: bool) -> Result<bool> {
        self.get(name).map_or(Ok(default), |v| v.as_bool().ok_or_else(|| self.wrong(name, "true or false")))
    }

    pub fn str_or(&self, name: &str, default: &'a str) -> Result<&'a str> {
        self.get(name).map_or(Ok(default), |v| v.as_str().ok_or_else(|| self.wrong(name, "a string")))
    }

    pub fn token_ids(&self, name: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(|v| id(v).ok_or_else(|| self.wrong(name, "token ids"))).collect(),
            Some(v) => id(v).map(|n| vec![n]).ok_or_else(|| self.wrong(name, "a token id")),
        }
    }
}
