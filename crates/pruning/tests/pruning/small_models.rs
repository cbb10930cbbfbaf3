//! Small random models of every family as Hugging Face directories, with the bundled model's tokenizer.

use crate::setting::root;
use candle_core::safetensors::save;
use evop_model::{Checkpoint, Config, DType, Decoder, Device, Gene, NoCache, NormKind, Pattern, Positions, Span, Tensor, TensorNames, bias_of};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

pub const LAYERS: usize = 5;
pub const GROUPS: usize = 4;
pub const FFN: usize = 512;

/// Family name -> what its config has of its own.
pub fn families() -> Vec<(&'static str, Value)> {
    vec![
        ("llama", json!({"model_type": "llama"})),
        ("llama-biases", json!({"model_type": "llama", "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true})),
        (
            "llama-3",
            json!({"model_type": "llama", "rope_theta": 500_000.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64 }}),
        ),
        (
            "mistral",
            json!({"model_type": "mistral", "sliding_window": null, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.25 }}),
        ),
        ("qwen2", json!({"model_type": "qwen2", "rope_theta": 1e6})),
        ("qwen3", json!({"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": true})),
    ]
}

/// Writes a model of 5 layers, 8 query heads over 4 groups and 512 channels; `own` replaces fields of its config.
pub fn write(own: &Value, seed: u64, directory: &Path) {
    let opt = own["model_type"] == "opt";
    let mut json = json!({
        "hidden_size": 128, "num_attention_heads": 8, "num_hidden_layers": LAYERS, "vocab_size": 4096, "max_position_embeddings": 128, "bos_token_id": 0,
        "eos_token_id": 0, "rms_norm_eps": 1e-5,
    });
    let widths = if opt { json!({"ffn_dim": FFN}) } else { json!({"intermediate_size": FFN, "num_key_value_heads": GROUPS}) };
    for part in [&widths, own] {
        json.as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
    }
    let config = Config::from_json(&json.to_string(), Path::new("config.json")).unwrap();
    save(&tensors(&config, seed), directory.join("model.safetensors")).unwrap();
    std::fs::write(directory.join("config.json"), json.to_string()).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(root().join("models/tiny").join(file), directory.join(file)).unwrap();
    }
}

/// The same, opened.
pub fn model(own: &Value, directory: &Path) -> Checkpoint {
    write(own, 7, directory);
    Checkpoint::open(directory).unwrap()
}

/// A pattern from (key/value groups, channels) a layer.
pub fn pattern<const N: usize>(parent: &Config, genes: [(usize, usize); N]) -> Pattern {
    Pattern::new(genes.iter().map(|(kv_groups, ffn)| Gene { kv_groups: *kv_groups, ffn: *ffn }).collect(), parent).unwrap()
}

pub fn decoder(checkpoint: &Checkpoint) -> Decoder {
    checkpoint.decoder(&Device::Cpu, DType::F32).unwrap_or_else(|e| panic!("{e}"))
}

/// Logits of a few tokens, and of more than a window in the tests.
pub fn logits(decoder: &Decoder) -> Vec<Vec<f32>> {
    let tokens: Vec<u32> = (0..40).map(|i| (i * 97 + 5) % 4096).collect();
    let batch = decoder.batch(&[Span::prompt(tokens.len())]).unwrap();
    let rows = decoder.logits(&decoder.forward(&tokens, &batch, &mut NoCache).unwrap()).unwrap().to_vec2::<f32>().unwrap();
    assert!(rows.iter().flatten().all(|v| v.is_finite()));
    rows
}

/// The root mean square of two sets of logits' differences, as a part of the first's own.
pub fn difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
    let (a, b) = (a.concat(), b.concat());
    (squares(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / squares(&mut a.iter().copied())).sqrt()
}

fn tensors(config: &Config, seed: u64) -> HashMap<String, Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut tensors = HashMap::new();
    let mut uniform = |name: &str, shape: &[usize], centre: f32, spread: f32| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| centre + rng.random_range(-spread..spread)).collect();
        tensors.insert(name.to_string(), Tensor::from_vec(values, shape, &Device::Cpu).unwrap());
    };
    let names = TensorNames::of(config.architecture);
    let (hidden, d) = (config.hidden_size, config.head_dim);
    uniform(names.embedding(), &[config.vocab_size, hidden], 0.0, 1.0);
    if let Positions::Learned { offset } = config.positions {
        uniform(names.positions(), &[config.max_position_embeddings + offset, hidden], 0.0, 0.5);
    }
    if !config.tie_word_embeddings {
        uniform(names.head(), &[config.vocab_size, hidden], 0.0, 0.2);
    }
    let mut norms = vec![names.final_norm().to_string()];
    for (l, layer) in config.layers.iter().enumerate() {
        let (q, kv, ffn) = (layer.shape.kv_groups * layer.shape.group_size * d, layer.shape.kv_groups * d, layer.shape.ffn);
        norms.extend([names.attention_norm(l), names.mlp_norm(l)]);
        let mut linears = vec![
            (names.q(l), q, hidden, config.qkv_bias),
            (names.k(l), kv, hidden, config.qkv_bias),
            (names.v(l), kv, hidden, config.qkv_bias),
            (names.o(l), hidden, q, config.output_bias),
            (names.up(l), ffn, hidden, config.mlp_bias),
            (names.down(l), hidden, ffn, config.mlp_bias),
        ];
        if config.gated_mlp {
            linears.push((names.gate(l), ffn, hidden, config.mlp_bias));
        }
        for (name, out, input, bias) in linears {
            uniform(&name, &[out, input], 0.0, 2.0 / (input as f32).sqrt());
            if bias {
                uniform(&bias_of(&name), &[out], 0.0, 0.3);
            }
        }
        if config.qk_norm {
            uniform(&names.q_norm(l), &[d], 1.0, 0.5);
            uniform(&names.k_norm(l), &[d], 1.0, 0.5);
        }
    }
    for norm in norms {
        uniform(&norm, &[hidden], 1.0, 0.5);
        if config.norm == (NormKind::Layer { affine: true }) {
            uniform(&bias_of(&norm), &[hidden], 0.0, 0.3);
        }
    }
    tensors
}
