//! A model of random weights, to measure how fast a shape runs without having one.

use crate::config::Config;
use crate::source::{RawTensor, Source, TensorNames};
use crate::{Error, Result};
use candle_core::DType;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// The largest magnitude of a weight.
const LARGEST: f32 = 0.03;

/// A [`Source`] of random matrices, and norms of ones, in the shapes of a config. The same every time.
#[derive(Debug)]
pub struct RandomSource {
    shapes: BTreeMap<String, Vec<usize>>,
}

impl RandomSource {
    /// The tensors of a family with gated MLPs, without biases.
    pub fn new(config: &Config) -> Self {
        let names = TensorNames::of(config.architecture);
        let (hidden, vocab, d) = (config.hidden_size, config.vocab_size, config.head_dim);
        let mut shapes = BTreeMap::from([(names.embedding().to_string(), vec![vocab, hidden]), (names.final_norm().to_string(), vec![hidden])]);
        if !config.tie_word_embeddings {
            shapes.insert(names.head().to_string(), vec![vocab, hidden]);
        }
        for (l, layer) in config.layers.iter().enumerate() {
            let (heads, groups, ffn) = (layer.shape.kv_groups * layer.shape.group_size * d, layer.shape.kv_groups * d, layer.shape.ffn);
            shapes.extend([
                (names.attention_norm(l), vec![hidden]),
                (names.q(l), vec![heads, hidden]),
                (names.k(l), vec![groups, hidden]),
                (names.v(l), vec![groups, hidden]),
                (names.o(l), vec![hidden, heads]),
                (names.mlp_norm(l), vec![hidden]),
                (names.gate(l), vec![ffn, hidden]),
                (names.up(l), vec![ffn, hidden]),
                (names.down(l), vec![hidden, ffn]),
            ]);
        }
        Self { shapes }
    }
}

impl Source for RandomSource {
    fn names(&self) -> Vec<String> {
        self.shapes.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.get(name).cloned()
    }

    fn raw(&self, name: &str) -> Result<RawTensor<'_>> {
        let shape = self.shape(name).ok_or_else(|| self.mismatch(name, "a tensor", "nothing: the shape has none of this name"))?;
        let seed = name.bytes().fold(0u64, |seed, byte| mixed(seed ^ u64::from(byte)));
        let value = |i: usize| {
            if shape.len() == 1 {
                return 1f32;
            }
            // 24 random bits as a number in [-1, 1)
            ((mixed(seed.wrapping_add(i as u64)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * LARGEST
        };
        let mut bytes = vec![0; 4 * shape.iter().product::<usize>()];
        bytes.par_chunks_exact_mut(4).enumerate().for_each(|(i, to)| to.copy_from_slice(&value(i).to_le_bytes()));
        Ok(RawTensor { dtype: DType::F32, shape, bytes: bytes.into() })
    }

    fn mismatch(&self, name: &str, expected: &str, found: &str) -> Error {
        Error::Tensor { path: "random weights".into(), tensor: name.into(), expected: expected.into(), found: found.into() }
    }
}

/// SplitMix64's mixing of a number (Steele, Lea and Flood 2014).
fn mixed(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
