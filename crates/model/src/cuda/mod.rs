//! Our kernels on a GPU: what happens between the matrix products of a pass, in few launches (`kernels.cu`).

#[cfg(feature = "flash-attn")]
pub(crate) mod graphs;

use crate::{Error, Result};
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, DType, Storage, Tensor};

include!(concat!(env!("OUT_DIR"), "/ptx.rs"));

/// Threads of a block that goes over a long row.
const THREADS: u32 = 256;

/// A kernel's launch.
struct Launch<'a> {
    kernel: &'static str,
    /// The kernel's pointers, in order; what it computes in is the first one's type.
    tensors: &'a [&'a Tensor],
    /// What comes after them.
    numbers: &'a [u32],
    eps: Option<f32>,
    grid: (usize, usize),
    threads: u32,
}

impl Launch<'_> {
    fn run(&self) -> Result<()> {
        let first = self.tensors[0];
        let device = first.device().as_cuda_device()?;
        let suffix = match first.dtype() {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            other => return Err(Error::Device(format!("{}: expected f32, f16 or bf16, found {}", self.kernel, other.as_str()))),
        };
        let function = device.get_or_load_custom_func(&format!("{}_{suffix}", self.kernel), "evop", KERNELS)?;
        let pointers = self.tensors.iter().map(|tensor| pointer(tensor, device)).collect::<Result<Vec<_>>>()?;
        let mut builder = function.builder();
        for pointer in &pointers {
            builder.arg(pointer);
        }
        // (slots are u32, angles f32)
        if let Some(other) = self.tensors.iter().find(|t| t.dtype() != first.dtype() && !matches!(t.dtype(), DType::U32 | DType::F32)) {
            return Err(Error::Device(format!("{}: expected numbers in {}, found {}", self.kernel, first.dtype().as_str(), other.dtype().as_str())));
        }
        for number in self.numbers {
            builder.arg(number);
        }
        if let Some(eps) = &self.eps {
            builder.arg(eps);
        }
        let launch = LaunchConfig { grid_dim: (self.grid.0 as u32, self.grid.1 as u32, 1), block_dim: (self.threads, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the callers below give every kernel the arguments that its comment asks for, over tensors of those shapes; all work on a device's tensors
        // is on its one stream, in order
        unsafe { builder.launch(launch) }.w()?;
        Ok(())
    }
}

/// Where a tensor's first number lies on the device.
fn pointer(tensor: &Tensor, device: &CudaDevice) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let stream = device.cuda_stream();
    let first = layout.start_offset();
    match &*storage {
        Storage::Cuda(storage) => Ok(match &storage.slice {
            CudaStorageSlice::F32(slice) => slice.slice(first..).device_ptr(&stream).0,
            CudaStorageSlice::F16(slice) => slice.slice(first..).device_ptr(&stream).0,
            CudaStorageSlice::BF16(slice) => slice.slice(first..).device_ptr(&stream).0,
            CudaStorageSlice::U32(slice) => slice.slice(first..).device_ptr(&stream).0,
            _ => return Err(Error::Device(format!("a kernel was given numbers of type {}", tensor.dtype().as_str()))),
        }),
        _ => Err(Error::Device("a kernel was given a tensor of another device".into())),
    }
}

/// A tensor that a kernel fills.
fn unfilled(shape: impl Into<candle_core::Shape>, like: &Tensor) -> Result<Tensor> {
    // SAFETY: the kernels below write every number of what they are given as destination
    Ok(unsafe { Tensor::empty(shape, like.dtype(), like.device()) }?)
}

/// Numbers from one row to the next, where what follows the first dimension lies together.
fn row(of: &Tensor) -> Result<u32> {
    let inner: usize = of.dims()[1..].iter().product();
    let together = of.dim(0)? == 1 || of.narrow(0, 0, 1)?.is_contiguous();
    if !together {
        return Err(Error::Input(format!("rows of {inner} numbers that don't lie together: {:?}", of.layout())));
    }
    Ok(if of.dim(0)? == 1 { inner } else { of.stride()[0] } as u32)
}

/// Rotary embedding: q [tokens, heads, d] and k [tokens, kv_groups, d], whose rows may lie apart, by angles whose cosines and sines are
/// [1, tokens, d / 2] f32 each.
pub(crate) fn rotate(q: &Tensor, k: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<(Tensor, Tensor)> {
    let ((tokens, heads, d), groups) = (q.dims3()?, k.dim(1)?);
    let out = unfilled(tokens * (heads + groups) * d, q)?;
    let half = (d / 2) as u32;
    Launch {
        kernel: "rotate",
        tensors: &[q, k, cos, sin, &out],
        numbers: &[row(q)?, row(k)?, heads as u32, half],
        eps: None,
        grid: (tokens, heads + groups),
        threads: half.next_multiple_of(32).min(THREADS),
    }
    .run()?;
    let queries = tokens * heads * d;
    Ok((out.narrow(0, 0, queries)?.reshape((tokens, heads, d))?, out.narrow(0, queries, tokens * groups * d)?.reshape((tokens, groups, d))?))
}

/// Writes k and v [tokens, kv_groups, d], whose rows may lie apart, to the rows `slots` [tokens] u32 of the pools keys and values [rows, groups * d]: to a
/// row's first groups, where it has more.
pub(crate) fn cache(k: &Tensor, v: &Tensor, slots: &Tensor, keys: &Tensor, values: &Tensor) -> Result<()> {
    let ((tokens, groups, d), pool_row) = (k.dims3()?, keys.dim(1)?);
    if [v, keys, values].iter().any(|t| t.dtype() != k.dtype()) {
        return Err(Error::Device(format!(
            "keys and values are held in {} and computed in {}: on a GPU both are the same",
            keys.dtype().as_str(),
            k.dtype().as_str()
        )));
    }
    let width = (groups * d) as u32;
    Launch {
        kernel: "cache",
        tensors: &[k, v, slots, keys, values],
        numbers: &[row(k)?, row(v)?, width, pool_row as u32],
        eps: None,
        grid: (tokens, 2),
        threads: width.next_multiple_of(32).min(THREADS),
    }
    .run()
}

/// silu(gate) * up of [tokens, width] each, whose rows may lie apart.
pub(crate) fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (tokens, width) = gate.dims2()?;
    let out = unfilled((tokens, width), gate)?;
    let numbers = &[row(gate)?, row(up)?, width as u32];
    Launch { kernel: "silu_mul", tensors: &[gate, up, &out], numbers, eps: None, grid: (tokens, width.div_ceil(THREADS as usize)), threads: THREADS }.run()?;
    Ok(out)
}

/// hidden + update, [rows, width] each, and the RMS norm of that.
pub(crate) fn add_rms_norm(hidden: &Tensor, update: &Tensor, weight: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let (rows, width) = hidden.dims2()?;
    let (hidden, update) = (hidden.contiguous()?, update.contiguous()?);
    let out = unfilled((2 * rows, width), &hidden)?;
    let threads = (width as u32).next_multiple_of(32).min(4 * THREADS);
    Launch { kernel: "add_rms_norm", tensors: &[&hidden, &update, weight, &out], numbers: &[width as u32], eps: Some(eps), grid: (rows, 1), threads }.run()?;
    Ok((out.narrow(0, 0, rows)?, out.narrow(0, rows, rows)?))
}
