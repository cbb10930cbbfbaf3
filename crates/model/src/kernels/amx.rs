//! bf16 x bf16 -> f32 products on AMX tiles (Intel, from Sapphire Rapids on): 16 x 16 results from 32 products each, an instruction. A result is the
//! sum over k in order, 32 at a time, whatever tokens are beside it.

use super::bf16_blocks::{Activations, BLOCK, TILE, Tile};
use super::packed::Weights;
use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

/// Whether the processor has tiles of bf16 and the system lets this process use them.
pub(super) fn available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        /// Linux asks that a process requests the tiles' state (18) before it uses them.
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        let has = has_feature(22) && has_feature(24) && super::dpbf16::available();
        // SAFETY: a request that changes nothing but the permission
        has && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, 18) } == 0
    })
}

/// Whether there are tiles of bytes too.
pub(super) fn bytes_available() -> bool {
    // (a virtual machine answers CPUID slowly: asked once)
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| available() && has_feature(25))
}

/// CPUID.(EAX=7, ECX=0):EDX: bit 22 is AMX-BF16, 24 AMX-TILE, 25 AMX-INT8.
fn has_feature(bit: u32) -> bool {
    __cpuid_count(7, 0).edx >> bit & 1 == 1
}

/// The eight tiles' shapes for this thread, until it is dropped.
pub(super) struct Shapes(());

impl Shapes {
    /// Bytes of a row, and rows, of every tile. [`available`] must be true.
    pub fn configure(tiles: [(u8, u8); 8]) -> Self {
        #[repr(C, align(64))]
        struct Configuration([u8; 64]);
        let mut configuration = Configuration([0; 64]);
        configuration.0[0] = 1;
        for (tile, (bytes, rows)) in tiles.into_iter().enumerate() {
            configuration.0[16 + 2 * tile] = bytes;
            configuration.0[48 + tile] = rows;
        }
        // SAFETY: the instruction exists (the caller has checked) and reads these 64 bytes
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly)) };
        Self(())
    }
}

impl Drop for Shapes {
    fn drop(&mut self) {
        // SAFETY: the thread has a configuration
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Eight tiles of 16 rows of 64 bytes.
pub(super) struct Tiles(Shapes);

impl Tiles {
    /// [`available`] must be true.
    pub fn configure() -> Self {
        Self(Shapes::configure([(64, TILE as u8); 8]))
    }

    /// The results of up to [`BLOCK`] tokens from `token` on and the first `outputs` rows, at most [`BLOCK`], of `group` and the next one:
    /// `out[t * out_stride + o]`.
    ///
    /// # Safety
    /// `out` must be writable where it is written; the weights must have the activations' steps and the groups that the outputs are of.
    #[allow(clippy::too_many_arguments)] // two matrices, what of them, and where the result goes
    pub unsafe fn multiply(&self, x: &Activations, token: usize, weights: &Weights<'_>, group: usize, outputs: usize, out: *mut f32, out_stride: usize) {
        /// Results of two by two tiles, [32][32].
        #[repr(C, align(64))]
        struct Results([f32; BLOCK * BLOCK]);
        let tokens = (x.tokens - token).min(BLOCK);
        let first = token / TILE * x.steps;
        let a = [x.tiles[first..].as_ptr(), x.tiles[first + x.steps..].as_ptr()];
        // (where there is one group only, it is computed twice)
        let b = [group, if outputs > TILE { group + 1 } else { group }].map(|g| weights.step(g, 0).as_ptr());
        // what all tokens read in one pass comes from memory
        let four = if x.tokens <= BLOCK { four::<true> } else { four::<false> };
        if tokens == BLOCK && outputs == BLOCK {
            // SAFETY: as this function's
            return unsafe { four(a, b.map(<*const _>::cast), x.steps, out, out_stride) };
        }
        let mut results = MaybeUninit::<Results>::uninit();
        // SAFETY: as this function's; `results` has 32 rows of 32
        unsafe {
            four(a, b.map(<*const _>::cast), x.steps, results.as_mut_ptr().cast(), BLOCK);
            for t in 0..tokens {
                std::ptr::copy_nonoverlapping(results.as_ptr().cast::<f32>().add(t * BLOCK), out.add(t * out_stride), outputs);
            }
        }
    }
}

/// Bytes between what is asked for and what is loaded: two tiles.
const AHEAD: usize = 2048;

/// Two by two tiles of results, `c` [2 x 16 tokens][2 x 16 outputs], rows `c_stride` apart. With `STREAMS`, `b` is asked for some tiles ahead: loads alone, which
/// wait for their data in order, leave the memory idle.
///
/// # Safety
/// The tiles must be configured; `a` and `b` must be `steps` tiles each, `c` writable.
unsafe fn four<const STREAMS: bool>(a: [*const Tile; 2], b: [*const Tile; 2], steps: usize, c: *mut f32, c_stride: usize) {
    // SAFETY: as this function's
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "test {n}, {n}",
            "jz 3f",
            "2:",
            ".if {streams}",
            ".irp line, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "prefetcht0 [{b0} + {ahead} + 64 * \\line]",
            "prefetcht0 [{b1} + {ahead} + 64 * \\line]",
            ".endr",
            ".endif",
            "tileloadd tmm4, [{a0} + {line} * 1]",
            "tileloadd tmm6, [{b0} + {line} * 1]",
            "tileloadd tmm7, [{b1} + {line} * 1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a1} + {line} * 1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 1024",
            "add {a1}, 1024",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            "3:",
            "tilestored [{c0} + {cs} * 1], tmm0",
            "tilestored [{c0} + {cs} * 1 + 64], tmm1",
            "tilestored [{c1} + {cs} * 1], tmm2",
            "tilestored [{c1} + {cs} * 1 + 64], tmm3",
            a0 = inout(reg) a[0] => _,
            a1 = inout(reg) a[1] => _,
            b0 = inout(reg) b[0] => _,
            b1 = inout(reg) b[1] => _,
            line = in(reg) 64usize,
            streams = const STREAMS as usize,
            ahead = const AHEAD,
            n = inout(reg) steps => _,
            c0 = in(reg) c,
            c1 = in(reg) c.wrapping_add(TILE * c_stride),
            cs = in(reg) 4 * c_stride,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
