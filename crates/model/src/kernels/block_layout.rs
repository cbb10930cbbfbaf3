//! How weights in the block types of GGUF ([`BlockType`]) are held, at their size.
//!
//! The numbers lie in planes of four, two and one bits (five bits: a plane of four, then one of one), sixteen rows side by side as VNNI takes them: line
//! `i % p` of a plane of p bits holds in its bits from `i / p * p` on what the inputs 4 i .. 4 i + 4 have there.

use super::ggml::{Block, BlockType, Layout};
use super::packed::{GROUP, Line, STEP, Weights};
use half::f16;
use rayon::prelude::*;

/// Laid out weights.
pub(crate) struct LaidOut {
    pub lines: Vec<Line>,
    /// [groups][blocks of a row]([16 rows] scales, [16 rows] minima where there are any).
    pub scales: Vec<f16>,
    /// Of types whose blocks have parts: [groups][steps][parts of a step]([16 rows] factors of the scale, [16 rows] of the minimum where there are any).
    pub parts: Vec<u8>,
}

impl Layout {
    /// Steps that share a scale.
    pub fn span(&self) -> usize {
        self.block / STEP
    }

    /// Parts of a step.
    pub fn halves(&self) -> usize {
        STEP / self.part
    }

    /// 16-bit numbers of a group's block.
    pub fn scales(&self) -> usize {
        if self.minima { 2 * GROUP } else { GROUP }
    }

    /// Bytes of a group's step.
    pub fn parts(&self) -> usize {
        if self.block == STEP { 0 } else { self.halves() * self.scales() }
    }

    /// Bytes of a matrix as it is held.
    pub fn held_bytes(&self, rows: usize, columns: usize) -> usize {
        let (groups, steps) = (rows.div_ceil(GROUP), columns.div_ceil(STEP));
        groups * (steps * (self.bits * 64 + self.parts()) + steps.div_ceil(self.span()) * self.scales() * size_of::<f16>())
    }
}

/// Lays out the blocks of w [rows, columns] in ggml's bytes; absent rows are zeros. A row is a whole number of blocks.
pub(crate) fn lay_out(of: BlockType, bytes: &[u8], rows: usize, columns: usize) -> LaidOut {
    let layout = of.layout();
    let (steps, blocks, groups) = (columns / STEP, columns / layout.block, rows.div_ceil(GROUP));
    assert!(bytes.len() >= rows * blocks * layout.bytes && columns.is_multiple_of(layout.block), "whole rows of whole blocks");
    let mut laid = LaidOut {
        lines: vec![Line([0; 64]); groups * steps * layout.bits],
        scales: vec![f16::ZERO; groups * blocks * layout.scales()],
        parts: vec![0; groups * steps * layout.parts()],
    };
    let lines = laid.lines.par_chunks_mut((steps * layout.bits).max(1));
    let scales = laid.scales.par_chunks_mut((blocks * layout.scales()).max(1));
    let mut rest = laid.parts.as_mut_slice();
    let mut own_parts = |_| {
        let (own, after) = std::mem::take(&mut rest).split_at_mut(steps * layout.parts());
        rest = after;
        own
    };
    let parts: Vec<&mut [u8]> = (0..groups).map(&mut own_parts).collect();
    lines.zip(scales).zip(parts).enumerate().for_each(|(group, ((lines, scales), parts))| {
        for row in 0..GROUP.min(rows - group * GROUP) {
            for block in 0..blocks {
                let at = ((group * GROUP + row) * blocks + block) * layout.bytes;
                put(&layout, &of.unpack(&bytes[at..at + layout.bytes]), row, block, lines, scales, parts);
            }
        }
    });
    laid
}

/// Puts a block of a row where it belongs in its group.
fn put(layout: &Layout, block: &Block, row: usize, index: usize, lines: &mut [Line], scales: &mut [f16], parts: &mut [u8]) {
    let own = &mut scales[index * layout.scales()..];
    own[row] = block.scale;
    if layout.minima {
        own[GROUP + row] = block.minimum;
    }
    for step in 0..layout.span() {
        let at = index * layout.span() + step;
        let lines = &mut lines[at * layout.bits..][..layout.bits];
        for column in 0..STEP {
            let (i, byte) = (column / 4, 4 * row + column % 4);
            let mut number = block.numbers[step * STEP + column];
            let mut first = 0;
            for plane in planes(layout.bits) {
                lines[first + i % plane].0[byte] |= (number & ((1 << plane) - 1)) << (i / plane * plane);
                number >>= plane;
                first += plane;
            }
        }
        if layout.parts() > 0 {
            let parts = &mut parts[at * layout.parts()..][..layout.parts()];
            for half in 0..layout.halves() {
                let part = &mut parts[half * layout.scales()..];
                part[row] = block.scales[step * layout.halves() + half].cast_unsigned();
                if layout.minima {
                    part[GROUP + row] = block.minima[step * layout.halves() + half];
                }
            }
        }
    }
}

/// The planes of numbers of so many bits, from the lowest bits on.
fn planes(bits: usize) -> impl Iterator<Item = usize> {
    [4, 2, 1].into_iter().filter(move |plane| bits & plane != 0)
}

/// A weight as a plain number.
pub(super) fn at(weights: &Weights<'_>, of: BlockType, row: usize, column: usize) -> f32 {
    let layout = of.layout();
    let (group, own, step, within) = (row / GROUP, row % GROUP, column / STEP, column % STEP);
    let (i, byte) = (within / 4, 4 * own + within % 4);
    let (lines, mut number, mut first, mut shift) = (weights.step(group, step), 0u8, 0, 0);
    for plane in planes(layout.bits) {
        number |= (lines[first + i % plane].0[byte] >> (i / plane * plane) & ((1 << plane) - 1)) << shift;
        (first, shift) = (first + plane, shift + plane);
    }
    let blocks = weights.row_steps.div_ceil(layout.span());
    let scales = &weights.scales[(group * blocks + step / layout.span()) * layout.scales()..];
    let parts = weights.parts.get((group * weights.row_steps + step) * layout.parts() + within / layout.part * layout.scales()..);
    let factors = parts.filter(|_| layout.parts() > 0);
    let scale = scales[own].to_f32() * factors.map_or(1.0, |parts| f32::from(parts[own].cast_signed()));
    let minimum = if layout.minima { scales[GROUP + own].to_f32() * factors.map_or(1.0, |parts| f32::from(parts[GROUP + own])) } else { 0.0 };
    scale * (i32::from(number) - layout.offset) as f32 - minimum
}
