//! bf16 x bf16 -> f32 products of up to 32 tokens by 32 outputs, by what a processor has for them: AMX's tiles, or `vdpbf16ps` of AVX-512. Both take activations
//! and weights laid out alike, and add up in orders of their own.

use super::packed::{GROUP, STEP, Weights};
use super::{amx, dpbf16, team};
use std::arch::x86_64::*;

/// Rows and columns of a tile of results.
pub(super) const TILE: usize = GROUP;
/// Tokens and outputs that are computed together: two by two tiles.
pub(super) const BLOCK: usize = 2 * TILE;
/// Tokens below which one thread tiles them all.
const SERIAL_BELOW: usize = 2 * BLOCK;

/// What a processor multiplies blocks with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// Tiles.
    Amx,
    /// `vdpbf16ps`.
    Dpbf16,
}

impl Unit {
    /// The faster one of those that there are.
    pub fn best() -> Option<Self> {
        if amx::available() {
            return Some(Self::Amx);
        }
        dpbf16::available().then_some(Self::Dpbf16)
    }

    /// Prepares this thread, until the result is dropped. The processor must have it.
    pub fn prepare(self) -> Prepared {
        match self {
            Self::Amx => Prepared::Amx(amx::Tiles::configure()),
            Self::Dpbf16 => Prepared::Dpbf16,
        }
    }
}

/// A thread that may multiply blocks.
pub(super) enum Prepared {
    Amx(amx::Tiles),
    Dpbf16,
}

impl Prepared {
    /// The results of up to [`BLOCK`] tokens from `token` on, a multiple of that, and the first `outputs` rows, at most [`BLOCK`], of `group` and the next one:
    /// `out[t * out_stride + o]`.
    ///
    /// # Safety
    /// `out` must be writable where it is written; the weights must have the activations' steps and the groups that the outputs are of.
    #[allow(clippy::too_many_arguments)] // two matrices, what of them, and where the result goes
    pub unsafe fn multiply(&self, x: &Activations, token: usize, weights: &Weights<'_>, group: usize, outputs: usize, out: *mut f32, out_stride: usize) {
        // SAFETY: as this function's; what was prepared is there
        unsafe {
            match self {
                Self::Amx(tiles) => tiles.multiply(x, token, weights, group, outputs, out, out_stride),
                Self::Dpbf16 => dpbf16::multiply(x, token, weights, group, outputs, out, out_stride),
            }
        }
    }
}

/// A tile's worth of activations: [16 tokens][16 pairs]. A row is one cache line, and loads at half the speed when it is parts of two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tile(pub [[u32; TILE]; TILE]);

thread_local! {
    /// Tiles that a thread uses again.
    static MEMORY: std::cell::Cell<Vec<Tile>> = const { std::cell::Cell::new(Vec::new()) };
}

/// Activations rounded to bf16: [token blocks of 16][steps] tiles. Absent tokens are zeros, up to a multiple of [`BLOCK`], and so are absent inputs.
pub(super) struct Activations {
    pub tiles: Vec<Tile>,
    pub tokens: usize,
    pub steps: usize,
}

impl Activations {
    /// Rounds x [tokens, k] to the nearest bf16, ties to even. The processor must have `vdpbf16ps`.
    pub fn new(x: &[f32], tokens: usize, k: usize) -> Self {
        assert!(x.len() >= tokens * k && dpbf16::available(), "whole rows, and what rounds them");
        let steps = k.div_ceil(STEP);
        let mut tiles = MEMORY.take();
        let needed = tokens.next_multiple_of(BLOCK) / TILE * steps;
        tiles.resize(tiles.len().max(needed), Tile([[0; TILE]; TILE]));
        // SAFETY: the features were found; reads stay within x
        let fill = |(block, tiles): (usize, &mut [Tile])| unsafe { round(x, tokens, k, block * TILE, tiles) };
        let own = &mut tiles[..needed];
        if tokens < SERIAL_BELOW {
            own.chunks_mut(steps.max(1)).enumerate().for_each(fill);
        } else {
            team::for_each_part(own, steps, |block, tiles| fill((block, tiles)));
        }
        Self { tiles, tokens, steps }
    }
}

impl Drop for Activations {
    fn drop(&mut self) {
        MEMORY.set(std::mem::take(&mut self.tiles));
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn round(x: &[f32], tokens: usize, k: usize, first: usize, tiles: &mut [Tile]) {
    for (step, tile) in tiles.iter_mut().enumerate() {
        let inputs = (k - step * STEP).min(STEP);
        let mask = |from: usize| ((1u32 << inputs.saturating_sub(from).min(TILE)) - 1) as __mmask16;
        for (row, to) in tile.0.iter_mut().enumerate() {
            if first + row >= tokens {
                *to = [0; TILE];
                continue;
            }
            let at = x[(first + row) * k + step * STEP..].as_ptr();
            // SAFETY: `inputs` elements of a row that is there; the same 512 bits: sixteen pairs of bf16, in the order of memory
            unsafe {
                let (low, high) = (_mm512_maskz_loadu_ps(mask(0), at), _mm512_maskz_loadu_ps(mask(TILE), at.wrapping_add(TILE)));
                let pairs = std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_store_ps(to.as_mut_ptr().cast(), pairs);
            }
        }
    }
}
