//! bf16 x bf16 -> f32 products by `vdpbf16ps` (AVX-512-BF16: AMD from Zen 4 on, Intel from Cooper Lake on): pairs of inputs of sixteen rows, an instruction.
//! A result is the sum over the pairs in order, whatever tokens are beside it.

use super::bf16_blocks::{Activations, BLOCK, TILE, Tile};
use super::packed::{Line, Weights, ask};
use std::arch::x86_64::*;

/// Whether the processor has it.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

/// As [`super::bf16_blocks::Prepared::multiply`].
///
/// # Safety
/// As there; [`available`] must be true.
#[target_feature(enable = "avx512f,avx512bf16")]
#[allow(clippy::too_many_arguments)] // two matrices, what of them, and where the result goes
pub(super) unsafe fn multiply(x: &Activations, token: usize, weights: &Weights<'_>, group: usize, outputs: usize, out: *mut f32, out_stride: usize) {
    let tokens = (x.tokens - token).min(BLOCK);
    // what few tokens read comes from memory
    let passes = if x.tokens <= BLOCK { tokens / 8 + (tokens % 8).count_ones() as usize } else { 0 };
    let (mut done, mut pass) = (0, 0);
    while done < tokens {
        let left = tokens - done;
        let tiles = x.tiles[(token + done) / TILE * x.steps..][..x.steps].as_ptr();
        let part = Part { tiles, row: done % TILE, steps: x.steps, ahead: Ahead::of(weights, outputs, pass, passes) };
        let to = out.wrapping_add(done * out_stride);
        // SAFETY: as this function's
        let count = unsafe {
            match (left, outputs > TILE) {
                (8.., true) => some::<8, 2>(&part, weights, group, outputs, to, out_stride),
                (8.., false) => some::<8, 1>(&part, weights, group, outputs, to, out_stride),
                (4.., true) => some::<4, 2>(&part, weights, group, outputs, to, out_stride),
                (4.., false) => some::<4, 1>(&part, weights, group, outputs, to, out_stride),
                (2.., true) => some::<2, 2>(&part, weights, group, outputs, to, out_stride),
                (2.., false) => some::<2, 1>(&part, weights, group, outputs, to, out_stride),
                (_, true) => some::<1, 2>(&part, weights, group, outputs, to, out_stride),
                (_, false) => some::<1, 1>(&part, weights, group, outputs, to, out_stride),
            }
        };
        (done, pass) = (done + count, pass + 1);
    }
}

/// Some tokens of a tile, for all steps.
struct Part {
    tiles: *const Tile,
    /// The first token's.
    row: usize,
    steps: usize,
    ahead: Ahead,
}

/// What is asked for while a step is computed: so many lines of each group, from so many lines behind the group's first one on.
struct Ahead {
    lines: usize,
    from: usize,
}

impl Ahead {
    /// Of several passes over the groups each asks for a part of the next groups, an only one for what is two steps ahead.
    fn of(weights: &Weights<'_>, outputs: usize, pass: usize, passes: usize) -> Self {
        match passes {
            0 => Self { lines: 0, from: 0 },
            1 => Self { lines: TILE, from: 2 * TILE },
            _ => {
                let lines = TILE.div_ceil(passes);
                Self { lines, from: outputs.div_ceil(TILE) * weights.row_steps * TILE + pass * weights.row_steps * lines }
            }
        }
    }
}

/// T tokens by G groups. Returns T.
///
/// # Safety
/// As [`multiply`]; the part must have T tokens.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn some<const T: usize, const G: usize>(part: &Part, weights: &Weights<'_>, group: usize, outputs: usize, out: *mut f32, out_stride: usize) -> usize {
    let groups: [&[Line]; G] = std::array::from_fn(|g| &weights.step(group + g, 0)[..part.steps * TILE]);
    let mut totals = [[_mm512_setzero_ps(); G]; T];
    for step in 0..part.steps {
        // SAFETY: a tile of every step
        let tile = unsafe { &(*part.tiles.add(step)).0 };
        for group in groups {
            // (beyond the last group it may be anywhere: asking is no reading)
            let ahead = group.as_ptr().wrapping_add(part.ahead.from + step * part.ahead.lines);
            (0..part.ahead.lines).for_each(|line| ask(ahead.wrapping_add(line)));
        }
        for pair in 0..TILE {
            let mut lines = [bits(_mm512_setzero_si512()); G];
            for (line, group) in lines.iter_mut().zip(groups) {
                // SAFETY: a line of each group's step
                *line = unsafe { load(group.as_ptr().add(step * TILE + pair)) };
            }
            for (t, totals) in totals.iter_mut().enumerate() {
                // SAFETY: the part has T tokens
                let x = bits(_mm512_set1_epi32(unsafe { tile.get_unchecked(part.row + t)[pair] }.cast_signed()));
                for (total, line) in totals.iter_mut().zip(lines) {
                    *total = _mm512_dpbf16_ps(*total, line, x);
                }
            }
        }
    }
    for (t, totals) in totals.iter().enumerate() {
        for (g, total) in totals.iter().enumerate() {
            let rows = (outputs - g * TILE).min(TILE);
            // SAFETY: as this function's, of the rows that there are
            unsafe { _mm512_mask_storeu_ps(out.add(t * out_stride + g * TILE), ((1u32 << rows) - 1) as __mmask16, *total) };
        }
    }
    T
}

/// # Safety
/// The line must be there.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn load(line: *const Line) -> __m512bh {
    // SAFETY: 64 bytes on a cache line
    bits(unsafe { _mm512_load_si512(line.cast()) })
}

/// Sixteen pairs of bf16.
#[target_feature(enable = "avx512f,avx512bf16")]
fn bits(pairs: __m512i) -> __m512bh {
    // SAFETY: the same 512 bits
    unsafe { std::mem::transmute(pairs) }
}
