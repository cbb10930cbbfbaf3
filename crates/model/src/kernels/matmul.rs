//! x W^T on the CPU, for one row and for thousands, over whole matrices and over views of them: f32 x with f32 weights, or with bf16 weights.
//!
//! With bf16 weights x is rounded to bf16 too and products are added up in f32: on AMX tiles where the processor has them, else by the f32
//! kernel over widened rows. The two differ in the order of a sum.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx;
use super::dot::{self, ROW_MULTIPLE, RowMajor, TILE_B};
use super::{SharedOut, filled, with_bf16_rows, with_slice};
use crate::Result;
use candle_core::{CpuStorage, DType, Storage, Tensor};
use half::bf16;
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
    if weight.dtype() == DType::BF16 {
        let y = filled(rows * out, |y| {
            with_bf16_rows(weight, |w, stride| {
                assert!(out == 0 || w.len() >= (out - 1) * stride + k, "a view inside its storage");
                with_slice(x, |x| multiply_bf16(x, w, stride, rows, out, k, y))
            })?
        })?;
        return shaped(y, x, out);
    }
    let strides = weight.stride();
    let weight = if strides[1] == 1 || k == 1 { weight.clone() } else { weight.contiguous()? };
    let stride = weight.stride()[0];
    let (storage, layout) = weight.storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(w)) = &*storage else {
        return Err(crate::Error::Device("the CPU kernel needs f32 weights".into()));
    };
    let w = &w[layout.start_offset()..];
    assert!(out == 0 || w.len() >= (out - 1) * stride + k, "a view inside its storage");
    let y = filled(rows * out, |y| with_slice(x, |x| multiply(x, w, stride, rows, out, k, y)))?;
    shaped(y, x, out)
}

/// `y` in x's shape but for the last dimension, which is `out`.
fn shaped(y: Vec<f32>, x: &Tensor, out: usize) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = out;
    }
    Ok(Tensor::from_vec(y, shape, x.device())?)
}

fn multiply_bf16(x: &[f32], w: &[bf16], w_stride: usize, rows: usize, out: usize, k: usize, y: &mut [f32]) {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if k.is_multiple_of(amx::DEPTH) && k > 0 && amx::available() {
        return multiply_tiles(x, w, w_stride, rows, out, k, y);
    }
    multiply_widened(x, w, w_stride, rows, out, k, y);
}

/// Weight rows that are widened together, in f32 elements.
const WIDENED_ELEMENTS: usize = 256 * 1024;

fn multiply_widened(x: &[f32], w: &[bf16], w_stride: usize, rows: usize, out: usize, k: usize, y: &mut [f32]) {
    let x: Vec<f32> = x.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
    let panel = (WIDENED_ELEMENTS / k.max(1)).max(TILE_B);
    let mut wide = Vec::with_capacity(panel.min(out) * k);
    let mut part = Vec::new();
    for from in (0..out).step_by(panel) {
        let count = panel.min(out - from);
        wide.clear();
        (from..from + count).for_each(|row| wide.extend(w[row * w_stride..row * w_stride + k].iter().map(|v| v.to_f32())));
        part.clear();
        part.resize(rows * count, 0.0);
        multiply(&x, &wide, k, rows, count, k, &mut part);
        for (to, from_part) in y.chunks_mut(out).zip(part.chunks(count)) {
            to[from..from + count].copy_from_slice(from_part);
        }
    }
}

/// A task's rows of W stay in the second-level cache (in bf16 elements), where every block of tokens finds them again.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
const W_TILES_ELEMENTS: usize = 256 * 1024;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn multiply_tiles(x: &[f32], w: &[bf16], w_stride: usize, rows: usize, out: usize, k: usize, y: &mut [f32]) {
    let mut packed = vec![0u32; amx::packed_len(rows, k)];
    let sixteen = amx::BLOCK / 2;
    let pack = |(i, to): (usize, &mut [u32])| amx::pack(x, rows, k, i * sixteen, to);
    let serial = rayon::current_num_threads() == 1 || rows * out * k < SERIAL_BELOW;
    if serial || rows <= amx::BLOCK {
        packed.chunks_mut(sixteen * k / 2).enumerate().for_each(pack);
    } else {
        packed.par_chunks_mut(sixteen * k / 2).enumerate().for_each(pack);
    }
    let shared = if serial { out } else { out.div_ceil(rayon::current_num_threads() * 4) };
    let panel = (W_TILES_ELEMENTS / k).min(shared).next_multiple_of(amx::BLOCK).max(amx::BLOCK);
    let target = SharedOut(y.as_mut_ptr());
    let task = |i: usize| {
        let (from, to) = (i * panel, out.min((i + 1) * panel));
        // the last rows of a matrix need not be a whole block
        let whole = from + (to - from) / amx::BLOCK * amx::BLOCK;
        let mut edge = Vec::new();
        if whole < to {
            edge.resize(amx::BLOCK * k, bf16::ZERO);
            (whole..to).for_each(|row| edge[(row - whole) * k..(row - whole + 1) * k].copy_from_slice(&w[row * w_stride..row * w_stride + k]));
        }
        let _tiles = amx::Tiles::configure();
        for token in (0..rows).step_by(amx::BLOCK) {
            for first in (from..to).step_by(amx::BLOCK) {
                let (block, stride) = if first < whole { (w[first * w_stride..].as_ptr(), w_stride) } else { (edge.as_ptr(), k) };
                // SAFETY: the tiles are configured; 32 rows of k elements from `block`, two packed blocks from `token`, and the part of y that no other
                // task has
                unsafe {
                    let x = packed.as_ptr().add(token * k / 2);
                    let y = target.get().add(token * out + first);
                    amx::block(block, stride, x, k, (rows - token).min(amx::BLOCK), (to - first).min(amx::BLOCK), y, out);
                }
            }
        }
    };
    let tasks = out.div_ceil(panel);
    if serial { (0..tasks).for_each(task) } else { (0..tasks).into_par_iter().for_each(task) }
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
    fn bf16_weights_give_the_products_of_rounded_numbers_with_and_without_tiles() {
        let rounded = |t: &Tensor| t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
        for (rows, out, k) in [(1, 7, 32), (5, 40, 64), (33, 100, 96), (70, 64, 576), (16, 33, 50), (3, 5, 33)] {
            let w = Tensor::randn(0f32, 1.0, (out + 9, k + 32), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
            let w = w.narrow(0, 2, out).unwrap().narrow(1, 0, k).unwrap();
            let x = Tensor::randn(0f32, 1.0, (rows, k), &Device::Cpu).unwrap();
            let exact = rounded(&x).matmul(&w.to_dtype(DType::F32).unwrap().t().unwrap()).unwrap().to_vec2::<f32>().unwrap();
            let near = |y: &[f32]| {
                for (a, b) in y.iter().zip(exact.iter().flatten()) {
                    assert!((a - b).abs() < 1e-5 * (k as f32), "{rows} x {out} x {k}: {a} {b}");
                }
            };
            let y = linear(&x, &w).unwrap().to_vec2::<f32>().unwrap();
            near(&y.concat());
            let mut widened = vec![0.0; rows * out];
            with_bf16_rows(&w, |w, stride| with_slice(&x, |x| multiply_widened(x, w, stride, rows, out, k, &mut widened))).unwrap().unwrap();
            near(&widened);
            // a row alone, and on other threads, is the same to the bit
            let alone = linear(&x.narrow(0, rows - 1, 1).unwrap(), &w).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(alone[0], y[rows - 1]);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
            assert_eq!(pool.install(|| linear(&x, &w).unwrap().to_vec2::<f32>().unwrap()), y);
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
