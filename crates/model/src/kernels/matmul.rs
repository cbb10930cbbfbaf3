//! f32 x W^T on the CPU, for one row and for thousands, over whole matrices and over views of them.

use super::dot::{self, ROW_MULTIPLE, RowMajor, TILE_B};
use super::{SharedOut, with_slice};
use crate::Result;
use candle_core::{CpuStorage, Storage, Tensor};
use rayon::prelude::*;

/// Rows of x that are multiplied together stay in the first-level cache (in f32 elements), ...
const X_BLOCK_ELEMENTS: usize = 8 * 1024;
/// ... and the rows of W that a task multiplies them with in the second-level cache, where every block of x finds them again.
const W_PANEL_ELEMENTS: usize = 48 * 1024;
/// Multiply-adds below which splitting over threads costs more than it saves.
const SERIAL_BELOW: usize = 32 * 1024;

/// x [rows, in] times weight [out, in] transposed -> [rows, out].
///
/// `weight` may be a view with longer rows (a narrower width of a wider matrix); its elements in a row must be adjacent.
/// A row of the result depends on that row of `x` alone, bit for bit.
///
/// # Errors
/// [`crate::Error::Candle`] when the shapes don't fit.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (out, k) = weight.dims2()?;
    let rows = x.elem_count() / k.max(1);
    if x.dim(candle_core::D::Minus1)? != k {
        return Err(crate::Error::Input(format!("a linear layer of {k} inputs was given {:?}", x.shape())));
    }
    let strides = weight.stride();
    let weight = if strides[1] == 1 || k == 1 { weight.clone() } else { weight.contiguous()? };
    let stride = weight.stride()[0];
    let mut y = vec![0f32; rows * out];
    let (storage, layout) = weight.storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(w)) = &*storage else {
        return Err(crate::Error::Device("the CPU kernel needs f32 weights".into()));
    };
    let w = &w[layout.start_offset()..];
    assert!(out == 0 || w.len() >= (out - 1) * stride + k, "a view inside its storage");
    with_slice(x, |x| multiply(x, w, stride, rows, out, k, &mut y))?;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = out;
    }
    Ok(Tensor::from_vec(y, shape, x.device())?)
}

fn multiply(x: &[f32], w: &[f32], w_stride: usize, rows: usize, out: usize, k: usize, y: &mut [f32]) {
    let (a, b) = (x.as_ptr() as usize, w.as_ptr() as usize);
    let target = SharedOut(y.as_mut_ptr());
    // a task: a panel of output columns, over blocks of rows
    let block = (X_BLOCK_ELEMENTS / k.max(1) / ROW_MULTIPLE * ROW_MULTIPLE).max(ROW_MULTIPLE);
    let panel_task = |from: usize, to: usize| {
        for start in (0..rows).step_by(block) {
            let count = block.min(rows - start);
            // SAFETY: rows start..start+count of x, rows from..to of w, and the same part of y, which no other task has
            unsafe {
                let a = RowMajor { data: (a as *const f32).add(start * k), stride: k };
                let b = RowMajor { data: (b as *const f32).add(from * w_stride), stride: w_stride };
                dot::block(a, count, b, to - from, k, target.get().add(start * out + from), out);
            }
        }
    };
    let threads = rayon::current_num_threads();
    // one row is read once whatever the panel: then the panels only share out the columns
    let panel = if rows > block { W_PANEL_ELEMENTS / k.max(1) } else { out };
    // a few tasks a thread even out their ends; whole tiles each
    let shared = if threads == 1 || rows * out * k < SERIAL_BELOW { out } else { out.div_ceil(threads * 4) };
    let panel = panel.min(shared).next_multiple_of(TILE_B).max(8 * TILE_B);
    let task = |i: usize| panel_task(i * panel, out.min((i + 1) * panel));
    let tasks = out.div_ceil(panel);
    if shared == out { (0..tasks).for_each(task) } else { (0..tasks).into_par_iter().for_each(task) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    #[test]
    fn a_view_of_a_wider_matrix_gives_what_its_copy_gives() {
        let w = Tensor::randn(0f32, 1.0, (40, 96), &Device::Cpu).unwrap();
        let x = Tensor::randn(0f32, 1.0, (5, 64), &Device::Cpu).unwrap();
        let view = w.narrow(1, 0, 64).unwrap().narrow(0, 3, 20).unwrap();
        let y = linear(&x, &view).unwrap().to_vec2::<f32>().unwrap();
        let copy = linear(&x, &view.contiguous().unwrap()).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(y, copy);
        let reference = x.matmul(&view.t().unwrap()).unwrap().to_vec2::<f32>().unwrap();
        for (a, b) in y.iter().flatten().zip(reference.iter().flatten()) {
            assert!((a - b).abs() < 1e-4);
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_rows_beside_it_nor_on_threads() {
        let w = Tensor::randn(0f32, 1.0, (300, 577), &Device::Cpu).unwrap();
        let x = Tensor::randn(0f32, 1.0, (131, 577), &Device::Cpu).unwrap();
        let all = linear(&x, &w).unwrap().to_vec2::<f32>().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let threaded = pool.install(|| linear(&x, &w).unwrap().to_vec2::<f32>().unwrap());
        assert_eq!(all, threaded);
        for row in [0, 1, 64, 130] {
            let alone = linear(&x.narrow(0, row, 1).unwrap(), &w).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(alone[0], all[row]);
        }
    }
}
