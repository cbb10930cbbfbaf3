//! Small random models of every family: on disk, whole and sliced by a pattern.

use candle_core::safetensors::save;
use evop_model::{Architecture, Config, DType, Decoder, Device, Gene, NoCache, NormKind, Pattern, Positions, Span, Tensor, TensorNames, open_weights};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

pub const VOCAB: usize = 53;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Llama,
    LlamaBiases,
    MistralWindow,
    Qwen2,
    Qwen3,
    Opt,
    OptPostNorm,
}

impl Family {
    pub const ALL: [Self; 7] = [Self::Llama, Self::LlamaBiases, Self::MistralWindow, Self::Qwen2, Self::Qwen3, Self::Opt, Self::OptPostNorm];

    pub fn is_opt(self) -> bool {
        matches!(self, Self::Opt | Self::OptPostNorm)
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub hidden: usize,
    pub heads: usize,
    pub kv_groups: usize,
    pub ffn: usize,
    pub layers: usize,
}

impl Size {
    pub const SMALL: Self = Self { hidden: 48, heads: 4, kv_groups: 2, ffn: 64, layers: 4 };
}

/// A `config.json` and the tensors that go with it.
#[derive(Debug, Clone)]
pub struct Model {
    pub json: Map<String, Value>,
    pub tensors: BTreeMap<String, Tensor>,
}

impl Model {
    pub fn random(family: Family, size: Size, seed: u64) -> Self {
        let json = config_json(family, size);
        let config = parse(&json);
        let mut tensors = Random { rng: StdRng::seed_from_u64(seed), tensors: BTreeMap::new() };
        tensors.fill(&config);
        Self { json, tensors: tensors.tensors }
    }

    pub fn config(&self) -> Config {
        parse(&self.json)
    }

    /// The same config with some fields replaced; null takes a field away.
    pub fn with(&self, fields: Value) -> Self {
        let mut changed = self.clone();
        for (name, value) in fields.as_object().unwrap() {
            if value.is_null() {
                changed.json.remove(name);
            } else {
                changed.json.insert(name.clone(), value.clone());
            }
        }
        changed
    }

    /// Smaller tensors: what `pattern` keeps. The config is still the whole model's.
    pub fn sliced(&self, pattern: &Pattern) -> Self {
        let config = self.config();
        let names = TensorNames::of(config.architecture);
        let mut sliced = self.clone();
        for (l, (gene, layer)) in pattern.layers().iter().zip(&config.layers).enumerate() {
            let d = config.head_dim;
            if gene.kv_groups == 0 {
                sliced.remove([names.q(l), names.k(l), names.v(l), names.o(l), names.q_norm(l), names.k_norm(l), names.attention_norm(l)]);
            } else {
                sliced.rows(&names.q(l), gene.kv_groups * layer.shape.group_size * d);
                sliced.rows(&names.k(l), gene.kv_groups * d);
                sliced.rows(&names.v(l), gene.kv_groups * d);
                sliced.columns(&names.o(l), gene.kv_groups * layer.shape.group_size * d);
            }
            if gene.ffn == 0 {
                sliced.remove([names.gate(l), names.up(l), names.down(l), names.mlp_norm(l)]);
            } else {
                if config.gated_mlp {
                    sliced.rows(&names.gate(l), gene.ffn);
                }
                sliced.rows(&names.up(l), gene.ffn);
                sliced.columns(&names.down(l), gene.ffn);
            }
        }
        sliced
    }

    fn remove<const N: usize>(&mut self, weights: [String; N]) {
        for weight in weights {
            self.tensors.remove(&bias_of(&weight));
            self.tensors.remove(&weight);
        }
    }

    pub fn rows(&mut self, weight: &str, rows: usize) {
        for name in [weight.to_string(), bias_of(weight)] {
            if let Some(tensor) = self.tensors.get_mut(&name) {
                *tensor = tensor.narrow(0, 0, rows).unwrap().contiguous().unwrap();
            }
        }
    }

    pub fn columns(&mut self, weight: &str, columns: usize) {
        let tensor = self.tensors.get_mut(weight).unwrap();
        *tensor = tensor.narrow(1, 0, columns).unwrap().contiguous().unwrap();
    }

    pub fn write(&self, directory: &Path) {
        let tensors: HashMap<String, Tensor> = self.tensors.clone().into_iter().collect();
        save(&tensors, directory.join("model.safetensors")).unwrap();
        std::fs::write(directory.join("config.json"), Value::Object(self.json.clone()).to_string()).unwrap();
    }

    /// Through the disk.
    pub fn try_load(&self) -> evop_model::Result<Decoder> {
        let directory = tempfile::tempdir().unwrap();
        self.write(directory.path());
        let (config, source) = open_weights(directory.path())?;
        Decoder::load(&config, source.as_ref(), &Device::Cpu, DType::F32)
    }

    pub fn load(&self) -> Decoder {
        self.try_load().unwrap_or_else(|e| panic!("{e}"))
    }
}

/// `per_layer_config` (and what goes with it) that says what `pattern` keeps of a model.
pub fn per_layer_config(parent: &Config, pattern: &Pattern) -> Value {
    let opt = parent.architecture == Architecture::Opt;
    let digits = (parent.num_layers() - 1).to_string().len();
    let mut overrides = Map::new();
    for (l, (gene, layer)) in pattern.layers().iter().zip(&parent.layers).enumerate() {
        let mut own = Map::new();
        let mut skip = Vec::new();
        match gene.kv_groups {
            0 => skip.push("attention"),
            n if n < layer.shape.kv_groups => drop(own.insert("num_key_value_heads".into(), json!(n))),
            _ => {}
        }
        match gene.ffn {
            0 => skip.push("mlp"),
            n if n < layer.shape.ffn => drop(own.insert(if opt { "ffn_dim" } else { "intermediate_size" }.into(), json!(n))),
            _ => {}
        }
        if !skip.is_empty() {
            own.insert("skip".into(), json!(skip));
        }
        if !own.is_empty() {
            overrides.insert(format!("{l:0digits$}"), Value::Object(own));
        }
    }
    json!({
        "model_type": format!("evop_{}", parent.architecture.model_type()),
        "per_layer_config": overrides,
        "allow_global_per_layer_attribute_access": true,
        "evop_group_size": parent.layers[0].shape.group_size,
    })
}

/// A pattern from (key/value groups, channels) a layer.
pub fn pattern<const N: usize>(parent: &Config, genes: [(usize, usize); N]) -> Pattern {
    Pattern::new(genes.iter().map(|(kv_groups, ffn)| Gene { kv_groups: *kv_groups, ffn: *ffn }).collect(), parent).unwrap()
}

pub fn tokens(n: usize, seed: u64) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(0..VOCAB as u32)).collect()
}

/// Logits of a whole sequence in one pass.
pub fn logits(decoder: &Decoder, tokens: &[u32]) -> Vec<Vec<f32>> {
    let batch = decoder.batch(&[Span::prompt(tokens.len())]).unwrap();
    let hidden = decoder.forward(tokens, &batch, &mut NoCache).unwrap();
    rows(&decoder.logits(&hidden).unwrap())
}

pub fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
    let rows: Vec<Vec<f32>> = tensor.to_vec2().unwrap();
    assert!(rows.iter().flatten().all(|v| v.is_finite()));
    rows
}

pub fn bias_of(weight: &str) -> String {
    format!("{}bias", weight.strip_suffix("weight").unwrap())
}

fn parse(json: &Map<String, Value>) -> Config {
    Config::from_json(&Value::Object(json.clone()).to_string(), Path::new("config.json")).unwrap_or_else(|e| panic!("{e}"))
}

fn config_json(family: Family, size: Size) -> Map<String, Value> {
    let Size { hidden, heads, kv_groups, ffn, layers } = size;
    let mut json = json!({
        "hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers, "vocab_size": VOCAB,
        "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    });
    let own = match family {
        Family::Llama => json!({"model_type": "llama"}),
        Family::LlamaBiases => json!({"model_type": "llama", "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true}),
        Family::MistralWindow => json!({"model_type": "mistral", "sliding_window": 7}),
        Family::Qwen2 => json!({"model_type": "qwen2", "rope_theta": 1e6}),
        Family::Qwen3 => json!({"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": true}),
        Family::Opt => json!({"model_type": "opt", "tie_word_embeddings": false}),
        Family::OptPostNorm => json!({"model_type": "opt", "do_layer_norm_before": false, "activation_function": "gelu"}),
    };
    // OPT has no grouped queries in its config
    let widths = if family.is_opt() { json!({"ffn_dim": ffn}) } else { json!({"intermediate_size": ffn, "num_key_value_heads": kv_groups}) };
    let object = json.as_object_mut().unwrap();
    for part in [own, widths] {
        object.extend(part.as_object().unwrap().clone());
    }
    object.clone()
}

struct Random {
    rng: StdRng,
    tensors: BTreeMap<String, Tensor>,
}

impl Random {
    fn fill(&mut self, config: &Config) {
        let names = TensorNames::of(config.architecture);
        let (hidden, d) = (config.hidden_size, config.head_dim);
        self.uniform(names.embedding(), &[config.vocab_size, hidden], 0.0, 1.0);
        if let Positions::Learned { offset } = config.positions {
            self.uniform(names.positions(), &[config.max_position_embeddings + offset, hidden], 0.0, 0.5);
        }
        for (l, layer) in config.layers.iter().enumerate() {
            let (q, kv, ffn) = (layer.shape.kv_groups * layer.shape.group_size * d, layer.shape.kv_groups * d, layer.shape.ffn);
            self.linear(&names.q(l), q, hidden, config.qkv_bias);
            self.linear(&names.k(l), kv, hidden, config.qkv_bias);
            self.linear(&names.v(l), kv, hidden, config.qkv_bias);
            self.linear(&names.o(l), hidden, q, config.output_bias);
            if config.qk_norm {
                self.uniform(&names.q_norm(l), &[d], 1.0, 0.5);
                self.uniform(&names.k_norm(l), &[d], 1.0, 0.5);
            }
            if config.gated_mlp {
                self.linear(&names.gate(l), ffn, hidden, config.mlp_bias);
            }
            self.linear(&names.up(l), ffn, hidden, config.mlp_bias);
            self.linear(&names.down(l), hidden, ffn, config.mlp_bias);
            self.norm(config, &names.attention_norm(l));
            self.norm(config, &names.mlp_norm(l));
        }
        if config.pre_norm {
            self.norm(config, names.final_norm());
        }
        if !config.tie_word_embeddings {
            self.linear(names.head(), config.vocab_size, hidden, false);
        }
    }

    fn uniform(&mut self, name: &str, shape: &[usize], centre: f32, spread: f32) {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| centre + self.rng.random_range(-spread..spread)).collect();
        self.tensors.insert(name.to_string(), Tensor::from_vec(values, shape, &Device::Cpu).unwrap());
    }

    fn linear(&mut self, name: &str, out: usize, input: usize, bias: bool) {
        self.uniform(name, &[out, input], 0.0, 2.0 / (input as f32).sqrt());
        if bias {
            self.uniform(&bias_of(name), &[out], 0.0, 0.3);
        }
    }

    fn norm(&mut self, config: &Config, name: &str) {
        self.uniform(name, &[config.hidden_size], 1.0, 0.5);
        if config.norm == (NormKind::Layer { affine: true }) {
            self.uniform(&bias_of(name), &[config.hidden_size], 0.0, 0.3);
        }
    }
}
