//! bf16 x bf16 -> f32 products on AMX tiles (Intel, from Sapphire Rapids on): 16 x 16 results from 32 products each, an instruction.
//!
//! Of the two matrices of a product, one goes into tiles row by row, the other as pairs: two inputs of a row side by side. With few tokens the
//! weights are the first, as they lie in memory, and the activations are paired. With many tokens it is the other way round: a panel of the
//! weights is paired once and stays in the cache, and results land where they belong. A result is the sum over k in order, 32 at a time, whatever
//! tokens are beside it and whichever way it was made.

use half::bf16;
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

/// Rows and columns of a tile of results.
const TILE: usize = 16;
/// Outputs and tokens that are computed together: two by two tiles.
pub(super) const BLOCK: usize = 2 * TILE;
/// Inputs of one tile: the number of inputs must be a multiple.
pub(super) const DEPTH: usize = 32;
/// Pairs of bf16 in a tile.
const TILE_PAIRS: usize = TILE * DEPTH / 2;

/// Memory of tiles: a row of a tile is one cache line, and loads at half the speed when it is parts of two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([u32; TILE]);

/// Lines that a thread uses again, as many as it needed at most.
#[derive(Default)]
pub(super) struct Lines(Vec<Line>);

impl Lines {
    /// Room for so many pairs of bf16; what is in it is of no meaning.
    pub fn pairs(&mut self, len: usize) -> &mut [u32] {
        self.0.resize(self.0.len().max(len.div_ceil(TILE)), Line([0; TILE]));
        // SAFETY: a line is sixteen u32
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }
}

/// Whether the processor has the tiles and the system lets this process use them.
pub(super) fn available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        // CPUID.(EAX=7, ECX=0):EDX, bits 22 (AMX-BF16) and 24 (AMX-TILE)
        let features = __cpuid_count(7, 0).edx;
        let has = features >> 22 & 1 == 1 && features >> 24 & 1 == 1 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
        /// Linux asks that a process requests the tiles' state (18) before it uses them.
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        // SAFETY: a request that changes nothing but the permission
        has && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, 18) } == 0
    })
}

/// The tiles' shapes for this thread, until it is dropped: eight of 16 rows of 64 bytes.
pub(super) struct Tiles;

impl Tiles {
    /// [`available`] must be true.
    pub fn configure() -> Self {
        #[repr(C, align(64))]
        struct Configuration([u8; 64]);
        let mut configuration = Configuration([0; 64]);
        configuration.0[0] = 1;
        for tile in 0..8 {
            configuration.0[16 + 2 * tile] = 64;
            configuration.0[48 + tile] = TILE as u8;
        }
        // SAFETY: the instruction exists (the caller has checked) and reads these 64 bytes
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly)) };
        Self
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the thread has a configuration
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Pairs of a matrix of `rows` rows in tiles: [row blocks of 16][k / 32][16 x 16 pairs]. Absent rows are zeros, up to a multiple of [`BLOCK`].
pub(super) fn tiled_len(rows: usize, k: usize) -> usize {
    rows.next_multiple_of(BLOCK) * k / 2
}

/// Rounds the sixteen rows `first..` of x [rows, k] to the nearest bf16, ties to even, into `to`, of 16 * k / 2 pairs: tiles of [16 rows][16 pairs],
/// or `paired`, [16 pairs][16 rows].
pub(super) fn tile_activations(x: &[f32], rows: usize, k: usize, first: usize, paired: bool, to: &mut [u32]) {
    assert!(to.len() == TILE * k / 2 && k.is_multiple_of(DEPTH) && x.len() >= rows * k, "whole tiles");
    // SAFETY: only called where `available` has found the features; reads and writes stay within the slices just checked
    unsafe { round_tiles(x, rows, k, first, paired, to) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn round_tiles(x: &[f32], rows: usize, k: usize, first: usize, paired: bool, to: &mut [u32]) {
    for (step, tile) in to.chunks_exact_mut(TILE_PAIRS).enumerate() {
        let rounded: [__m512; TILE] = std::array::from_fn(|token| {
            if first + token >= rows {
                return _mm512_setzero_ps();
            }
            // SAFETY: 32 elements of a row that is there
            let (low, high) = unsafe {
                let at = x.as_ptr().add((first + token) * k + step * DEPTH);
                (_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(TILE)))
            };
            // SAFETY: the same 512 bits: sixteen pairs of bf16, in the order of memory
            unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low)) }
        });
        store(if paired { transpose(rounded) } else { rounded }, tile);
    }
}

/// Pairs the rows of w [outputs, k], `stride` elements apart: `to` has [`tiled_len`] pairs.
pub(super) fn pair_weights(w: &[bf16], stride: usize, outputs: usize, k: usize, to: &mut [u32]) {
    assert!(to.len() == tiled_len(outputs, k) && k.is_multiple_of(DEPTH) && w.len() >= (outputs.max(1) - 1) * stride + k, "whole tiles");
    // SAFETY: only called where `available` has found the features; reads and writes stay within the slices just checked
    unsafe { transpose_tiles(w, stride, outputs, k, to) }
}

#[target_feature(enable = "avx512f")]
unsafe fn transpose_tiles(w: &[bf16], stride: usize, outputs: usize, k: usize, to: &mut [u32]) {
    for (i, tile) in to.chunks_exact_mut(TILE_PAIRS).enumerate() {
        let (first, step) = (i / (k / DEPTH) * TILE, i % (k / DEPTH));
        let rows: [__m512; TILE] = std::array::from_fn(|row| {
            if first + row >= outputs {
                return _mm512_setzero_ps();
            }
            // SAFETY: 32 elements of a row that is there
            unsafe { _mm512_loadu_ps(w.as_ptr().add((first + row) * stride + step * DEPTH).cast()) }
        });
        store(transpose(rows), tile);
    }
}

#[target_feature(enable = "avx512f")]
fn store(rows: [__m512; TILE], tile: &mut [u32]) {
    for (to, row) in tile.chunks_exact_mut(TILE).zip(rows) {
        // SAFETY: sixteen elements
        unsafe { _mm512_storeu_ps(to.as_mut_ptr().cast(), row) };
    }
}

/// Results of two by two tiles, [32][32].
#[repr(C, align(64))]
struct Results([f32; BLOCK * BLOCK]);

/// Computes [`BLOCK`] outputs for [`BLOCK`] tokens with the weights as they lie in memory: `out[t * out_stride + o]` for the first `tokens` tokens
/// and `outputs` outputs.
///
/// # Safety
/// [`Tiles::configure`] must have been called on this thread. `w` must have [`BLOCK`] readable rows of `k` elements, `w_stride` apart; `x` must be
/// two paired blocks of 16 tokens; `out` must be writable where it is written.
#[allow(clippy::too_many_arguments)] // two matrices and where the result goes
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn few_tokens(w: *const bf16, w_stride: usize, x: *const u32, k: usize, tokens: usize, outputs: usize, out: *mut f32, out_stride: usize) {
    let mut results = MaybeUninit::<Results>::uninit();
    // SAFETY: as this function's; `results` has 32 rows of 32
    unsafe {
        multiply(w, w_stride, DEPTH, TILE * w_stride, x, k, results.as_mut_ptr().cast(), BLOCK);
        let results = &results.assume_init_ref().0;
        for (o, t) in [(0, 0), (0, TILE), (TILE, 0), (TILE, TILE)] {
            if o >= outputs || t >= tokens {
                continue;
            }
            let (columns, rows) = ((outputs - o).min(TILE), (tokens - t).min(TILE));
            let to = out.add(t * out_stride + o);
            let turned = transpose(std::array::from_fn(|i| _mm512_load_ps(results.as_ptr().add((o + i) * BLOCK + t))));
            for (row, values) in turned.iter().enumerate().take(rows) {
                _mm512_mask_storeu_ps(to.add(row * out_stride), (1u32 << columns).wrapping_sub(1) as __mmask16, *values);
            }
        }
    }
}

/// Computes [`BLOCK`] outputs for [`BLOCK`] tokens with paired weights: as [`few_tokens`].
///
/// # Safety
/// [`Tiles::configure`] must have been called on this thread. `w` must be two paired blocks of 16 rows, `x` two blocks of 16 tokens in tiles; `out`
/// must be writable where it is written.
pub(super) unsafe fn many_tokens(w: *const u32, x: *const u32, k: usize, tokens: usize, outputs: usize, out: *mut f32, out_stride: usize) {
    // SAFETY: as this function's; `results` has 32 rows of 32
    unsafe {
        if tokens == BLOCK && outputs == BLOCK {
            return multiply(x.cast(), DEPTH, TILE * DEPTH, TILE * k, w, k, out, out_stride);
        }
        let mut results = MaybeUninit::<Results>::uninit();
        multiply(x.cast(), DEPTH, TILE * DEPTH, TILE * k, w, k, results.as_mut_ptr().cast(), BLOCK);
        for token in 0..tokens {
            std::ptr::copy_nonoverlapping(results.as_ptr().cast::<f32>().add(token * BLOCK), out.add(token * out_stride), outputs);
        }
    }
}

/// Two by two tiles of results, `c` [32 rows of a][32 rows of b], rows `c_stride` apart.
///
/// # Safety
/// [`Tiles::configure`] must have been called on this thread. `a` must have 32 readable rows of k elements: a tile's rows `a_row` elements apart,
/// the next inputs' tile after `a_step`, the next rows' after `a_rows`. `b` must be two paired blocks; `c` writable.
#[allow(clippy::too_many_arguments)] // a view of a tiled matrix, a matrix and where the result goes
unsafe fn multiply(a: *const bf16, a_row: usize, a_step: usize, a_rows: usize, b: *const u32, k: usize, c: *mut f32, c_stride: usize) {
    let steps = k / DEPTH;
    // SAFETY: the loads stay within 32 rows of a and two paired blocks of b, the stores within 32 rows of c
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a0} + {ar} * 1]",
            "tileloadd tmm6, [{b0} + {line} * 1]",
            "tileloadd tmm7, [{b1} + {line} * 1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a1} + {ar} * 1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, {step}",
            "add {a1}, {step}",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            "tilestored [{c0} + {cs} * 1], tmm0",
            "tilestored [{c0} + {cs} * 1 + 64], tmm1",
            "tilestored [{c1} + {cs} * 1], tmm2",
            "tilestored [{c1} + {cs} * 1 + 64], tmm3",
            a0 = inout(reg) a => _,
            a1 = inout(reg) a.add(a_rows) => _,
            ar = in(reg) 2 * a_row,
            step = in(reg) 2 * a_step,
            b0 = inout(reg) b => _,
            b1 = inout(reg) b.add(steps * TILE_PAIRS) => _,
            line = in(reg) 64usize,
            n = inout(reg) steps => _,
            c0 = in(reg) c,
            c1 = in(reg) c.wrapping_add(TILE * c_stride),
            cs = in(reg) 4 * c_stride,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// The columns of a 16 x 16 matrix of 32-bit elements.
#[allow(clippy::needless_range_loop)] // indices name the registers of a butterfly
#[target_feature(enable = "avx512f")]
fn transpose(r: [__m512; TILE]) -> [__m512; TILE] {
    let zero = _mm512_setzero_ps();
    let (mut a, mut b, mut out) = ([zero; TILE], [zero; TILE], [zero; TILE]);
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    let low = |x: __m512, y: __m512| _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    let high = |x: __m512, y: __m512| _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    for i in (0..TILE).step_by(4) {
        b[i] = low(a[i], a[i + 2]);
        b[i + 1] = high(a[i], a[i + 2]);
        b[i + 2] = low(a[i + 1], a[i + 3]);
        b[i + 3] = high(a[i + 1], a[i + 3]);
    }
    // b[4 g + c] has, in its four lanes, columns c, c + 4, c + 8 and c + 12 of rows 4 g .. 4 g + 4
    for c in 0..4 {
        let even = [_mm512_shuffle_f32x4::<0x88>(b[c], b[4 + c]), _mm512_shuffle_f32x4::<0x88>(b[8 + c], b[12 + c])];
        let odd = [_mm512_shuffle_f32x4::<0xdd>(b[c], b[4 + c]), _mm512_shuffle_f32x4::<0xdd>(b[8 + c], b[12 + c])];
        out[c] = _mm512_shuffle_f32x4::<0x88>(even[0], even[1]);
        out[c + 8] = _mm512_shuffle_f32x4::<0xdd>(even[0], even[1]);
        out[c + 4] = _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]);
        out[c + 12] = _mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]);
    }
    out
}
