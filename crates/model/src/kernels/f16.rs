//! Products with f16 weights. Weights are widened in registers, activations stay f32, products are added up in f32, input after input: a result has
//! the same bits on every kernel, for one token and for many.
//!
//! For one token this is as fast as memory gives the weights. Many tokens share a widened weight, twelve at a time, so that the multiply-adds are the bound, as
//! in f32. Tiles of bf16 would need an f16 weight and an activation in two and three parts to be as exact, which is most of what they would gain.

use super::packed::{GROUP, Line, Product, STEP, ask, each_groups};
use half::f16;
use rayon::prelude::*;
use std::ops::Range;

/// Cache lines of a group's step: two inputs each.
pub(super) const LINES: usize = STEP / 2;

/// As [`super::bf16::lay_out`].
pub(crate) fn lay_out(rows: usize, columns: usize, read: impl Fn(usize, &mut [f32]) + Sync) -> Vec<Line> {
    let steps = columns.div_ceil(STEP);
    let mut lines = vec![Line([0; 64]); rows.div_ceil(GROUP) * steps * LINES];
    lines.par_chunks_mut((steps * LINES).max(1)).enumerate().for_each(|(group, lines)| {
        let mut values = vec![0.0; columns];
        for row in 0..GROUP.min(rows - group * GROUP) {
            read((group * GROUP + row) * columns, &mut values);
            for (column, value) in values.iter().enumerate() {
                lines[column / 2].0[place(row, column)..][..2].copy_from_slice(&f16::from_f32(*value).to_le_bytes());
            }
        }
    });
    lines
}

/// Where a weight lies in its line.
fn place(row: usize, column: usize) -> usize {
    column % 2 * 2 * GROUP + 2 * row
}

/// A weight of a group's step.
pub(super) fn at(lines: &[Line], row: usize, column: usize) -> f32 {
    let bytes = &lines[column / 2].0[place(row, column)..];
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// As [`super::packed::multiply`].
pub(super) fn multiply(x: &[f32], tokens: usize, k: usize, products: &[Product<'_>]) {
    let kernel = Kernel::best();
    each_groups(products, tokens, k, |product, groups| kernel.run(x, tokens, k, product, groups));
}

/// Ways to compute the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Kernel {
    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("f16c") && super::dot::has_avx2() {
            return if super::dot::has_avx512() { Self::Avx512 } else { Self::Avx2 };
        }
        Self::Plain
    }

    fn run(self, x: &[f32], tokens: usize, k: usize, product: &Product<'_>, groups: Range<usize>) {
        assert!(x.len() >= tokens * k && k <= product.weights.row_steps * STEP, "whole rows");
        match self {
            Self::Plain => plain(x, tokens, k, product, groups),
            // SAFETY: `best` has found the features; whole rows
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::groups(x, tokens, k, product, groups) },
            // SAFETY: as above
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::groups(x, tokens, k, product, groups) },
        }
    }
}

fn plain(x: &[f32], tokens: usize, k: usize, product: &Product<'_>, groups: Range<usize>) {
    for group in groups {
        for token in 0..tokens {
            let mut results = [0f32; GROUP];
            for (input, x) in x[token * k..][..k].iter().enumerate() {
                let lines = product.weights.step(group, input / STEP);
                for (row, result) in results.iter_mut().enumerate() {
                    *result = at(lines, row, input % STEP).mul_add(*x, *result);
                }
            }
            product.write(token, group, &results);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{GROUP, Product};
    use std::arch::x86_64::*;
    use std::ops::Range;

    /// # Safety
    /// The processor must have these features; x must be `tokens` rows of `k`, the weights at least as wide.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn groups(x: &[f32], tokens: usize, k: usize, product: &Product<'_>, groups: Range<usize>) {
        for group in groups {
            let mut token = 0;
            // SAFETY: as this function's
            unsafe {
                while token + 4 <= tokens {
                    some::<4>(x, token, k, product, group);
                    token += 4;
                }
                while token < tokens {
                    some::<1>(x, token, k, product, group);
                    token += 1;
                }
            }
        }
    }

    /// A group's rows for T tokens.
    ///
    /// # Safety
    /// As [`groups`].
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn some<const T: usize>(x: &[f32], token: usize, k: usize, product: &Product<'_>, group: usize) {
        let lines = product.weights.step(group, 0).as_ptr().cast::<__m128i>();
        let x = x[token * k..(token + T) * k].as_ptr();
        let mut totals = [[_mm256_setzero_ps(); 2]; T];
        for input in 0..k {
            // SAFETY: an input's sixteen weights are 32 bytes; T rows of x
            unsafe {
                let weights = [0, 1].map(|half| _mm256_cvtph_ps(_mm_load_si128(lines.add(2 * input + half))));
                for (t, total) in totals.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*x.add(t * k + input));
                    for half in 0..2 {
                        total[half] = _mm256_fmadd_ps(weights[half], x, total[half]);
                    }
                }
            }
        }
        for (t, total) in totals.into_iter().enumerate() {
            let mut results = [0f32; GROUP];
            // SAFETY: sixteen elements
            unsafe {
                _mm256_storeu_ps(results.as_mut_ptr(), total[0]);
                _mm256_storeu_ps(results.as_mut_ptr().add(8), total[1]);
            }
            product.write(token + t, group, &results);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{GROUP, LINES, Line, Product, ask};
    use std::arch::x86_64::*;
    use std::ops::Range;

    /// Tokens that share widened weights: 12 x 2 sums and two operands in 32 registers.
    const TOGETHER: usize = 12;

    /// # Safety
    /// The processor must have these features; x must be `tokens` rows of `k`, the weights at least as wide.
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]
    pub unsafe fn groups(x: &[f32], tokens: usize, k: usize, product: &Product<'_>, groups: Range<usize>) {
        for token in (0..tokens).step_by(TOGETHER) {
            let count = TOGETHER.min(tokens - token);
            let mut group = groups.start;
            while group < groups.end {
                // SAFETY: as this function's; the groups are there
                unsafe {
                    if group + 2 <= groups.end {
                        tile::<2>(x, token, count, k, product, group);
                    } else {
                        tile::<1>(x, token, count, k, product, group);
                    }
                }
                group += 2;
            }
        }
    }

    /// # Safety
    /// As [`groups`].
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]
    unsafe fn tile<const G: usize>(x: &[f32], token: usize, count: usize, k: usize, product: &Product<'_>, group: usize) {
        // SAFETY: as this function's
        unsafe {
            if count == TOGETHER {
                return some::<TOGETHER, G>(x, token, k, product, group);
            }
            let (mut token, end) = (token, token + count);
            while token + 4 <= end {
                some::<4, G>(x, token, k, product, group);
                token += 4;
            }
            if token + 2 <= end {
                some::<2, G>(x, token, k, product, group);
                token += 2;
            }
            if token < end {
                some::<1, G>(x, token, k, product, group);
            }
        }
    }

    /// The rows of G groups for T tokens.
    ///
    /// # Safety
    /// As [`groups`].
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]
    unsafe fn some<const T: usize, const G: usize>(x: &[f32], token: usize, k: usize, product: &Product<'_>, group: usize) {
        let lines: [*const __m256i; G] = std::array::from_fn(|g| product.weights.step(group + g, 0).as_ptr().cast());
        let x = x[token * k..(token + T) * k].as_ptr();
        let mut totals = [[_mm512_setzero_ps(); G]; T];
        for input in 0..k {
            // SAFETY: an input's sixteen weights are 32 bytes; T rows of x
            unsafe {
                if input.is_multiple_of(2) {
                    lines.iter().for_each(|lines| ask(lines.wrapping_add(input).cast::<Line>().wrapping_add(LINES)));
                }
                let weights: [__m512; G] = std::array::from_fn(|g| _mm512_cvtph_ps(_mm256_load_si256(lines[g].add(input))));
                for (t, total) in totals.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*x.add(t * k + input));
                    for g in 0..G {
                        total[g] = _mm512_fmadd_ps(weights[g], x, total[g]);
                    }
                }
            }
        }
        for (t, total) in totals.into_iter().enumerate() {
            for (g, total) in total.into_iter().enumerate() {
                let mut results = [0f32; GROUP];
                // SAFETY: sixteen elements
                unsafe { _mm512_storeu_ps(results.as_mut_ptr(), total) };
                product.write(token + t, group + g, &results);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::packed::{Format, Weights};
    use super::super::{SharedOut, unfilled};
    use super::*;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| (((i + seed) * 7919 + 13) % 2_003) as f32 / 1_001.0 - 1.0).collect()
    }

    fn of(w: &[f16]) -> impl Fn(usize, &mut [f32]) + Sync {
        |from, to| to.iter_mut().zip(&w[from..]).for_each(|(to, w)| *to = w.to_f32())
    }

    #[test]
    fn every_kernel_gives_the_same_bits_near_the_exact_product_of_f16_weights() {
        for (tokens, rows, k) in [(1, 7, 32), (5, 40, 64), (33, 100, 96), (70, 64, 576), (16, 33, 50), (3, 5, 33), (13, 80, 64)] {
            let w: Vec<f16> = numbers(rows * k, 3).into_iter().map(f16::from_f32).collect();
            let x = numbers(tokens * k, 40);
            let lines = lay_out(rows, k, of(&w));
            let weights = Weights { format: Format::F16, lines: &lines, scales: &[], parts: &[], row_steps: k.div_ceil(STEP), rows };
            let by = |kernel: Kernel| {
                let mut y = unfilled(tokens * rows);
                kernel.run(&x, tokens, k, &Product { weights, y: SharedOut(y.as_mut_ptr()) }, 0..rows.div_ceil(GROUP));
                y
            };
            let found = by(Kernel::Plain);
            for token in 0..tokens {
                for row in 0..rows {
                    let exact: f64 = (0..k).map(|i| f64::from(w[row * k + i].to_f32()) * f64::from(x[token * k + i])).sum();
                    // (f32 sums of numbers below 1: nothing is lost of weights or activations)
                    assert!((f64::from(found[token * rows + row]) - exact).abs() < 1e-6 * (k as f64), "{tokens} x {rows} x {k}");
                }
            }
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("f16c") && super::super::dot::has_avx2() {
                assert_eq!(by(Kernel::Avx2), found);
                if super::super::dot::has_avx512() {
                    assert_eq!(by(Kernel::Avx512), found);
                }
            }
            let mut y = unfilled(tokens * rows);
            multiply(&x, tokens, k, &[Product { weights, y: SharedOut(y.as_mut_ptr()) }]);
            assert_eq!(y, found);
            assert_eq!(weights.at(rows - 1, k - 1), w[rows * k - 1].to_f32());
        }
    }

    #[test]
    fn the_first_columns_are_a_matrix_of_their_own() {
        let (rows, k, narrow, tokens) = (20, 96, 41, 3);
        let w: Vec<f16> = numbers(rows * k, 1).into_iter().map(f16::from_f32).collect();
        let cut: Vec<f16> = w.chunks(k).flat_map(|row| row[..narrow].to_vec()).collect();
        let x = numbers(tokens * narrow, 5);
        let by = |lines: &[Line], row_steps: usize| {
            let weights = Weights { format: Format::F16, lines, scales: &[], parts: &[], row_steps, rows };
            let mut y = unfilled(tokens * rows);
            multiply(&x, tokens, narrow, &[Product { weights, y: SharedOut(y.as_mut_ptr()) }]);
            y
        };
        assert_eq!(by(&lay_out(rows, k, of(&w)), 3), by(&lay_out(rows, narrow, of(&cut)), 2));
    }
}
