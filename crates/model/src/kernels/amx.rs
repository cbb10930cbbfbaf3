//! bf16 x bf16 -> f32 products on AMX tiles (Intel, from Sapphire Rapids on): 16 x 16 results from 32 products each, an instruction.
//!
//! A weight's rows go into a tile as they lie in memory; what is packed is the activations, once a call: sixteen tokens by 32 inputs, two inputs of
//! a token side by side. A result is the sum over k in order, 32 at a time, whatever tokens are beside it.

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
/// Elements (pairs of bf16) of a packed tile.
const PACKED: usize = TILE * DEPTH / 2;

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

/// Activations rounded to bf16 and laid out for tiles: [token blocks of 16][k / 32][16 pairs][16 tokens]. Absent tokens are zeros, up to a multiple
/// of [`BLOCK`].
pub(super) fn packed_len(rows: usize, k: usize) -> usize {
    rows.next_multiple_of(BLOCK) * k / 2
}

/// Packs the sixteen rows `first..` of x [rows, k] into `to`, of 16 * k / 2 elements; each number becomes the nearest bf16, ties to even.
pub(super) fn pack(x: &[f32], rows: usize, k: usize, first: usize, to: &mut [u32]) {
    assert!(to.len() == TILE * k / 2 && k.is_multiple_of(DEPTH) && x.len() >= rows * k, "whole tiles");
    // SAFETY: only called where `available` has found the features; reads and writes stay within the slices just checked
    unsafe { pack_tiles(x, rows, k, first, to) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pack_tiles(x: &[f32], rows: usize, k: usize, first: usize, to: &mut [u32]) {
    for (step, tile) in to.chunks_exact_mut(PACKED).enumerate() {
        let pairs: [__m512; TILE] = std::array::from_fn(|token| {
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
        for (row, values) in transpose(pairs).into_iter().enumerate() {
            // SAFETY: sixteen rows of sixteen elements
            unsafe { _mm512_storeu_ps(tile.as_mut_ptr().add(row * TILE).cast(), values) };
        }
    }
}

/// Computes [`BLOCK`] outputs for [`BLOCK`] tokens: `out[t * out_stride + o]` for the first `tokens` tokens and `outputs` outputs.
///
/// # Safety
/// [`Tiles::configure`] must have been called on this thread. `w` must have [`BLOCK`] readable rows of `k` bf16 elements, `w_stride` elements apart;
/// `x` must be two packed blocks of 16 tokens; `out` must be writable where it is written.
#[allow(clippy::too_many_arguments)] // two matrices and where the result goes
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn block(w: *const bf16, w_stride: usize, x: *const u32, k: usize, tokens: usize, outputs: usize, out: *mut f32, out_stride: usize) {
    #[repr(C, align(64))]
    struct Results([[f32; TILE * TILE]; 4]);
    let mut results = MaybeUninit::<Results>::uninit();
    let steps = k / DEPTH;
    // SAFETY: the loads stay within 32 rows of w and two packed blocks of x, the stores within `results`
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{w0} + {ws} * 1]",
            "tileloadd tmm6, [{x0} + {xs} * 1]",
            "tileloadd tmm7, [{x1} + {xs} * 1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{w1} + {ws} * 1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {w0}, 64",
            "add {w1}, 64",
            "add {x0}, 1024",
            "add {x1}, 1024",
            "dec {n}",
            "jnz 2b",
            "tilestored [{c} + {xs} * 1], tmm0",
            "add {c}, 1024",
            "tilestored [{c} + {xs} * 1], tmm1",
            "add {c}, 1024",
            "tilestored [{c} + {xs} * 1], tmm2",
            "add {c}, 1024",
            "tilestored [{c} + {xs} * 1], tmm3",
            w0 = inout(reg) w => _,
            w1 = inout(reg) w.add(TILE * w_stride) => _,
            ws = in(reg) 2 * w_stride,
            x0 = inout(reg) x => _,
            x1 = inout(reg) x.add(steps * PACKED) => _,
            xs = in(reg) 64usize,
            n = inout(reg) steps => _,
            c = inout(reg) results.as_mut_ptr() => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
        // all four tiles have been stored
        for (tile, values) in results.assume_init_ref().0.iter().enumerate() {
            let (o, t) = (tile / 2 * TILE, tile % 2 * TILE);
            if o >= outputs || t >= tokens {
                continue;
            }
            let (columns, rows) = ((outputs - o).min(TILE), (tokens - t).min(TILE));
            let to = out.add(t * out_stride + o);
            let turned = transpose(std::array::from_fn(|i| _mm512_load_ps(values.as_ptr().add(i * TILE))));
            for (row, values) in turned.iter().enumerate().take(rows) {
                _mm512_mask_storeu_ps(to.add(row * out_stride), (1u32 << columns).wrapping_sub(1) as __mmask16, *values);
            }
        }
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
