//! What unit tests share.

use evop_model::{Checkpoint, DType, Decoder, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::Normal;
use std::path::Path;

/// The bundled model.
pub(crate) fn tiny() -> Decoder {
    Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny")).unwrap().decoder(&Device::Cpu, DType::F32).unwrap()
}

/// Normally distributed numbers, the same every time: candle can't seed its own on the CPU.
pub(crate) fn normal(seed: u64, mean: f32, deviation: f32, shape: (usize, usize)) -> Tensor {
    let numbers = ChaCha8Rng::seed_from_u64(seed).sample_iter(Normal::new(mean, deviation).unwrap()).take(shape.0 * shape.1).collect::<Vec<_>>();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}
