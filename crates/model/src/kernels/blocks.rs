//! Products with weights in the block types of GGUF ([`BlockType`]), as [`super::block_layout`] holds them. Activations are rounded to 8 bits, 32 at a time, as for
//! Q8_0; the products of a part (16 or 32 weights) are added exactly as integers, and the parts in order as f32: a result has the same bits on every kernel, for one
//! token and for many. A superblock of eight steps is widened to bytes in the first-level cache and multiplied with all tokens from there.

use super::elementwise::widest;
use super::ggml::{BlockType, Layout};
use super::packed::{GROUP, Line, Product, STEP, Weights, ask, each_groups};
use super::q8::{Activations, Kernel};
use half::f16;
use std::ops::Range;

/// Steps that are widened together: a superblock.
const CHUNK: usize = 8;
/// Lines of a step of bytes.
const WIDE: usize = STEP / 4;
/// Parts of a step at most.
const HALVES: usize = 2;

/// A group's superblock as bytes, with its parts' scales and minima as f32.
#[repr(C, align(64))]
struct Wide {
    lines: [Line; CHUNK * WIDE],
    scales: [[f32; GROUP]; CHUNK * HALVES],
    minima: [[f32; GROUP]; CHUNK * HALVES],
}

impl Wide {
    fn new() -> Self {
        Self { lines: [Line([0; 64]); CHUNK * WIDE], scales: [[0.0; GROUP]; CHUNK * HALVES], minima: [[0.0; GROUP]; CHUNK * HALVES] }
    }

    /// Widens `count` steps of a group from step `from`, a multiple of [`CHUNK`]. Parts lie [step][part of a step].
    #[inline(always)]
    fn fill(&mut self, weights: &Weights<'_>, layout: &Layout, group: usize, from: usize, count: usize, factors: impl Factors) {
        for step in 0..count {
            let (lines, to) = (weights.step(group, from + step), &mut self.lines[step * WIDE..][..WIDE]);
            (CHUNK * layout.bits..(CHUNK + 1) * layout.bits).for_each(|i| ask(lines.as_ptr().wrapping_add(i)));
            match layout.bits {
                2 => widen::<2>(lines, to),
                3 => widen::<3>(lines, to),
                4 => widen::<4>(lines, to),
                5 => widen::<5>(lines, to),
                _ => widen::<6>(lines, to),
            }
            let (halves, blocks) = (layout.halves(), weights.row_steps.div_ceil(layout.span()));
            let (own, _) = weights.scales[(group * blocks + (from + step) / layout.span()) * layout.scales()..].as_chunks();
            let parts = &weights.parts[(group * weights.row_steps + from + step) * layout.parts()..][..layout.parts()];
            let (parts, _) = parts.as_chunks();
            for half in 0..halves {
                let (at, part) = (step * halves + half, half * layout.scales() / GROUP);
                self.scales[at] = factors(&own[0], parts.get(part), true);
                if layout.minima {
                    self.minima[at] = factors(&own[1], parts.get(part + 1), false);
                }
            }
        }
    }
}

/// Sixteen finite scales, times their parts' factors where there are any: signed bytes, or unsigned ones.
trait Factors: Fn(&[f16; GROUP], Option<&[u8; GROUP]>, bool) -> [f32; GROUP] + Copy {}

impl<T: Fn(&[f16; GROUP], Option<&[u8; GROUP]>, bool) -> [f32; GROUP] + Copy> Factors for T {}

fn plain_factors(scales: &[f16; GROUP], parts: Option<&[u8; GROUP]>, signed: bool) -> [f32; GROUP] {
    let number = |part: u8| if signed { f32::from(part.cast_signed()) } else { f32::from(part) };
    std::array::from_fn(|row| scales[row].to_f32() * parts.map_or(1.0, |parts| number(parts[row])))
}

/// A step's numbers as bytes.
#[inline(always)]
fn widen<const BITS: usize>(lines: &[Line], to: &mut [Line]) {
    let lines = &lines[..BITS];
    for i in 0..WIDE {
        let mut bytes = [0u8; 64];
        let (mut first, mut shift) = (0, 0);
        for plane in [4, 2, 1] {
            if BITS & plane != 0 {
                let from = &lines[first + i % plane].0;
                for (byte, from) in bytes.iter_mut().zip(from) {
                    *byte |= ((from >> (i / plane * plane)) & ((1 << plane) - 1)) << shift;
                }
                (first, shift) = (first + plane, shift + plane);
            }
        }
        to[i].0 = bytes;
    }
}

/// As [`super::packed::multiply`], of one type.
pub(super) fn multiply(x: &[f32], tokens: usize, k: usize, products: &[Product<'_>], of: BlockType) {
    let x = Rounded::new(x, tokens, k, &of.layout());
    let kernel = Kernel::best(tokens);
    each_groups(products, tokens, k, |product, groups| run(kernel, &x, tokens, product, groups));
}

/// Activations in 8 bits, and the sums of their parts.
pub(crate) struct Rounded {
    x: Activations,
    layout: Layout,
    /// [tokens][steps][parts of a step].
    sums: Vec<i32>,
}

impl Rounded {
    fn new(x: &[f32], tokens: usize, k: usize, layout: &Layout) -> Self {
        let x = Activations::new(x, tokens, k);
        let sums = x.numbers.chunks_exact(layout.part).map(|part| part.iter().map(|n| i32::from(*n)).sum()).collect();
        Self { x, layout: *layout, sums }
    }
}

fn run(kernel: Kernel, x: &Rounded, tokens: usize, product: &Product<'_>, groups: Range<usize>) {
    match kernel {
        Kernel::Plain => plain(x, tokens, product, groups),
        // (nothing of these types' own; plain loops are compiled for the widest registers)
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2 | Kernel::AvxVnni => plain(x, tokens, product, groups),
        // SAFETY: `Kernel::best` has found the features
        #[cfg(target_arch = "x86_64")]
        Kernel::Vnni => unsafe { vnni::groups(x, tokens, product, groups) },
        // SAFETY: as above
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Kernel::Amx => unsafe { amx::groups(x, tokens, product, groups) },
    }
}

widest!(plain, plain_body, (x: &Rounded, tokens: usize, product: &Product<'_>, groups: Range<usize>));

#[inline(always)]
fn plain_body(x: &Rounded, tokens: usize, product: &Product<'_>, groups: Range<usize>) {
    let Rounded { x, layout, sums } = x;
    let (halves, mut wide, mut totals) = (layout.halves(), Wide::new(), vec![[0f32; GROUP]; tokens]);
    for group in groups {
        totals.fill([0.0; GROUP]);
        for from in (0..x.blocks).step_by(CHUNK) {
            let count = CHUNK.min(x.blocks - from);
            wide.fill(&product.weights, layout, group, from, count, plain_factors);
            for (token, totals) in totals.iter_mut().enumerate() {
                for part in 0..count * halves {
                    let (step, sum) = (token * x.blocks + from + part / halves, sums[(token * x.blocks + from) * halves + part]);
                    let numbers = &x.numbers[step * STEP + part % halves * layout.part..][..layout.part];
                    let mut products = [-layout.offset * sum; GROUP];
                    for (line, numbers) in wide.lines[part * WIDE / halves..].iter().zip(numbers.chunks_exact(4)) {
                        for (product, weights) in products.iter_mut().zip(line.0.chunks_exact(4)) {
                            *product += weights.iter().zip(numbers).map(|(weight, number)| i32::from(*weight) * i32::from(*number)).sum::<i32>();
                        }
                    }
                    for row in 0..GROUP {
                        totals[row] = (products[row] as f32).mul_add(wide.scales[part][row] * x.scales[step], totals[row]);
                        if layout.minima {
                            totals[row] = (-sum as f32).mul_add(wide.minima[part][row] * x.scales[step], totals[row]);
                        }
                    }
                }
            }
        }
        totals.iter().enumerate().for_each(|(token, totals)| product.write(token, group, totals));
    }
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    use super::{CHUNK, GROUP, Product, Range, Rounded, STEP, WIDE, Wide, f16};
    use std::arch::x86_64::*;

    /// # Safety
    /// [`super::super::q8::vnni::available`] must be true.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni,f16c,avx2,fma")]
    pub unsafe fn groups(x: &Rounded, tokens: usize, product: &Product<'_>, groups: Range<usize>) {
        let (mut wide, mut totals) = (Wide::new(), vec![[0f32; GROUP]; tokens]);
        let steps = x.x.blocks;
        for group in groups {
            totals.fill([0.0; GROUP]);
            for from in (0..steps).step_by(CHUNK) {
                let count = CHUNK.min(steps - from);
                // SAFETY: the features are those of this function
                wide.fill(&product.weights, &x.layout, group, from, count, |scales, parts, signed| unsafe { factors(scales, parts, signed) });
                // SAFETY: the features are those of this function
                unsafe { rest(x, from, count, &wide, 0, &mut totals) };
            }
            totals.iter().enumerate().for_each(|(token, totals)| product.write(token, group, totals));
        }
    }

    /// As [`super::plain_factors`].
    ///
    /// # Safety
    /// As [`groups`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni,f16c,avx2,fma")]
    pub unsafe fn factors(scales: &[f16; GROUP], parts: Option<&[u8; GROUP]>, signed: bool) -> [f32; GROUP] {
        let mut found = [0f32; GROUP];
        // SAFETY: sixteen elements each
        unsafe {
            let mut scales = _mm512_cvtph_ps(_mm256_loadu_si256(scales.as_ptr().cast()));
            if let Some(parts) = parts {
                let parts = _mm_loadu_si128(parts.as_ptr().cast());
                let parts = if signed { _mm512_cvtepi8_epi32(parts) } else { _mm512_cvtepu8_epi32(parts) };
                scales = _mm512_mul_ps(scales, _mm512_cvtepi32_ps(parts));
            }
            _mm512_storeu_ps(found.as_mut_ptr(), scales);
        }
        found
    }

    /// The products of all tokens from `token` on with a superblock.
    ///
    /// # Safety
    /// As [`groups`].
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni,f16c,avx2,fma")]
    pub unsafe fn rest(x: &Rounded, from: usize, count: usize, wide: &Wide, token: usize, totals: &mut [[f32; GROUP]]) {
        // SAFETY: the features are those of this function
        unsafe {
            match (x.layout.halves(), x.layout.minima) {
                (1, false) => all::<1, false>(x, from, count, wide, token, totals),
                (1, true) => all::<1, true>(x, from, count, wide, token, totals),
                (_, false) => all::<2, false>(x, from, count, wide, token, totals),
                (_, true) => all::<2, true>(x, from, count, wide, token, totals),
            }
        }
    }

    /// # Safety
    /// As [`groups`].
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni,f16c,avx2,fma")]
    unsafe fn all<const HALVES: usize, const MINIMA: bool>(x: &Rounded, from: usize, count: usize, wide: &Wide, token: usize, totals: &mut [[f32; GROUP]]) {
        let mut token = token;
        // SAFETY: the features are those of this function
        unsafe {
            while token + 8 <= totals.len() {
                some::<8, HALVES, MINIMA>(x, from, count, wide, token, totals);
                token += 8;
            }
            if token + 4 <= totals.len() {
                some::<4, HALVES, MINIMA>(x, from, count, wide, token, totals);
                token += 4;
            }
            if token + 2 <= totals.len() {
                some::<2, HALVES, MINIMA>(x, from, count, wide, token, totals);
                token += 2;
            }
            if token < totals.len() {
                some::<1, HALVES, MINIMA>(x, from, count, wide, token, totals);
            }
        }
    }

    /// T tokens' products with a superblock.
    ///
    /// # Safety
    /// As [`groups`].
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni,f16c,avx2,fma")]
    unsafe fn some<const T: usize, const HALVES: usize, const MINIMA: bool>(
        x: &Rounded,
        from: usize,
        count: usize,
        wide: &Wide,
        token: usize,
        totals: &mut [[f32; GROUP]],
    ) {
        let Rounded { x, layout, sums } = x;
        let totals = &mut totals[token..token + T];
        // SAFETY: sixteen elements
        let mut held: [__m512; T] = std::array::from_fn(|t| unsafe { _mm512_loadu_ps(totals[t].as_ptr()) });
        for step in 0..count {
            for half in 0..HALVES {
                let part = step * HALVES + half;
                let lines = &wide.lines[part * WIDE / HALVES..][..WIDE / HALVES];
                // SAFETY: sixteen elements each
                let (scales, minima) = unsafe { (_mm512_loadu_ps(wide.scales[part].as_ptr()), _mm512_loadu_ps(wide.minima[part].as_ptr())) };
                for (t, total) in held.iter_mut().enumerate() {
                    let at = (token + t) * x.blocks + from + step;
                    let sum = sums[at * HALVES + half];
                    let numbers = x.numbers[at * STEP + half * (STEP / HALVES)..][..STEP / HALVES].as_ptr();
                    let mut products = _mm512_set1_epi32(-layout.offset * sum);
                    for (i, line) in lines.iter().enumerate() {
                        // SAFETY: a line of 64 bytes, and four of the numbers
                        unsafe {
                            let weights = _mm512_load_si512((&raw const *line).cast());
                            products = _mm512_dpbusd_epi32(products, weights, _mm512_set1_epi32(numbers.add(4 * i).cast::<i32>().read_unaligned()));
                        }
                    }
                    let scale = _mm512_set1_ps(x.scales[at]);
                    *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_mul_ps(scales, scale), *total);
                    if MINIMA {
                        *total = _mm512_fmadd_ps(_mm512_set1_ps(-sum as f32), _mm512_mul_ps(minima, scale), *total);
                    }
                }
            }
        }
        // SAFETY: sixteen elements
        held.iter().zip(totals).for_each(|(held, total)| unsafe { _mm512_storeu_ps(total.as_mut_ptr(), *held) });
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use super::super::amx::Shapes;
    use super::super::q8::amx::{Sums, TOKENS, products, shapes};
    use super::{CHUNK, GROUP, Product, Range, Rounded, STEP, WIDE, Wide, vnni};
    use std::arch::x86_64::*;

    /// Two groups and 32 tokens at a time; what is left over goes to the vector kernel.
    ///
    /// # Safety
    /// The processor must have AMX's tiles of bytes, which the system lets this process use, and what [`vnni`] needs.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni,f16c,avx2,fma")]
    pub unsafe fn groups(x: &Rounded, tokens: usize, product: &Product<'_>, groups: Range<usize>) {
        let (whole_groups, whole_tokens) = (groups.start + groups.len() / 2 * 2, tokens / (2 * TOKENS) * (2 * TOKENS));
        let mut wide = [Wide::new(), Wide::new()];
        let mut totals = [vec![[0f32; GROUP]; tokens], vec![[0f32; GROUP]; tokens]];
        let steps = x.x.blocks;
        for group in (groups.start..whole_groups).step_by(2) {
            totals.iter_mut().for_each(|totals| totals.fill([0.0; GROUP]));
            for from in (0..steps).step_by(CHUNK) {
                let count = CHUNK.min(steps - from);
                for (i, wide) in wide.iter_mut().enumerate() {
                    // SAFETY: the features are those of this function
                    wide.fill(&product.weights, &x.layout, group + i, from, count, |scales, parts, signed| unsafe { vnni::factors(scales, parts, signed) });
                }
                {
                    let _shapes = Shapes::configure(shapes(x.layout.part));
                    for token in (0..whole_tokens).step_by(2 * TOKENS) {
                        // SAFETY: configured; whole tiles
                        unsafe {
                            match x.layout.minima {
                                false => four::<false>(x, from, count, &wide, token, &mut totals),
                                true => four::<true>(x, from, count, &wide, token, &mut totals),
                            }
                        }
                    }
                }
                for (wide, totals) in wide.iter().zip(&mut totals) {
                    // SAFETY: the features are those of this function
                    unsafe { vnni::rest(x, from, count, wide, whole_tokens, totals) };
                }
            }
            for (i, totals) in totals.iter().enumerate() {
                totals.iter().enumerate().for_each(|(token, totals)| product.write(token, group + i, totals));
            }
        }
        if whole_groups < groups.end {
            // SAFETY: the features are those of this function
            unsafe { vnni::groups(x, tokens, product, whole_groups..groups.end) };
        }
    }

    /// The products of 32 tokens with a superblock of two groups.
    ///
    /// # Safety
    /// The tiles must be configured; the tokens must be there.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni,f16c,avx2,fma")]
    unsafe fn four<const MINIMA: bool>(x: &Rounded, from: usize, count: usize, wide: &[Wide; 2], token: usize, totals: &mut [Vec<[f32; GROUP]>; 2]) {
        let Rounded { x, layout, sums: parts } = x;
        let (halves, stride) = (layout.halves(), x.blocks * STEP);
        let mut sums = Sums([[[0; GROUP]; TOKENS]; 4]);
        for part in 0..count * halves {
            let (step, half) = (from + part / halves, part % halves);
            let first = x.numbers[token * stride + step * STEP + half * layout.part..][..(2 * TOKENS - 1) * stride + layout.part].as_ptr();
            let [low, high] = [0, 1].map(|i: usize| wide[i].lines[part * WIDE / halves..][..WIDE / halves].as_ptr());
            // SAFETY: configured; two times 16 rows, and two parts of weights
            unsafe { products(first, stride, low, high, &mut sums) };
            for (tile, sums) in sums.0.iter().enumerate() {
                let (group, first) = (tile % 2, token + tile / 2 * TOKENS);
                let totals = &mut totals[group][first..first + TOKENS];
                // SAFETY: sixteen elements each
                let (scales, minima) = unsafe { (_mm512_loadu_ps(wide[group].scales[part].as_ptr()), _mm512_loadu_ps(wide[group].minima[part].as_ptr())) };
                for (row, (sums, total)) in sums.iter().zip(totals).enumerate() {
                    let at = (first + row) * x.blocks + step;
                    let (sum, scale) = (parts[at * halves + half], _mm512_set1_ps(x.scales[at]));
                    // SAFETY: sixteen elements each
                    unsafe {
                        let products = _mm512_add_epi32(_mm512_load_si512(sums.as_ptr().cast()), _mm512_set1_epi32(-layout.offset * sum));
                        let mut held = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_mul_ps(scales, scale), _mm512_loadu_ps(total.as_ptr()));
                        if MINIMA {
                            held = _mm512_fmadd_ps(_mm512_set1_ps(-sum as f32), _mm512_mul_ps(minima, scale), held);
                        }
                        _mm512_storeu_ps(total.as_mut_ptr(), held);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::block_layout::{LaidOut, lay_out};
    use super::super::packed::Format;
    use super::super::{SharedOut, unfilled};
    use super::*;
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};

    fn number(i: usize) -> f32 {
        ((i * 7919 + 13) % 2_003) as f32 / 1_001.0 - 1.0
    }

    /// Weights of a type, and what they stand for.
    fn weights(of: BlockType, rows: usize, k: usize) -> (LaidOut, Vec<f32>) {
        let values = Tensor::from_vec((0..rows * k).map(number).collect(), (rows, k), &Device::Cpu).unwrap();
        let quantised = QTensor::quantize(&values, of.ggml()).unwrap();
        let plain = quantised.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        (lay_out(of, &quantised.data().unwrap(), rows, k), plain)
    }

    fn view(of: BlockType, laid: &LaidOut, rows: usize, k: usize) -> Weights<'_> {
        Weights { format: Format::Blocks(of), lines: &laid.lines, scales: &laid.scales, parts: &laid.parts, row_steps: k / STEP, rows }
    }

    #[test]
    fn every_kernel_gives_the_same_bits_near_the_product_of_the_plain_weights() {
        for of in BlockType::ALL {
            for (tokens, rows, k) in [(1, 5, 256), (3, 16, 512), (7, 40, 768), (33, 50, 256), (15, 33, 512), (70, 64, 768)] {
                let (laid, w) = weights(of, rows, k);
                let weights = view(of, &laid, rows, k);
                let x: Vec<f32> = (0..tokens * k).map(|i| number(i * 31 + 7)).collect();
                let rounded = Rounded::new(&x, tokens, k, &of.layout());
                let by = |kernel: Kernel| {
                    let mut y = unfilled(tokens * rows);
                    run(kernel, &rounded, tokens, &Product { weights, y: SharedOut(y.as_mut_ptr()) }, 0..rows.div_ceil(GROUP));
                    y
                };
                let plain = by(Kernel::Plain);
                for row in 0..rows {
                    for column in 0..k {
                        assert!((weights.at(row, column) - w[row * k + column]).abs() < 1e-5, "{of:?} {row} {column}");
                    }
                    for token in 0..tokens {
                        let exact: f64 = (0..k).map(|i| f64::from(w[row * k + i]) * f64::from(x[token * k + i])).sum();
                        let found = f64::from(plain[token * rows + row]);
                        // activations of up to 1 are rounded to 127ths
                        assert!((found - exact).abs() < 0.01 * (k as f64).sqrt(), "{of:?} {tokens} {rows} {k}: {found} {exact}");
                    }
                }
                #[cfg(target_arch = "x86_64")]
                if super::super::q8::vnni::available() {
                    assert_eq!(by(Kernel::Vnni), plain);
                }
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                if super::super::q8::vnni::available() && super::super::amx::bytes_available() {
                    assert_eq!(by(Kernel::Amx), plain);
                }
                let mut y = unfilled(tokens * rows);
                multiply(&x, tokens, k, &[Product { weights, y: SharedOut(y.as_mut_ptr()) }], of);
                assert_eq!(y, plain);
                // a token alone has the bits that it has among others
                let mut alone = unfilled(rows);
                multiply(&x[(tokens - 1) * k..], 1, k, &[Product { weights, y: SharedOut(alone.as_mut_ptr()) }], of);
                assert_eq!(alone, plain[(tokens - 1) * rows..]);
            }
        }
    }

    #[test]
    fn the_first_columns_are_a_matrix_of_their_own() {
        let (rows, k, tokens) = (20, 512, 3);
        for of in BlockType::ALL {
            let (laid, _) = weights(of, rows, k);
            for narrow in [296, 40] {
                let x: Vec<f32> = (0..tokens * narrow).map(number).collect();
                let padded: Vec<f32> = x.chunks(narrow).flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, k - narrow))).collect();
                let by = |x: &[f32], k: usize| {
                    let mut y = unfilled(tokens * rows);
                    multiply(x, tokens, k, &[Product { weights: view(of, &laid, rows, 512), y: SharedOut(y.as_mut_ptr()) }], of);
                    y
                };
                assert_eq!(by(&x, narrow), by(&padded, k), "{of:?}");
            }
        }
    }

    #[test]
    fn activations_that_are_not_finite_come_out_as_nan() {
        let (laid, _) = weights(BlockType::Q4K, 16, 256);
        let mut x = vec![1f32; 2 * 256];
        x[300] = f32::INFINITY;
        let mut y = unfilled(2 * 16);
        multiply(&x, 2, 256, &[Product { weights: view(BlockType::Q4K, &laid, 16, 256), y: SharedOut(y.as_mut_ptr()) }], BlockType::Q4K);
        assert!(y[..16].iter().all(|v| v.is_finite()) && y[16..].iter().all(|v| v.is_nan()));
    }
}
