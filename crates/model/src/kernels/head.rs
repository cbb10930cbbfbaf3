//! Log-probabilities of some tokens. By instructions for bf16 the head's product, its normaliser and the choice are one pass: the logits, which would be as large
//! as a hundred layers' activations, never leave the cache.

use super::elementwise::exp_sum;
use super::with_slice;
use crate::{Linear, Result};
use candle_core::{DType, Tensor};
use rayon::prelude::*;

/// Logits whose exponentials are added up in f32; these sums are added in f64, since a vocabulary has too many terms for an f32 sum.
const BLOCK: usize = 512;
/// Logits held at once where they are held, in elements (32 MB of f32).
const LOGITS_ELEMENTS: usize = 8 << 20;
/// The same where they don't pass through the processor's caches (512 MB).
const LOGITS_ELEMENTS_ON_DEVICE: usize = 128 << 20;

/// Natural logarithms of the probabilities of `ids` at every row of x [rows, hidden] under a head [vocab, hidden]: as many ids of each row, to as many
/// numbers.
pub(crate) fn log_probabilities(x: &Tensor, head: &Linear, ids: &[u32]) -> Result<Vec<f32>> {
    let (rows, vocab, k) = (x.dim(0)?, head.outputs(), head.inputs());
    let of_row = ids.len().checked_div(rows).unwrap_or(0);
    if of_row * rows != ids.len() || ids.iter().any(|id| *id as usize >= vocab) {
        return Err(crate::Error::Input(format!("{} token ids below {vocab} for {rows} rows: expected as many of each row", ids.len())));
    }
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if let Some(weights) = head.bf16()
        && let Some(unit) = super::bf16_blocks::Unit::best()
    {
        return with_slice(x, |x| blocks::log_probabilities(unit, x, &weights, rows, k, ids));
    }
    let at_once = (if x.device().is_cpu() { LOGITS_ELEMENTS } else { LOGITS_ELEMENTS_ON_DEVICE } / vocab).max(1);
    let mut found = Vec::with_capacity(ids.len());
    for start in (0..rows).step_by(at_once) {
        let count = at_once.min(rows - start);
        found.extend(of_logits(&head.forward(&x.narrow(0, start, count)?)?.to_dtype(DType::F32)?, &ids[start * of_row..(start + count) * of_row])?);
    }
    Ok(found)
}

/// Natural logarithms of the probabilities of `ids`, as many of each row, under logits [rows, vocab] in f32. Computed where the logits are: only
/// what was asked for leaves the device.
///
/// # Errors
/// [`crate::Error::Candle`] when the device fails.
pub fn of_logits(logits: &Tensor, ids: &[u32]) -> Result<Vec<f32>> {
    let (rows, vocab) = logits.dims2()?;
    let of_row = ids.len() / rows;
    if logits.device().is_cpu() {
        return with_slice(logits, |logits| {
            let find = |(row, ids): (&[f32], &[u32])| -> Vec<f32> {
                let normaliser = log_sum_exp(row);
                ids.iter().map(|id| row[*id as usize] - normaliser).collect()
            };
            logits.par_chunks(vocab).zip(ids.par_chunks(of_row)).flat_map_iter(find).collect()
        });
    }
    let ids = Tensor::from_slice(ids, (rows, of_row), logits.device())?;
    let normaliser = logits.log_sum_exp(1)?.unsqueeze(1)?;
    Ok(logits.gather(&ids, 1)?.broadcast_sub(&normaliser)?.flatten_all()?.to_vec1()?)
}

/// ln(sum(exp(row))), exact to f32, its order of sums fixed by the row's length.
pub(crate) fn log_sum_exp(row: &[f32]) -> f32 {
    together(row.chunks(BLOCK).map(exp_sum))
}

/// ln(sum(exp)) of blocks of which the largest element and the sum of exp(element - largest) are known.
fn together(parts: impl Iterator<Item = (f32, f32)> + Clone) -> f32 {
    let max = parts.clone().fold(f32::NEG_INFINITY, |max, part| max.max(part.0));
    let sum: f64 = parts.map(|(own, sum)| f64::from(sum) * f64::from(own - max).exp()).sum();
    (f64::from(max) + sum.ln()) as f32
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod blocks {
    use super::super::bf16_blocks::{Activations, BLOCK as SIDE, Unit};
    use super::super::packed::{GROUP, Weights};
    use super::super::{SharedOut, elementwise::exp_sum, team};
    use super::{BLOCK, together};
    use rayon::prelude::*;

    /// As [`super::log_probabilities`], x [rows, k].
    pub(super) fn log_probabilities(unit: Unit, x: &[f32], weights: &Weights<'_>, rows: usize, k: usize, ids: &[u32]) -> Vec<f32> {
        let vocab = weights.rows;
        let (of_row, blocks) = (ids.len() / rows, vocab.div_ceil(BLOCK));
        // each row's ids in order, with their places: a block finds its own side by side
        let mut sorted: Vec<(u32, u32)> = ids.iter().zip(0..).map(|(id, place)| (*id, place)).collect();
        sorted.par_chunks_mut(of_row).for_each(<[_]>::sort_unstable);
        let x = Activations::new(x, rows, k);
        let (mut found, mut parts) = (vec![0f32; ids.len()], vec![[0f32; 2]; rows * blocks]);
        let (to_found, to_parts) = (SharedOut(found.as_mut_ptr()), SharedOut(parts.as_mut_ptr().cast()));
        team::for_each(blocks, |block| {
            let (from, to) = (block * BLOCK, vocab.min((block + 1) * BLOCK));
            let mut logits = vec![0f32; SIDE * BLOCK];
            let prepared = unit.prepare();
            for token in (0..rows).step_by(SIDE) {
                let tokens = (rows - token).min(SIDE);
                for first in (0..to - from).step_by(SIDE) {
                    let outputs = (to - from - first).min(SIDE);
                    // SAFETY: 32 rows of `logits`
                    unsafe { prepared.multiply(&x, token, weights, (from + first) / GROUP, outputs, logits.as_mut_ptr().add(first), BLOCK) };
                }
                for row in token..token + tokens {
                    let logits = &logits[(row - token) * BLOCK..][..to - from];
                    let (max, sum) = exp_sum(logits);
                    let own = &sorted[row * of_row..(row + 1) * of_row];
                    let own = &own[own.partition_point(|id| (id.0 as usize) < from)..own.partition_point(|id| (id.0 as usize) < to)];
                    // SAFETY: a part is of one row and one block, a place of one id: no other task writes there
                    unsafe {
                        to_parts.get().add(2 * (row * blocks + block)).cast::<[f32; 2]>().write([max, sum]);
                        own.iter().for_each(|(id, place)| to_found.get().add(*place as usize).write(logits[*id as usize - from]));
                    }
                }
            }
        });
        found.par_chunks_mut(of_row).zip(parts.par_chunks(blocks)).for_each(|(found, parts)| {
            let normaliser = together(parts.iter().map(|[max, sum]| (*max, *sum)));
            found.iter_mut().for_each(|logit| *logit -= normaliser);
        });
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn log_probabilities_are_those_of_the_whole_row_with_and_without_logits() {
        for (rows, vocab, k) in [(1, 700, 64), (70, 1500, 64), (33, 512, 96), (3, 40, 33)] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let x = Tensor::randn(0f32, 1.0, (rows, k), &Device::Cpu).unwrap();
                let w = Tensor::randn(0f32, 1.0, (vocab, k + 32), &Device::Cpu).unwrap();
                let ids: Vec<u32> = (0..rows * 5).map(|i| (i * 7919 % vocab) as u32).collect();
                let head = Linear::new(w, None).unwrap().held_in(crate::Held::Plain(dtype)).unwrap().narrow_in(k).unwrap();
                let found = log_probabilities(&x, &head, &ids).unwrap();
                let logits = head.forward(&x).unwrap();
                // bits: the fused pass adds the same numbers in the same order
                assert_eq!(found, of_logits(&logits, &ids).unwrap());
                let exact = candle_nn::ops::log_softmax(&logits.to_dtype(DType::F64).unwrap(), 1).unwrap().to_vec2::<f64>().unwrap();
                for (i, found) in found.iter().enumerate() {
                    let exact = exact[i / 5][ids[i] as usize];
                    assert!((f64::from(*found) - exact).abs() < 1e-5 * exact.abs().max(1.0), "{found} {exact}");
                }
            }
        }
        let x = Tensor::zeros((2, 4), DType::F32, &Device::Cpu).unwrap();
        let head = Linear::new(x.clone(), None).unwrap();
        assert!(log_probabilities(&x, &head, &[0, 1, 1]).is_err(), "three ids for two rows");
        assert!(log_probabilities(&x, &head, &[0, 2]).is_err(), "no such id");
    }
}
