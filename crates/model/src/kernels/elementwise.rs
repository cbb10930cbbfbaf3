//! What happens to activations between the products: norms, rotations, sums, and exp without libm with what is built on it.

use super::{filled, team, with_slice};
use crate::Result;
use candle_core::Tensor;

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
                if crate::kernels::dot::has_avx512() {
                    // SAFETY: the features were just checked
                    return unsafe { avx512($($arg),*) };
                }
                if crate::kernels::dot::has_avx2() {
                    // SAFETY: the features were just checked
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}

pub(crate) use widest;

// Replaces scores by their softmax.
widest!(softmax, softmax_body, (row: &mut [f32]));
// The largest element and the sum of exp(element - largest).
widest!(exp_sum, exp_sum_body, (row: &[f32]) -> (f32, f32));
// row / sqrt(mean(row^2) + eps) * weight.
widest!(rms_norm_row, rms_norm_body, (row: &[f32], weight: &[f32], eps: f32, out: &mut [f32]));
// A head's halves (a, b) turned by the angles: (a cos - b sin, a sin + b cos).
widest!(rotate_head, rotate_body, (head: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]));
// a + b.
widest!(add_chunk, add_body, (a: &[f32], b: &[f32], out: &mut [f32]));
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
fn exp_sum_body(row: &[f32]) -> (f32, f32) {
    let max = maximum(row);
    let mut lanes = [0f32; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|v| exp(*v - max)).sum();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += exp(chunk[lane] - max);
        }
    }
    (max, rest + total(lanes))
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

/// Elements of a task: a few tasks fill a core's first-level cache.
const CHUNK: usize = 8 * 1024;

/// Writes `len` elements in parts of whole `unit`s, several at a time where there are many: `part(first, out)` writes those from `first` on.
fn in_parts(len: usize, unit: usize, part: impl Fn(usize, &mut [f32]) + Sync) -> Result<Vec<f32>> {
    filled(len, |out| {
        let chunk = (CHUNK / unit.max(1)).max(1) * unit.max(1);
        if len <= 2 * chunk {
            part(0, out);
        } else {
            team::for_each_part(out, chunk, |i, out| part(i * chunk, out));
        }
        Ok(())
    })
}

/// silu(gate) * up on the CPU, one pass; both [rows, ffn].
pub(crate) fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let out = with_slice(gate, |gate| {
        with_slice(up, |up| in_parts(gate.len(), 1, |first, out| silu_mul_chunk(&gate[first..][..out.len()], &up[first..][..out.len()], out)))
    })???;
    Ok(Tensor::from_vec(out, gate.shape(), gate.device())?)
}

/// a + b on the CPU, of one shape.
pub(crate) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let out = with_slice(a, |a| with_slice(b, |b| in_parts(a.len(), 1, |first, out| add_chunk(&a[first..][..out.len()], &b[first..][..out.len()], out))))???;
    Ok(Tensor::from_vec(out, a.shape(), a.device())?)
}

/// x / sqrt(mean(x^2) + eps) * weight over the last dimension, on the CPU.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let out = with_slice(x, |x| {
        with_slice(weight, |weight| {
            let width = weight.len();
            in_parts(x.len(), width, |first, out| {
                x[first..][..out.len()].chunks(width).zip(out.chunks_mut(width)).for_each(|(row, out)| rms_norm_row(row, weight, eps, out));
            })
        })
    })???;
    Ok(Tensor::from_vec(out, x.shape(), x.device())?)
}

/// Rotary position embedding of x [tokens, heads, d] on the CPU; cos and sin [1, tokens, d / 2].
pub(crate) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (_, heads, d) = x.dims3()?;
    let (row, half) = (heads * d, d / 2);
    let out = with_slice(x, |x| {
        with_slice(cos, |cos| {
            with_slice(sin, |sin| {
                in_parts(x.len(), row, |first, out| {
                    for (i, (heads, out)) in x[first..][..out.len()].chunks(row).zip(out.chunks_mut(row)).enumerate() {
                        let angles = (first / row + i) * half;
                        let (cos, sin) = (&cos[angles..angles + half], &sin[angles..angles + half]);
                        heads.chunks(d).zip(out.chunks_mut(d)).for_each(|(head, out)| rotate_head(head, cos, sin, out));
                    }
                })
            })
        })
    })????;
    Ok(Tensor::from_vec(out, x.shape(), x.device())?)
}

#[inline(always)]
fn silu_mul_body(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((g, u), o) in gate.iter().zip(up).zip(out) {
        *o = g / (1.0 + exp(-g)) * u;
    }
}

#[inline(always)]
fn add_body(a: &[f32], b: &[f32], out: &mut [f32]) {
    for ((a, b), o) in a.iter().zip(b).zip(out) {
        *o = a + b;
    }
}

#[inline(always)]
fn rms_norm_body(row: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mut lanes = [0f32; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|v| v * v).sum();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = chunk[lane].mul_add(chunk[lane], lanes[lane]);
        }
    }
    let scale = ((rest + total(lanes)) / row.len() as f32 + eps).sqrt().recip();
    for ((v, w), o) in row.iter().zip(weight).zip(out) {
        *o = v * scale * w;
    }
}

#[inline(always)]
fn rotate_body(head: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
    let (a, b) = head.split_at(cos.len());
    let (out_a, out_b) = out.split_at_mut(cos.len());
    for i in 0..cos.len() {
        out_a[i] = a[i] * cos[i] - b[i] * sin[i];
        out_b[i] = a[i] * sin[i] + b[i] * cos[i];
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
    fn norm_rotation_and_sum_equal_the_tensor_library_s() {
        use candle_core::Device;
        let near = |a: &Tensor, b: &Tensor| {
            let (a, b) = (a.flatten_all().unwrap().to_vec1::<f32>().unwrap(), b.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            assert!(a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5 * b.abs().max(1.0)));
        };
        for (tokens, heads, d) in [(1, 1, 2), (3, 2, 10), (300, 9, 64)] {
            let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
            let (x, y) = (random(&[tokens, heads * d]), random(&[tokens, heads * d]));
            let weight = random(&[heads * d]);
            near(&rms_norm(&x, &weight, 1e-5).unwrap(), &candle_nn::ops::rms_norm(&x, &weight, 1e-5).unwrap());
            near(&add(&x, &y).unwrap(), &(&x + &y).unwrap());
            let (cos, sin) = (random(&[1, tokens, d / 2]), random(&[1, tokens, d / 2]));
            let x = x.reshape((tokens, heads, d)).unwrap();
            let theirs = candle_nn::rotary_emb::rope_thd(&x.unsqueeze(0).unwrap(), &cos, &sin).unwrap();
            near(&rotate(&x, &cos, &sin).unwrap(), &theirs);
        }
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
