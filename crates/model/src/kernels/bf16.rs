//! Products with bf16 weights: activations are rounded to bf16 too, products added up in f32. By instructions for bf16 where the processor has them
//! ([`super::bf16_blocks`]), else by vectors over widened numbers; they differ in the order of a sum, and a machine uses one of them.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::bf16_blocks::{Activations, BLOCK, Unit};
use super::elementwise::widest;
use super::packed::{GROUP, Line, Product, STEP, each_groups};
use half::bf16;
use rayon::prelude::*;

/// Cache lines of a group's step: a pair of inputs each.
pub(super) const LINES: usize = STEP / 2;

/// Lays out w [rows, columns], whose elements `read` gives from an index on; absent rows and columns are zeros.
pub(crate) fn lay_out(rows: usize, columns: usize, read: impl Fn(usize, &mut [f32]) + Sync) -> Vec<Line> {
    let steps = columns.div_ceil(STEP);
    let mut lines = vec![Line([0; 64]); rows.div_ceil(GROUP) * steps * LINES];
    lines.par_chunks_mut((steps * LINES).max(1)).enumerate().for_each(|(group, lines)| {
        let mut values = vec![0.0; columns];
        for row in 0..GROUP.min(rows - group * GROUP) {
            read((group * GROUP + row) * columns, &mut values);
            for (column, value) in values.iter().enumerate() {
                lines[column / 2].0[4 * row + column % 2 * 2..][..2].copy_from_slice(&bf16::from_f32(*value).to_le_bytes());
            }
        }
    });
    lines
}

/// A weight of a group's step.
pub(super) fn at(lines: &[Line], row: usize, column: usize) -> f32 {
    let place = 4 * row + column % 2 * 2;
    let line = &lines[column / 2].0;
    bf16::from_le_bytes([line[place], line[place + 1]]).to_f32()
}

/// As [`super::packed::multiply`].
pub(super) fn multiply(x: &[f32], tokens: usize, k: usize, products: &[Product<'_>]) {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if let Some(unit) = Unit::best() {
        return blocks(unit, x, tokens, k, products);
    }
    vectors(x, tokens, k, products);
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn blocks(unit: Unit, x: &[f32], tokens: usize, k: usize, products: &[Product<'_>]) {
    let x = Activations::new(x, tokens, k);
    each_groups(products, tokens, k, |product, groups| {
        let prepared = unit.prepare();
        for token in (0..tokens).step_by(BLOCK) {
            for group in groups.clone().step_by(2) {
                let (out, first) = (product.weights.rows, group * GROUP);
                let outputs = (out - first).min((groups.end - group).min(2) * GROUP);
                // SAFETY: the part of the result that is this task's
                unsafe { prepared.multiply(&x, token, &product.weights, group, outputs, product.y.get().add(token * out + first), out) };
            }
        }
    });
}

/// Tokens that share a load of weights.
const TOGETHER: usize = 4;

fn vectors(x: &[f32], tokens: usize, k: usize, products: &[Product<'_>]) {
    // rounded, and zeros up to a whole step
    let width = k.next_multiple_of(STEP);
    let mut rounded = vec![0f32; tokens * width];
    rounded.chunks_mut(width.max(1)).zip(x.chunks(k.max(1))).for_each(|(to, x)| to.iter_mut().zip(x).for_each(|(to, x)| *to = bf16::from_f32(*x).to_f32()));
    each_groups(products, tokens, k, |product, groups| {
        for group in groups {
            let lines = &product.weights.step(group, 0)[..width / 2];
            for token in (0..tokens).step_by(TOGETHER) {
                let row = |t: usize| &rounded[(token + t).min(tokens - 1) * width..][..width];
                let mut results = [[0f32; GROUP]; TOGETHER];
                if token + TOGETHER <= tokens {
                    sum_together(lines, std::array::from_fn(row), &mut results)
                } else {
                    (0..tokens - token).for_each(|t| sum_alone(lines, row(t), &mut results[t]));
                }
                results.iter().take(tokens - token).enumerate().for_each(|(t, results)| product.write(token + t, group, results));
            }
        }
    });
}

widest!(sum_together, sum_body, (lines: &[Line], x: [&[f32]; TOGETHER], results: &mut [[f32; GROUP]; TOGETHER]));
widest!(sum_alone, sum_alone_body, (lines: &[Line], x: &[f32], results: &mut [f32; GROUP]));

#[inline(always)]
fn sum_alone_body(lines: &[Line], x: &[f32], results: &mut [f32; GROUP]) {
    let mut one = [[0f32; GROUP]];
    sum_body(lines, [x], &mut one);
    *results = one[0];
}

/// Every token's sums of the even and of the odd inputs, and these two added.
#[inline(always)]
fn sum_body<const T: usize>(lines: &[Line], x: [&[f32]; T], results: &mut [[f32; GROUP]; T]) {
    let (mut even, mut odd) = ([[0f32; GROUP]; T], [[0f32; GROUP]; T]);
    for (pair, line) in lines.iter().enumerate() {
        let words: [u32; GROUP] =
            std::array::from_fn(|row| u32::from_le_bytes([line.0[4 * row], line.0[4 * row + 1], line.0[4 * row + 2], line.0[4 * row + 3]]));
        for t in 0..T {
            let (first, second) = (x[t][2 * pair], x[t][2 * pair + 1]);
            for row in 0..GROUP {
                even[t][row] = f32::from_bits(words[row] << 16).mul_add(first, even[t][row]);
                odd[t][row] = f32::from_bits(words[row] & 0xffff_0000).mul_add(second, odd[t][row]);
            }
        }
    }
    for t in 0..T {
        for row in 0..GROUP {
            results[t][row] = even[t][row] + odd[t][row];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::packed::{Format, Weights};
    use super::super::{SharedOut, unfilled};
    use super::*;

    type Multiply = dyn Fn(&[f32], usize, usize, &[Product<'_>]) + Sync;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| (((i + seed) * 7919 + 13) % 2_003) as f32 / 1_001.0 - 1.0).collect()
    }

    /// All that this processor has.
    fn kernels() -> Vec<Box<Multiply>> {
        let mut kernels: Vec<Box<Multiply>> = vec![Box::new(multiply), Box::new(vectors)];
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if Unit::best().is_some() {
            // (where there are tiles, `multiply` takes those)
            kernels.push(Box::new(|x, tokens, k, products| blocks(Unit::Dpbf16, x, tokens, k, products)));
        }
        kernels
    }

    fn of(w: &[bf16]) -> impl Fn(usize, &mut [f32]) + Sync {
        |from, to| to.iter_mut().zip(&w[from..]).for_each(|(to, w)| *to = w.to_f32())
    }

    #[test]
    fn products_of_rounded_numbers_on_every_kernel_whatever_is_beside_a_row() {
        for (tokens, rows, k) in [(1, 7, 32), (5, 40, 64), (33, 100, 96), (70, 64, 576), (16, 33, 50), (3, 5, 33), (64, 80, 64)] {
            let rounded = |values: Vec<f32>| values.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
            let w = rounded(numbers(rows * k, 3));
            let x = numbers(tokens * k, 40);
            let lines = lay_out(rows, k, of(&w));
            let weights = Weights { format: Format::Bf16, lines: &lines, scales: &[], parts: &[], row_steps: k.div_ceil(STEP), rows };
            let by = |multiply: &Multiply, x: &[f32], tokens: usize| {
                let mut y = unfilled(tokens * rows);
                multiply(x, tokens, k, &[Product { weights, y: SharedOut(y.as_mut_ptr()) }]);
                y
            };
            let exact_x = rounded(x.clone());
            for kernel in &kernels() {
                let y = by(kernel, &x, tokens);
                for token in 0..tokens {
                    for row in 0..rows {
                        let exact: f64 = (0..k).map(|i| f64::from(w[row * k + i].to_f32()) * f64::from(exact_x[token * k + i].to_f32())).sum();
                        assert!((f64::from(y[token * rows + row]) - exact).abs() < 1e-5 * k as f64, "{tokens} x {rows} x {k}");
                    }
                }
                // a row alone, and on other threads, is the same to the bit
                assert_eq!(by(kernel, &x[(tokens - 1) * k..], 1), y[(tokens - 1) * rows..]);
                let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
                assert_eq!(pool.install(|| by(kernel, &x, tokens)), y);
            }
            assert_eq!(weights.at(rows - 1, k - 1), w[rows * k - 1].to_f32());
        }
    }

    #[test]
    fn the_first_columns_are_a_matrix_of_their_own() {
        let (rows, k, narrow, tokens) = (20, 96, 40, 3);
        let w: Vec<bf16> = numbers(rows * k, 1).into_iter().map(bf16::from_f32).collect();
        let cut: Vec<bf16> = w.chunks(k).flat_map(|row| row[..narrow].to_vec()).collect();
        let x = numbers(tokens * narrow, 5);
        let by = |lines: &[Line], row_steps: usize| {
            let weights = Weights { format: Format::Bf16, lines, scales: &[], parts: &[], row_steps, rows };
            let mut y = unfilled(tokens * rows);
            multiply(&x, tokens, narrow, &[Product { weights, y: SharedOut(y.as_mut_ptr()) }]);
            y
        };
        assert_eq!(by(&lay_out(rows, k, of(&w)), 3), by(&lay_out(rows, narrow, of(&cut)), 2));
    }
}
