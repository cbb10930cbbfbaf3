//! Weights laid out for vector instructions: sixteen rows side by side, 32 inputs at a time. A product reads them once, in order, as fast as memory
//! gives them, and tiles and vectors take them as they are.

use super::ggml::BlockType;
use super::{SharedOut, bf16, f16 as half_precision, q8, team};
use super::{block_layout, blocks};
use half::f16;

/// Rows that lie side by side.
pub(crate) const GROUP: usize = 16;
/// Inputs of a step.
pub(crate) const STEP: usize = 32;
/// Multiply-adds below which splitting over threads costs more than it saves.
const SERIAL_BELOW: usize = 64 * 1024;
/// A task's weights stay in the second-level cache, where all tokens find them.
const TASK_BYTES: usize = 512 * 1024;

/// A cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub [u8; 64]);

/// Asks memory for a line that is needed soon; one that isn't there does no harm. Loads alone, which wait for their data in order, leave the memory idle.
#[inline(always)]
pub(super) fn ask(line: *const Line) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has SSE, and this reads nothing
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// What the numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// [groups][steps][16 pairs of inputs][16 rows][2].
    Bf16,
    /// [groups][steps][32 inputs][16 rows].
    F16,
    /// [groups][steps][8 x 4 inputs][16 rows][4], and scales [groups][steps][16 rows].
    Q8,
    /// Planes of bits, scales and parts of scales: as [`blocks`] says.
    Blocks(BlockType),
}

impl Format {
    /// Cache lines of a group's step.
    pub fn lines(self) -> usize {
        match self {
            Self::Bf16 => bf16::LINES,
            Self::F16 => half_precision::LINES,
            Self::Q8 => q8::LINES,
            Self::Blocks(of) => of.layout().bits,
        }
    }
}

/// Some first rows and columns of laid out weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weights<'a> {
    pub format: Format,
    pub lines: &'a [Line],
    /// None for bf16 and f16.
    pub scales: &'a [f16],
    /// What scales are multiplied with, of the types that have such parts.
    pub parts: &'a [u8],
    /// Steps of a whole row.
    pub row_steps: usize,
    /// Rows that are used.
    pub rows: usize,
}

impl Weights<'_> {
    /// A group's lines from a step on.
    pub fn step(&self, group: usize, step: usize) -> &[Line] {
        &self.lines[(group * self.row_steps + step) * self.format.lines()..]
    }

    /// The scales of a group's step.
    pub fn scales(&self, group: usize, step: usize) -> &[f16; GROUP] {
        &self.scales[(group * self.row_steps + step) * GROUP..].as_chunks().0[0]
    }

    /// A weight as a plain number.
    pub fn at(&self, row: usize, column: usize) -> f32 {
        let (lines, own) = (self.step(row / GROUP, column / STEP), row % GROUP);
        match self.format {
            Format::Bf16 => bf16::at(lines, own, column % STEP),
            Format::F16 => half_precision::at(lines, own, column % STEP),
            Format::Blocks(of) => block_layout::at(self, of, row, column),
            Format::Q8 => q8::at(lines, own, column % STEP) * self.scales(row / GROUP, column / STEP)[own].to_f32(),
        }
    }
}

/// A product's weights [out, k] and where its results [tokens, out] go.
pub(crate) struct Product<'a> {
    pub weights: Weights<'a>,
    pub y: SharedOut,
}

impl Product<'_> {
    /// Writes the results of a group's rows for one token, of which the caller has made sure that nobody else writes them.
    pub fn write(&self, token: usize, group: usize, results: &[f32; GROUP]) {
        let rows = self.weights.rows;
        let count = GROUP.min(rows - group * GROUP);
        // SAFETY: within the result, and this task's part of it
        unsafe { self.y.get().add(token * rows + group * GROUP).copy_from_nonoverlapping(results.as_ptr(), count) };
    }
}

/// x [tokens, k] times every product's weights transposed; all in one format. A row's bits depend on that row of x alone.
pub(crate) fn multiply(x: &[f32], tokens: usize, k: usize, products: &[Product<'_>]) {
    assert!(x.len() >= tokens * k, "whole rows");
    let steps = k.div_ceil(STEP);
    for p in products {
        let weights = &p.weights;
        assert!(
            steps <= weights.row_steps && weights.rows.div_ceil(GROUP) * weights.row_steps * weights.format.lines() <= weights.lines.len(),
            "a view inside"
        );
    }
    match products.first().map(|p| p.weights.format) {
        Some(Format::Bf16) => bf16::multiply(x, tokens, k, products),
        Some(Format::F16) => half_precision::multiply(x, tokens, k, products),
        Some(Format::Q8) => q8::multiply(x, tokens, k, products),
        Some(Format::Blocks(of)) => blocks::multiply(x, tokens, k, products, of),
        None => {}
    }
}

/// Runs `task(product, groups)` over all groups of all products, an even number at a time but for a product's last.
pub(crate) fn each_groups(products: &[Product<'_>], tokens: usize, k: usize, task: impl Fn(&Product<'_>, std::ops::Range<usize>) + Sync) {
    let outputs: usize = products.iter().map(|p| p.weights.rows).sum();
    let serial = rayon::current_num_threads() == 1 || tokens * k * outputs < SERIAL_BELOW;
    // a few tasks a thread even out their ends
    let shared = if serial { usize::MAX } else { outputs.div_ceil(GROUP).div_ceil(rayon::current_num_threads() * 4) };
    let group_bytes = products.iter().map(|p| k.div_ceil(STEP) * p.weights.format.lines() * 64).max().unwrap_or(1);
    let groups = (TASK_BYTES / group_bytes.max(1)).min(shared).max(2).next_multiple_of(2);
    let all = |p: &Product<'_>| p.weights.rows.div_ceil(GROUP);
    let tasks: Vec<(usize, usize)> = products.iter().enumerate().flat_map(|(i, p)| (0..all(p)).step_by(groups).map(move |from| (i, from))).collect();
    let run = |&(i, from): &(usize, usize)| task(&products[i], from..(from + groups).min(all(&products[i])));
    if serial { tasks.iter().for_each(run) } else { team::for_each(tasks.len(), |i| run(&tasks[i])) }
}
