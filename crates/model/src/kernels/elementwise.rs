//! exp without libm, and what is built on it: softmax rows and silu(gate) * up.

use super::{SharedOut, filled, with_slice};
use crate::Result;
use candle_core::Tensor;
use rayon::prelude::*;

/// e^x by Cody-Waite reduction and a degree-6 polynomial: within 2 ulp on [-87, 88], 0 below, and it vectorises.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    /// 1.5 * 2^23: a number added to it is rounded to an integer, which then lies in the lowest bits.
    const ROUNDER: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.3, 88.0);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUNDER);
    let n = shifted - ROUNDER;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, clamped));
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p.mul_add(r, c);
    }
    let y = (p * r).mul_add(r, r) + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.3 { 0.0 } else { y * scale }
}

/// Sums and maxima run in this many lanes from the row's start, whatever the row's length and the registers' width.
const LANES: usize = 16;

/// Runs a body compiled for the widest registers that the processor has.
macro_rules! widest {
    ($name:ident, $body:ident, ($($arg:ident: $type:ty),*) $(-> $out:ty)?) => {
        pub(crate) fn $name($($arg: $type),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
                fn avx512($($arg: $type),*) $(-> $out)? {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $type),*) $(-> $out)? {
                    $body($($arg),*)
                }
                if super::dot::has_avx512() {
                    // SAFETY: the features were just checked
                    return unsafe { avx512($($arg),*) };
                }
                if super::dot::has_avx2() {
                    // SAFETY: the features were just checked
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}

// Replaces scores by their softmax.
widest!(softmax, softmax_body, (row: &mut [f32]));
// ln(sum(exp(row))): f32 lanes within blocks of 1,024, the blocks added in f64, since a vocabulary has too many terms for an f32 sum.
widest!(log_sum_exp, log_sum_exp_body, (row: &[f32]) -> f32);
// silu(gate) * up.
widest!(silu_mul_chunk, silu_mul_body, (gate: &[f32], up: &[f32], out: &mut [f32]));

/// The lanes added as a fixed tree.
#[inline(always)]
fn total(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

#[inline(always)]
fn softmax_body(row: &mut [f32]) {
    let max = maximum(row);
    let mut lanes = [0f32; LANES];
    let mut chunks = row.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for lane in 0..LANES {
            chunk[lane] = exp(chunk[lane] - max);
            lanes[lane] += chunk[lane];
        }
    }
    let mut sum = total(lanes);
    for v in chunks.into_remainder() {
        *v = exp(*v - max);
        sum += *v;
    }
    let inverse = 1.0 / sum;
    for v in row.iter_mut() {
        *v *= inverse;
    }
}

#[inline(always)]
fn log_sum_exp_body(row: &[f32]) -> f32 {
    let max = maximum(row);
    let mut sum = 0f64;
    for block in row.chunks(1024) {
        let mut lanes = [0f32; LANES];
        let chunks = block.chunks_exact(LANES);
        let rest: f32 = chunks.remainder().iter().map(|v| exp(*v - max)).sum();
        for chunk in chunks {
            for lane in 0..LANES {
                lanes[lane] += exp(chunk[lane] - max);
            }
        }
        sum += f64::from(rest + total(lanes));
    }
    (f64::from(max) + sum.ln()) as f32
}

/// The largest element; NaN only if all are.
#[inline(always)]
fn maximum(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder().iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    lanes.iter().fold(rest, |m, v| m.max(*v))
}

/// silu(gate) * up on the CPU, one pass; both [rows, ffn].
pub(crate) fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let out = filled(gate.elem_count(), |out| with_slice(gate, |gate| with_slice(up, |up| silu_mul_slices(gate, up, out)))?)?;
    Ok(Tensor::from_vec(out, gate.shape(), gate.device())?)
}

fn silu_mul_slices(gate: &[f32], up: &[f32], out: &mut [f32]) {
    const CHUNK: usize = 8 * 1024;
    let target = SharedOut(out.as_mut_ptr());
    let task = |start: usize| {
        let end = gate.len().min(start + CHUNK);
        // SAFETY: chunks don't overlap
        let out = unsafe { std::slice::from_raw_parts_mut(target.get().add(start), end - start) };
        silu_mul_chunk(&gate[start..end], &up[start..end], out);
    };
    if gate.len() <= CHUNK {
        return task(0);
    }
    (0..gate.len().div_ceil(CHUNK)).into_par_iter().for_each(|i| task(i * CHUNK));
}

#[inline(always)]
fn silu_mul_body(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((g, u), o) in gate.iter().zip(up).zip(out) {
        *o = g / (1.0 + exp(-g)) * u;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_a_few_ulp() {
        let mut x = -87.0f32;
        while x < 87.0 {
            let exact = f64::from(x).exp();
            assert!(((f64::from(exp(x)) - exact) / exact).abs() < 3e-7, "exp({x})");
            x += 0.0137;
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn softmax_sums_to_one_and_equals_the_plain_one() {
        for n in [1, 7, 8, 33] {
            let scores: Vec<f32> = (0..n).map(|i| ((i * 37) % 11) as f32 - 5.0).collect();
            let mut row = scores.clone();
            softmax(&mut row);
            let total: f64 = scores.iter().map(|s| f64::from(*s).exp()).sum();
            for (s, p) in scores.iter().zip(&row) {
                assert!((f64::from(*s).exp() / total - f64::from(*p)).abs() < 1e-6);
            }
        }
    }
}
