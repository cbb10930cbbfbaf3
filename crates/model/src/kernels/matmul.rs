//! x W^T on the CPU in f32, for one row and for thousands, over whole matrices and over views of them.

use super::dot::{self, COLUMN_MULTIPLE, ROW_MULTIPLE, RowMajor};
use super::{SharedOut, team, unfilled, with_adjacent, with_slice};
use crate::Result;
use candle_core::{CpuStorage, Storage, Tensor};

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
/// [`crate::Error::Input`] when the shapes don't fit, [`crate::Error::Device`] for weights that aren't f32 on the CPU.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    linears(x, &[weight])?.pop().ok_or_else(|| crate::Error::Input("a product without a result".into()))
}

/// [`linear`] of several weights over the same x, together: x is prepared once, and all threads work until the last one is done.
///
/// # Errors
/// As [`linear`].
pub fn linears(x: &Tensor, weights: &[&Tensor]) -> Result<Vec<Tensor>> {
    let k = x.dim(candle_core::D::Minus1)?;
    let rows = x.elem_count() / k.max(1);
    let mut matrices = Vec::with_capacity(weights.len());
    for weight in weights {
        let (out, input) = weight.dims2()?;
        if input != k {
            return Err(crate::Error::Input(format!("a linear layer of {input} inputs was given {:?}", x.shape())));
        }
        matrices.push((with_adjacent(weight)?, unfilled(rows * out), out));
    }
    {
        let guards: Vec<_> = matrices.iter().map(|(matrix, ..)| matrix.storage_and_layout()).collect();
        let targets: Vec<_> = matrices.iter().map(|(_, y, out)| (SharedOut(y.as_ptr().cast_mut()), *out)).collect();
        let mut products = Vec::with_capacity(weights.len());
        for ((storage, layout), (y, out)) in guards.iter().zip(targets) {
            let Storage::Cpu(CpuStorage::F32(w)) = &**storage else {
                return Err(crate::Error::Device(format!("the CPU kernel needs f32 weights, not {:?}", weights[0].dtype())));
            };
            let (w, stride) = (&w[layout.start_offset()..], layout.stride()[0]);
            assert!(out == 0 || w.len() >= (out - 1) * stride + k, "a view inside its storage");
            products.push(Product { w, stride, out, y });
        }
        with_slice(x, |x| multiply(x, rows, k, &products))?;
    }
    let mut shape = x.dims().to_vec();
    let of_shape = |(_, y, out): (Tensor, Vec<f32>, usize)| {
        if let Some(last) = shape.last_mut() {
            *last = out;
        }
        Ok(Tensor::from_vec(y, shape.as_slice(), x.device())?)
    };
    matrices.into_iter().map(of_shape).collect()
}

/// A matrix [out, k] to multiply with, its rows `stride` elements apart, and where the result [rows, out] goes.
struct Product<'a> {
    w: &'a [f32],
    stride: usize,
    out: usize,
    y: SharedOut,
}

fn multiply(x: &[f32], rows: usize, k: usize, products: &[Product<'_>]) {
    assert!(x.len() >= rows * k, "whole rows");
    let block = (X_BLOCK_ELEMENTS / k.max(1) / ROW_MULTIPLE * ROW_MULTIPLE).max(ROW_MULTIPLE);
    let outputs: usize = products.iter().map(|p| p.out).sum();
    let serial = rayon::current_num_threads() == 1 || rows * k * outputs < SERIAL_BELOW;
    // one row is read once whatever the panel: then the panels only share out the columns
    let panel = if rows > block { W_PANEL_ELEMENTS / k.max(1) } else { outputs };
    // a few tasks a thread even out their ends; whole tiles each
    let shared = if serial { outputs } else { outputs.div_ceil(rayon::current_num_threads() * 4) };
    let panel = panel.min(shared).next_multiple_of(COLUMN_MULTIPLE).max(COLUMN_MULTIPLE);
    let tasks: Vec<(usize, usize)> = products.iter().enumerate().flat_map(|(i, p)| (0..p.out).step_by(panel).map(move |from| (i, from))).collect();
    let run = |&(i, from): &(usize, usize)| {
        let product = &products[i];
        let to = product.out.min(from + panel);
        for start in (0..rows).step_by(block) {
            let count = block.min(rows - start);
            // SAFETY: rows start..start+count of x, rows from..to of w, and the same part of y, which no other task has
            unsafe {
                let a = RowMajor { data: x.as_ptr().add(start * k), stride: k };
                let b = RowMajor { data: product.w.as_ptr().add(from * product.stride), stride: product.stride };
                dot::block(a, count, b, to - from, k, product.y.get().add(start * product.out + from), product.out);
            }
        }
    };
    if serial { tasks.iter().for_each(run) } else { team::for_each(tasks.len(), |i| run(&tasks[i])) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

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
    fn several_products_together_have_the_bits_of_each_alone() {
        for rows in [1, 5, 90] {
            let x = Tensor::randn(0f32, 1.0, (rows, 64), &Device::Cpu).unwrap();
            let w = |out: usize| Tensor::randn(0f32, 1.0, (out, 64), &Device::Cpu).unwrap();
            let (a, b, c) = (w(300), w(33), w(64));
            let together = linears(&x, &[&a, &b, &c]).unwrap();
            for (y, w) in together.iter().zip([&a, &b, &c]) {
                assert_eq!(y.to_vec2::<f32>().unwrap(), linear(&x, w).unwrap().to_vec2::<f32>().unwrap());
            }
            assert!(linears(&x, &[&a, &b.narrow(1, 0, 32).unwrap()]).is_err(), "another number of inputs");
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
