//! CPU kernels of our own, where the tensor library's miss the machine's bound or make a row depend on its neighbours.
//!
//! Every result here is a function of its own row alone: the order in which products are summed is fixed by the length of
//! the sum, never by how many rows, columns or threads there are. A sequence therefore gets the same tokens alone and
//! in a batch, in one prefill chunk and in several, on one thread and on many.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
pub(crate) mod attention;
pub(crate) mod bf16;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod bf16_blocks;
pub(crate) mod block_layout;
mod blocks;
pub(crate) mod dot;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod dpbf16;
pub(crate) mod elementwise;
pub(crate) mod f16;
pub(crate) mod ggml;
pub(crate) mod head;
pub mod matmul;
pub(crate) mod packed;
pub(crate) mod q8;
mod team;

pub use head::of_logits as log_probabilities;

use crate::Result;
use candle_core::{CpuStorage, Storage, Tensor};

/// Calls `f` with the elements of an f32 CPU tensor, without a copy where it is contiguous.
///
/// # Errors
/// [`crate::Error::Device`] for a tensor of another type or device.
pub fn with_slice<T>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => Ok(f(&values[start..end])),
        _ => Err(crate::Error::Device(format!("a CPU kernel was given a {:?} tensor on {:?}", tensor.dtype(), tensor.device()))),
    }
}

/// The matrix, or a copy of it whose rows' elements are adjacent (rows may be further apart).
pub(crate) fn with_adjacent(matrix: &Tensor) -> Result<Tensor> {
    let (_, columns) = matrix.dims2()?;
    Ok(if matrix.stride()[1] == 1 || columns == 1 { matrix.clone() } else { matrix.contiguous()? })
}

/// A vector of `len` elements, all of which `fill` writes: the memory is not cleared before.
pub(crate) fn filled(len: usize, fill: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<Vec<f32>> {
    let mut values = unfilled(len);
    fill(&mut values)?;
    Ok(values)
}

/// Memory for a kernel that writes every element and reads none before.
pub(crate) fn unfilled(len: usize) -> Vec<f32> {
    let mut values: Vec<f32> = Vec::with_capacity(len);
    // SAFETY: any bits are an f32
    #[allow(clippy::uninit_vec)]
    unsafe {
        values.set_len(len);
    }
    values
}

/// A pointer that may cross threads: each task writes elements of its own only.
#[derive(Clone, Copy)]
pub(crate) struct SharedOut(pub *mut f32);

// SAFETY: the kernels split their output into disjoint parts before they share it.
unsafe impl Send for SharedOut {}
// SAFETY: as above.
unsafe impl Sync for SharedOut {}

impl SharedOut {
    /// Through a method, so that closures capture the whole wrapper.
    pub fn get(self) -> *mut f32 {
        self.0
    }
}
