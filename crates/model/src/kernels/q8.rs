//! Products with Q8_0 weights: blocks of 32 inputs share a scale, as in GGUF. Activations are rounded to 8 bits too, block by block; a block's products
//! are added exactly as integers, and the blocks in order as f32. So a result is the same to the bit on every kernel, for one token and for many.
//!
//! The weights lie as vector instructions take them: sixteen rows side by side, four inputs of each at a time, as unsigned numbers (128 added),
//! for VNNI's and AMX's products of unsigned by signed bytes.

use super::packed::{GROUP, Line, Product, STEP as BLOCK, ask, each_groups};
use super::{dot, elementwise::widest, team};
use half::f16;
use rayon::prelude::*;
use std::ops::Range;

/// Cache lines of a group's block: four inputs each.
pub(super) const LINES: usize = BLOCK / 4;
/// Activations' rows that are rounded by one task.
const ROWS_OF_A_TASK: usize = 8;
/// What is added to a weight's number.
const OFFSET: i32 = 128;

/// The number, without its scale, of a weight of a group's block.
pub(super) fn at(lines: &[Line], row: usize, column: usize) -> f32 {
    (i32::from(lines[column / 4].0[row * 4 + column % 4]) - OFFSET) as f32
}

/// Weights [rows, columns] as they are laid out; absent rows and columns are zeros of scale 0. `block(row, block)` gives a block's scale and numbers.
pub(crate) fn lay_out(rows: usize, columns: usize, block: impl Fn(usize, usize) -> (f16, [i8; BLOCK]) + Sync) -> (Vec<Line>, Vec<f16>) {
    let (groups, blocks) = (rows.div_ceil(GROUP), columns.div_ceil(BLOCK));
    let mut lines = vec![Line([OFFSET as u8; 64]); groups * blocks * LINES];
    let mut scales = vec![f16::ZERO; groups * blocks * GROUP];
    let per_group = (lines.par_chunks_mut((blocks * LINES).max(1)), scales.par_chunks_mut((blocks * GROUP).max(1)));
    per_group.0.zip(per_group.1).enumerate().for_each(|(group, (lines, scales))| {
        for row in 0..GROUP.min(rows - group * GROUP) {
            for b in 0..blocks {
                let (scale, numbers) = block(group * GROUP + row, b);
                scales[b * GROUP + row] = scale;
                for (i, number) in numbers.iter().enumerate() {
                    lines[b * LINES + i / 4].0[row * 4 + i % 4] = (i32::from(*number) + OFFSET) as u8;
                }
            }
        }
    });
    (lines, scales)
}

/// A block as GGUF's Q8_0 has it: the largest magnitude becomes 127.
pub(crate) fn quantize(values: &[f32]) -> (f16, [i8; BLOCK]) {
    let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
    let mut numbers = [0; BLOCK];
    numbers.iter_mut().zip(values).for_each(|(n, v)| *n = (v * inverse).round() as i8);
    (f16::from_f32(scale), numbers)
}

/// Activations as 8-bit blocks.
pub(super) struct Activations {
    /// [tokens][blocks][32].
    pub numbers: Vec<i8>,
    /// [tokens][blocks].
    pub scales: Vec<f32>,
    /// -128 times the sum of a block's numbers: what the weights' offset adds, taken away.
    corrections: Vec<i32>,
    pub blocks: usize,
}

/// A token's numbers and what they are made of, its scales and its corrections.
type Row<'a> = ((&'a mut [i8], &'a [f32]), (&'a mut [f32], &'a mut [i32]));

impl Activations {
    pub fn new(x: &[f32], tokens: usize, k: usize) -> Self {
        let blocks = k.div_ceil(BLOCK);
        let mut of = Self { numbers: vec![0; tokens * blocks * BLOCK], scales: vec![0.0; tokens * blocks], corrections: vec![0; tokens * blocks], blocks };
        if blocks == 0 {
            return of;
        }
        let scales = of.scales.chunks_mut(blocks).zip(of.corrections.chunks_mut(blocks));
        let mut rows: Vec<Row<'_>> = of.numbers.chunks_mut(blocks * BLOCK).zip(x.chunks(k)).zip(scales).collect();
        team::for_each_part(&mut rows, ROWS_OF_A_TASK, |_, rows| {
            for ((numbers, x), (scales, corrections)) in rows {
                round_row(x, numbers, scales, corrections);
            }
        });
        of
    }
}

widest!(round_row, round_row_body, (x: &[f32], numbers: &mut [i8], scales: &mut [f32], corrections: &mut [i32]));

#[inline(always)]
fn round_row_body(x: &[f32], numbers: &mut [i8], scales: &mut [f32], corrections: &mut [i32]) {
    /// 1.5 * 2^23: a number added to it is rounded to the nearest integer, ties to even.
    const ROUNDER: f32 = 12_582_912.0;
    for (((x, numbers), scale), correction) in x.chunks(BLOCK).zip(numbers.as_chunks_mut::<BLOCK>().0).zip(scales).zip(corrections) {
        let mut block = [0f32; BLOCK];
        block[..x.len()].copy_from_slice(x);
        // (magnitudes of floats are in the order of their bits, and what isn't finite comes last)
        let largest = block.iter().fold(0, |largest, v| v.abs().to_bits().max(largest));
        // what isn't finite must come out as NaN, not as some number
        if largest >= f32::INFINITY.to_bits() {
            (*scale, *correction) = (f32::NAN, 0);
            numbers.fill(0);
            continue;
        }
        let largest = f32::from_bits(largest);
        *scale = largest / 127.0;
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        let mut sum = 0;
        for i in 0..BLOCK {
            let number = (block[i] * inverse + ROUNDER).to_bits() as i32 - ROUNDER.to_bits() as i32;
            sum += number;
            numbers[i] = number as i8;
        }
        *correction = -OFFSET * sum;
    }
}

/// As [`super::packed::multiply`].
pub(super) fn multiply(x: &[f32], tokens: usize, k: usize, products: &[Product<'_>]) {
    let x = Activations::new(x, tokens, k);
    let kernel = Kernel::best(tokens);
    each_groups(products, tokens, k, |product, groups| run(kernel, &x, tokens, product, groups));
}

/// Ways to compute the same bits, of products in 8 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Vnni,
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx,
}

impl Kernel {
    /// The fastest that this processor has for so many tokens.
    pub fn best(tokens: usize) -> Self {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if tokens >= amx::LEAST && super::amx::bytes_available() && vnni::available() {
            return Self::Amx;
        }
        #[cfg(target_arch = "x86_64")]
        if vnni::available() {
            return Self::Vnni;
        }
        #[cfg(target_arch = "x86_64")]
        if avx_vnni::available() {
            return Self::AvxVnni;
        }
        #[cfg(target_arch = "x86_64")]
        if avx2::available() {
            return Self::Avx2;
        }
        let _ = tokens;
        Self::Plain
    }
}

fn run(kernel: Kernel, x: &Activations, tokens: usize, product: &Product<'_>, groups: Range<usize>) {
    match kernel {
        Kernel::Plain => plain(x, tokens, product, groups),
        // SAFETY: `Kernel::best` has found the features
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2 => unsafe { avx2::groups(x, tokens, product, groups) },
        // SAFETY: as above
        #[cfg(target_arch = "x86_64")]
        Kernel::AvxVnni => unsafe { avx_vnni::groups(x, tokens, product, groups) },
        // SAFETY: as above
        #[cfg(target_arch = "x86_64")]
        Kernel::Vnni => unsafe { vnni::groups(x, 0..tokens, product, groups) },
        // SAFETY: as above
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Kernel::Amx => unsafe { amx::groups(x, tokens, product, groups) },
    }
}

fn plain(x: &Activations, tokens: usize, product: &Product<'_>, groups: Range<usize>) {
    for group in groups {
        for token in 0..tokens {
            let mut results = [0f32; GROUP];
            for block in 0..x.blocks {
                let (lines, scales) = (&product.weights.step(group, block)[..LINES], product.weights.scales(group, block));
                let at = token * x.blocks + block;
                sum_block(lines, scales, &x.numbers[at * BLOCK..][..BLOCK], x.scales[at], x.corrections[at], &mut results);
            }
            product.write(token, group, &results);
        }
    }
}

widest!(sum_block, sum_block_body, (lines: &[Line], scales: &[f16; GROUP], numbers: &[i8], scale: f32, correction: i32, results: &mut [f32; GROUP]));

#[inline(always)]
fn sum_block_body(lines: &[Line], scales: &[f16; GROUP], numbers: &[i8], scale: f32, correction: i32, results: &mut [f32; GROUP]) {
    let mut sums = [correction; GROUP];
    for (line, numbers) in lines.iter().zip(numbers.chunks_exact(4)) {
        for (sum, weights) in sums.iter_mut().zip(line.0.chunks_exact(4)) {
            *sum += weights.iter().zip(numbers).map(|(weight, number)| i32::from(*weight) * i32::from(*number)).sum::<i32>();
        }
    }
    for row in 0..GROUP {
        results[row] = (sums[row] as f32).mul_add(scales[row].to_f32() * scale, results[row]);
    }
}

/// Products in registers of 256 bits. `$weights` prepares eight rows' numbers of four inputs, `$dot` adds their products with four of a token's numbers, and
/// `$start` is what a block's sums start from.
#[cfg(target_arch = "x86_64")]
macro_rules! in_256_bits {
    ($name:ident, $features:literal, $available:expr, $weights:item, $dot:item, $start:expr) => {
        mod $name {
            use super::{Activations, BLOCK, GROUP, LINES, Product, ask};
            use std::arch::x86_64::*;
            use std::ops::Range;

            pub fn available() -> bool {
                $available
            }

            #[inline]
            #[target_feature(enable = $features)]
            $weights

            #[inline]
            #[target_feature(enable = $features)]
            $dot

            /// # Safety
            /// [`available`] must be true.
            #[target_feature(enable = $features)]
            pub unsafe fn groups(x: &Activations, tokens: usize, product: &Product<'_>, groups: Range<usize>) {
                for group in groups {
                    let whole = tokens / 2 * 2;
                    // SAFETY: the features are those of this function
                    unsafe {
                        (0..whole).step_by(2).for_each(|token| some::<2>(x, token, product, group));
                        (whole..tokens).for_each(|token| some::<1>(x, token, product, group));
                    }
                }
            }

            /// A group's rows for T tokens.
            ///
            /// # Safety
            /// As [`groups`].
            #[target_feature(enable = $features)]
            unsafe fn some<const T: usize>(x: &Activations, token: usize, product: &Product<'_>, group: usize) {
                let mut totals = [[_mm256_setzero_ps(); 2]; T];
                for block in 0..x.blocks {
                    let (lines, scales) = (&product.weights.step(group, block)[..LINES], product.weights.scales(group, block));
                    // (beyond the last line it may be anywhere: asking is no reading)
                    (0..LINES).for_each(|i| ask(lines.as_ptr().wrapping_add(2 * LINES + i)));
                    let mut sums = [[_mm256_setzero_si256(); 2]; T];
                    for (t, sums) in sums.iter_mut().enumerate() {
                        *sums = [_mm256_set1_epi32($start(x.corrections[(token + t) * x.blocks + block])); 2];
                    }
                    for (i, line) in lines.iter().enumerate() {
                        // SAFETY: a line of 64 bytes
                        let halves = unsafe { [0, 32].map(|from| weights(_mm256_load_si256(line.0.as_ptr().add(from).cast()))) };
                        for (t, sums) in sums.iter_mut().enumerate() {
                            let numbers = x.numbers[((token + t) * x.blocks + block) * BLOCK + 4 * i..][..4].as_ptr();
                            // SAFETY: four bytes
                            let numbers = _mm256_set1_epi32(unsafe { numbers.cast::<i32>().read_unaligned() });
                            *sums = [dot(sums[0], halves[0], numbers), dot(sums[1], halves[1], numbers)];
                        }
                    }
                    // SAFETY: eight scales each
                    let scales = unsafe { [0, 8].map(|from| _mm256_cvtph_ps(_mm_loadu_si128(scales.as_ptr().add(from).cast()))) };
                    for (t, (sums, totals)) in sums.iter().zip(&mut totals).enumerate() {
                        let scale = _mm256_set1_ps(x.scales[(token + t) * x.blocks + block]);
                        for half in 0..2 {
                            totals[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[half]), _mm256_mul_ps(scales[half], scale), totals[half]);
                        }
                    }
                }
                for (t, totals) in totals.into_iter().enumerate() {
                    let mut results = [0f32; GROUP];
                    // SAFETY: eight elements each
                    unsafe {
                        _mm256_storeu_ps(results.as_mut_ptr(), totals[0]);
                        _mm256_storeu_ps(results.as_mut_ptr().add(8), totals[1]);
                    }
                    product.write(token + t, group, &results);
                }
            }
        }
    };
}

// Magnitudes by signed numbers, in pairs of at most 2 x 128 x 127, which 16 bits hold; the weights' offset is gone.
#[cfg(target_arch = "x86_64")]
in_256_bits!(
    avx2,
    "avx2,fma,f16c",
    super::dot::has_avx2() && is_x86_feature_detected!("f16c"),
    fn weights(line: __m256i) -> (__m256i, __m256i) {
        let signed = _mm256_xor_si256(line, _mm256_set1_epi8(i8::MIN));
        (_mm256_abs_epi8(signed), signed)
    },
    fn dot(sum: __m256i, (magnitudes, signed): (__m256i, __m256i), numbers: __m256i) -> __m256i {
        let pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(numbers, signed));
        _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    },
    |_correction: i32| 0
);

// VNNI in registers of 256 bits, on processors without AVX-512.
#[cfg(target_arch = "x86_64")]
in_256_bits!(
    avx_vnni,
    "avx2,fma,f16c,avxvnni",
    super::dot::has_avx2() && is_x86_feature_detected!("f16c") && is_x86_feature_detected!("avxvnni"),
    fn weights(line: __m256i) -> __m256i {
        line
    },
    fn dot(sum: __m256i, weights: __m256i, numbers: __m256i) -> __m256i {
        _mm256_dpbusd_avx_epi32(sum, weights, numbers)
    },
    |correction: i32| correction
);

#[cfg(target_arch = "x86_64")]
pub(super) mod vnni {
    use super::{Activations, BLOCK, GROUP, LINES, Product, ask};
    use std::arch::x86_64::*;
    use std::ops::Range;

    pub fn available() -> bool {
        super::dot::has_avx512() && is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512bw")
    }

    /// # Safety
    /// [`available`] must be true.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni,f16c,avx2,fma")]
    pub unsafe fn groups(x: &Activations, tokens: Range<usize>, product: &Product<'_>, groups: Range<usize>) {
        let passes = tokens.len() / 8 + (tokens.len() % 8).count_ones() as usize;
        for group in groups {
            let (mut token, tokens) = (tokens.start, tokens.end);
            let mut pass = 0;
            // SAFETY: the features are those of this function
            unsafe {
                while token + 8 <= tokens {
                    some::<8>(x, token, product, group, (pass, passes));
                    (token, pass) = (token + 8, pass + 1);
                }
                if token + 4 <= tokens {
                    some::<4>(x, token, product, group, (pass, passes));
                    (token, pass) = (token + 4, pass + 1);
                }
                if token + 2 <= tokens {
                    some::<2>(x, token, product, group, (pass, passes));
                    (token, pass) = (token + 2, pass + 1);
                }
                if token < tokens {
                    some::<1>(x, token, product, group, (pass, passes));
                }
            }
        }
    }

    /// A group's rows for T tokens, which is one of several passes over the group. Of several passes each asks for a part of the next group, an only one for
    /// what is a few blocks ahead.
    ///
    /// # Safety
    /// As [`groups`].
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni,f16c,avx2,fma")]
    unsafe fn some<const T: usize>(x: &Activations, token: usize, product: &Product<'_>, group: usize, (pass, passes): (usize, usize)) {
        let mut totals = [_mm512_setzero_ps(); T];
        let asked = LINES.div_ceil(passes);
        let ahead = if passes == 1 { LINES * (T + 1) } else { product.weights.row_steps * LINES + pass * x.blocks * asked };
        // (beyond the last group it may be anywhere: asking is no reading)
        let ahead = product.weights.step(group, 0).as_ptr().wrapping_add(ahead);
        for block in 0..x.blocks {
            let (lines, scales) = (&product.weights.step(group, block)[..LINES], product.weights.scales(group, block));
            (block * asked..(block + 1) * asked).for_each(|i| ask(ahead.wrapping_add(i)));
            // SAFETY: sixteen scales, and lines of 64 bytes
            let (scales, weights): (__m512, [__m512i; LINES]) = unsafe {
                (_mm512_cvtph_ps(_mm256_loadu_si256(scales.as_ptr().cast())), std::array::from_fn(|i| _mm512_load_si512((&raw const lines[i]).cast())))
            };
            for (t, total) in totals.iter_mut().enumerate() {
                let at = (token + t) * x.blocks + block;
                let mut sum = _mm512_set1_epi32(x.corrections[at]);
                let numbers = x.numbers[at * BLOCK..][..BLOCK].as_ptr();
                for (i, weights) in weights.iter().enumerate() {
                    // SAFETY: 32 bytes
                    sum = _mm512_dpbusd_epi32(sum, *weights, _mm512_set1_epi32(unsafe { numbers.add(4 * i).cast::<i32>().read_unaligned() }));
                }
                let scale = _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[at]));
                *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *total);
            }
        }
        for (t, total) in totals.into_iter().enumerate() {
            let mut results = [0f32; GROUP];
            // SAFETY: sixteen elements
            unsafe { _mm512_storeu_ps(results.as_mut_ptr(), total) };
            product.write(token + t, group, &results);
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) mod amx {
    use super::{Activations, BLOCK, GROUP, LINES, Line, Product};
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::ops::Range;

    /// Tokens of a tile.
    pub const TOKENS: usize = 16;
    /// Tokens from which tiles pay.
    pub const LEAST: usize = 32;

    /// Sums of four tiles: [2 x 16 tokens][2 x 16 rows].
    #[repr(C, align(64))]
    pub struct Sums(pub [[[i32; GROUP]; TOKENS]; 4]);

    /// Sums of 16 x 16, activations of 16 tokens by so many bytes, at most 64, weights of a fourth as many rows of 64 bytes.
    pub fn shapes(inputs: usize) -> [(u8, u8); 8] {
        let (x, w) = ((inputs as u8, 16), (64, (inputs / 4) as u8));
        [(64, 16), (64, 16), (64, 16), (64, 16), x, x, w, w]
    }

    /// Two groups and 32 tokens at a time; what is left over goes to the vector kernel.
    ///
    /// # Safety
    /// The processor must have AMX's tiles of bytes, which the system lets this process use, and what [`super::vnni`] needs.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni,f16c,avx2,fma")]
    pub unsafe fn groups(x: &Activations, tokens: usize, product: &Product<'_>, groups: Range<usize>) {
        let Range { start: from, end: to } = groups;
        let (whole_groups, whole_tokens) = (from + (to - from) / 2 * 2, tokens / (2 * TOKENS) * (2 * TOKENS));
        {
            let _shapes = super::super::amx::Shapes::configure(shapes(BLOCK));
            for token in (0..whole_tokens).step_by(2 * TOKENS) {
                for group in (from..whole_groups).step_by(2) {
                    // SAFETY: configured; whole tiles
                    unsafe { four(x, token, product, group) };
                }
            }
        }
        // SAFETY: the features are those of this function
        unsafe {
            if whole_tokens < tokens {
                super::vnni::groups(x, whole_tokens..tokens, product, from..whole_groups);
            }
            if whole_groups < to {
                super::vnni::groups(x, 0..tokens, product, whole_groups..to);
            }
        }
    }

    /// Sums of the products of 32 tokens, `stride` bytes apart, with two groups.
    ///
    /// # Safety
    /// The tiles must be configured by [`shapes`]; the tokens and groups must have the inputs of those.
    pub unsafe fn products(x: *const i8, stride: usize, low: *const Line, high: *const Line, sums: &mut Sums) {
        // SAFETY: as this function's
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tileloadd tmm4, [{x0} + {xs} * 1]",
                "tileloadd tmm6, [{w0} + {line} * 1]",
                "tdpbsud tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{w1} + {line} * 1]",
                "tdpbsud tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{x1} + {xs} * 1]",
                "tdpbsud tmm2, tmm5, tmm6",
                "tdpbsud tmm3, tmm5, tmm7",
                "tilestored [{c} + {line} * 1], tmm0",
                "tilestored [{c} + {line} * 1 + 1024], tmm1",
                "tilestored [{c} + {line} * 1 + 2048], tmm2",
                "tilestored [{c} + {line} * 1 + 3072], tmm3",
                x0 = in(reg) x,
                x1 = in(reg) x.add(TOKENS * stride),
                xs = in(reg) stride,
                w0 = in(reg) low,
                w1 = in(reg) high,
                line = in(reg) 64usize,
                c = in(reg) &raw mut *sums,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// 32 tokens by two groups.
    ///
    /// # Safety
    /// The tiles must be configured; the tokens and groups must be there.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni,f16c,avx2,fma")]
    unsafe fn four(x: &Activations, token: usize, product: &Product<'_>, group: usize) {
        let mut totals = [[[0f32; GROUP]; TOKENS]; 4];
        let mut sums = Sums([[[0; GROUP]; TOKENS]; 4]);
        let stride = x.blocks * BLOCK;
        for block in 0..x.blocks {
            let [low, high] = [group, group + 1].map(|g| product.weights.step(g, block)[..LINES].as_ptr());
            let first = x.numbers[token * stride + block * BLOCK..][..(2 * TOKENS - 1) * stride + BLOCK].as_ptr();
            // SAFETY: configured; two times 16 rows of 32 bytes, and two blocks of 512
            unsafe { products(first, stride, low, high, &mut sums) };
            // SAFETY: sixteen scales each
            let scales = unsafe { [group, group + 1].map(|g| _mm512_cvtph_ps(_mm256_loadu_si256(product.weights.scales(g, block).as_ptr().cast()))) };
            for (tile, (sums, totals)) in sums.0.iter().zip(&mut totals).enumerate() {
                for (row, (sums, total)) in sums.iter().zip(totals).enumerate() {
                    let at = (token + tile / 2 * TOKENS + row) * x.blocks + block;
                    let scale = _mm512_mul_ps(scales[tile % 2], _mm512_set1_ps(x.scales[at]));
                    // SAFETY: sixteen elements each
                    unsafe {
                        let sum = _mm512_add_epi32(_mm512_load_si512(sums.as_ptr().cast()), _mm512_set1_epi32(x.corrections[at]));
                        let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_loadu_ps(total.as_ptr()));
                        _mm512_storeu_ps(total.as_mut_ptr(), sum);
                    }
                }
            }
        }
        for (tile, totals) in totals.iter().enumerate() {
            totals.iter().enumerate().for_each(|(row, total)| product.write(token + tile / 2 * TOKENS + row, group + tile % 2, total));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::packed::{Format, Weights};
    use super::super::{SharedOut, unfilled};
    use super::*;

    fn number(i: usize) -> f32 {
        ((i * 7919 + 13) % 2_003) as f32 / 1_001.0 - 1.0
    }

    #[test]
    fn every_kernel_gives_the_same_bits_near_the_exact_product() {
        for (tokens, rows, k) in [(1, 5, 32), (3, 16, 64), (7, 40, 96), (33, 48, 576), (70, 50, 80), (64, 33, 33)] {
            let w: Vec<f32> = (0..rows * k).map(number).collect();
            let x: Vec<f32> = (0..tokens * k).map(|i| number(i * 31 + 7)).collect();
            let block = |row: usize, block: usize| quantize(&w[row * k..(row + 1) * k][block * BLOCK..k.min((block + 1) * BLOCK)]);
            let (lines, scales) = lay_out(rows, k, block);
            let weights = Weights { format: Format::Q8, lines: &lines, scales: &scales, parts: &[], row_steps: k.div_ceil(BLOCK), rows };
            let activations = Activations::new(&x, tokens, k);
            let by = |kernel: Kernel| {
                let mut y = unfilled(tokens * rows);
                run(kernel, &activations, tokens, &Product { weights, y: SharedOut(y.as_mut_ptr()) }, 0..rows.div_ceil(GROUP));
                y
            };
            let plain = by(Kernel::Plain);
            for row in 0..rows {
                for token in 0..tokens {
                    let exact: f64 = (0..k).map(|i| f64::from(w[row * k + i]) * f64::from(x[token * k + i])).sum();
                    let found = f64::from(plain[token * rows + row]);
                    assert!((found - exact).abs() < 0.01 * (k as f64).sqrt(), "{tokens} {rows} {k}: {found} {exact}");
                }
                assert!((weights.at(row, k - 1) - w[row * k + k - 1]).abs() < 0.005);
            }
            #[cfg(target_arch = "x86_64")]
            for (kernel, available) in [(Kernel::Avx2, avx2::available()), (Kernel::AvxVnni, avx_vnni::available()), (Kernel::Vnni, vnni::available())] {
                if available {
                    assert_eq!(by(kernel), plain, "{kernel:?}");
                }
            }
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            if vnni::available() && super::super::amx::bytes_available() {
                assert_eq!(by(Kernel::Amx), plain);
            }
            let mut y = unfilled(tokens * rows);
            multiply(&x, tokens, k, &[Product { weights, y: SharedOut(y.as_mut_ptr()) }]);
            assert_eq!(y, plain);
        }
    }

    #[test]
    fn activations_that_are_not_finite_come_out_as_nan() {
        let (lines, scales) = lay_out(16, 64, |_, _| quantize(&[0.5; BLOCK]));
        let weights = Weights { format: Format::Q8, lines: &lines, scales: &scales, parts: &[], row_steps: 2, rows: 16 };
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1f32; 2 * 64];
            x[70] = bad;
            let mut y = unfilled(2 * 16);
            multiply(&x, 2, 64, &[Product { weights, y: SharedOut(y.as_mut_ptr()) }]);
            assert!(y[..16].iter().all(|v| (v - 32.0).abs() < 0.2), "the other token");
            assert!(y[16..].iter().all(|v| v.is_nan()));
        }
    }

    #[test]
    fn the_first_columns_are_a_matrix_of_their_own() {
        let (rows, k, narrow, tokens) = (20, 96, 40, 3);
        let w: Vec<f32> = (0..rows * k).map(number).collect();
        let of = |row: usize, block: usize| quantize(&w[row * k + block * BLOCK..][..BLOCK]);
        let (lines, scales) = lay_out(rows, k, of);
        let x: Vec<f32> = (0..tokens * narrow).map(number).collect();
        let padded: Vec<f32> = x.chunks(narrow).flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, k - narrow))).collect();
        let weights = Weights { format: Format::Q8, lines: &lines, scales: &scales, parts: &[], row_steps: 3, rows };
        let by = |x: &[f32], k: usize| {
            let mut y = unfilled(tokens * rows);
            multiply(x, tokens, k, &[Product { weights, y: SharedOut(y.as_mut_ptr()) }]);
            y
        };
        assert_eq!(by(&x, narrow), by(&padded, k));
    }
}
