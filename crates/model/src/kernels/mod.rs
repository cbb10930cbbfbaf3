//! CPU kernels of our own, where the tensor library's miss the machine's bound or make a row depend on its neighbours.
//!
//! Every result here is a function of its own row alone: the order in which products are summed is fixed by the length of
//! the sum, never by how many rows, columns or threads there are. A sequence therefore gets the same tokens alone and
//! in a batch, in one prefill chunk and in several, on one thread and on many.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
pub(crate) mod attention;
pub(crate) mod dot;
pub(crate) mod elementwise;
pub mod matmul;

use crate::Result;
use candle_core::{CpuStorage, Storage, Tensor};
use half::bf16;

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

/// Calls `f` with a bf16 CPU matrix [out, in] (in-adjacent elements; rows may be longer than `in`) from its first element on, and its rows' stride.
pub(crate) fn with_bf16_rows<T>(matrix: &Tensor, f: impl FnOnce(&[bf16], usize) -> T) -> Result<T> {
    let strides = matrix.stride();
    let matrix = if strides[1] == 1 || matrix.dims()[1] == 1 { matrix.clone() } else { matrix.contiguous()? };
    let stride = matrix.stride()[0];
    let (storage, layout) = matrix.storage_and_layout();
    let Storage::Cpu(CpuStorage::BF16(values)) = &*storage else {
        return Err(crate::Error::Device(format!("a CPU kernel was given a {:?} matrix on {:?}", matrix.dtype(), matrix.device())));
    };
    Ok(f(&values[layout.start_offset()..], stride))
}

/// A vector of `len` elements, all of which `fill` writes: the memory is not cleared before.
pub(crate) fn filled(len: usize, fill: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<Vec<f32>> {
    let mut values: Vec<f32> = Vec::with_capacity(len);
    // SAFETY: the kernels write every element and read none; any bits are an f32
    #[allow(clippy::uninit_vec)]
    unsafe {
        values.set_len(len);
    }
    fill(&mut values)?;
    Ok(values)
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

/// ln(sum(exp(values))), exact to f32, its order of sums fixed by the row's length.
pub fn log_sum_exp(values: &[f32]) -> f32 {
    elementwise::log_sum_exp(values)
}
