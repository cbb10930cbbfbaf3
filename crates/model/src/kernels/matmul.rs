//! x W^T on the CPU, for one row and for thousands, over whole matrices and over views of them: f32 x with f32 weights, or with bf16 weights.
//!
//! With bf16 weights x is rounded to bf16 too and products are added up in f32: on AMX tiles where the processor has them, else by the f32
//! kernel over widened rows. The two differ in the order of a sum.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx;
use super::dot::{self, ROW_MULTIPLE, RowMajor, TILE_B};
use super::{SharedOut, unfilled, with_adjacent, with_slice};
use crate::Result;
use candle_core::{CpuStorage, Storage, Tensor};
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
/// [`crate::Error::Input`] when the shapes don't fit, [`crate::Error::Device`] for weights that are neither f32 nor bf16 on the CPU.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    linears(x, &[weight])?.pop().ok_or_else(|| crate::Error::Input("a product without a result".into()))
}

/// [`linear`] of several weights of one type over the same x, together: x is prepared once, and all threads work until the last one is done.
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
        let (mut narrow, mut wide) = (Vec::new(), Vec::new());
        for ((storage, layout), (y, out)) in guards.iter().zip(targets) {
            let (stride, first) = (layout.stride()[0], layout.start_offset());
            match &**storage {
                Storage::Cpu(CpuStorage::BF16(w)) => narrow.push(Product::new(&w[first..], stride, k, out, y)),
                Storage::Cpu(CpuStorage::F32(w)) => wide.push(Product::new(&w[first..], stride, k, out, y)),
                _ => return Err(crate::Error::Device(format!("the CPU kernel needs f32 or bf16 weights, not {:?}", weights[0].dtype()))),
            }
        }
        with_slice(x, |x| {
            if !narrow.is_empty() {
                multiply_bf16(x, rows, k, &narrow);
            }
            if !wide.is_empty() {
                multiply(x, rows, k, &wide);
            }
        })?;
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
struct Product<'a, T> {
    w: &'a [T],
    stride: usize,
    out: usize,
    y: SharedOut,
}

impl<'a, T> Product<'a, T> {
    fn new(w: &'a [T], stride: usize, k: usize, out: usize, y: SharedOut) -> Self {
        assert!(out == 0 || w.len() >= (out - 1) * stride + k, "a view inside its storage");
        Self { w, stride, out, y }
    }
}

/// Runs `task(product, from, to)` over the rows of all products in panels of about `panel` rows, a multiple of `multiple`.
fn each_panel<T: Sync>(products: &[Product<'_, T>], panel: usize, multiple: usize, serial: bool, task: impl Fn(&Product<'_, T>, usize, usize) + Sync) {
    let outputs: usize = products.iter().map(|p| p.out).sum();
    // a few tasks a thread even out their ends
    let shared = if serial { outputs } else { outputs.div_ceil(rayon::current_num_threads() * 4) };
    let panel = panel.min(shared).next_multiple_of(multiple).max(multiple);
    let panels: Vec<(usize, usize)> = products.iter().enumerate().flat_map(|(i, p)| (0..p.out).step_by(panel).map(move |from| (i, from))).collect();
    let run = |&(i, from): &(usize, usize)| task(&products[i], from, products[i].out.min(from + panel));
    if serial || panels.len() == 1 { panels.iter().for_each(run) } else { panels.par_iter().for_each(run) }
}

/// Whether splitting over threads costs more than it saves.
fn is_serial<T>(products: &[Product<'_, T>], rows: usize, k: usize) -> bool {
    rayon::current_num_threads() == 1 || rows * k * products.iter().map(|p| p.out).sum::<usize>() < SERIAL_BELOW
}

fn multiply_bf16(x: &[f32], rows: usize, k: usize, products: &[Product<'_, bf16>]) {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if k.is_multiple_of(amx::DEPTH) && k > 0 && amx::available() {
        return multiply_tiles(x, rows, k, products);
    }
    multiply_widened(x, rows, k, products);
}

/// Weight rows that are widened together, in f32 elements.
const WIDENED_ELEMENTS: usize = 256 * 1024;

fn multiply_widened(x: &[f32], rows: usize, k: usize, products: &[Product<'_, bf16>]) {
    let x: Vec<f32> = x.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
    let panel = (WIDENED_ELEMENTS / k.max(1)).max(TILE_B);
    let mut part = Vec::new();
    for product in products {
        let mut wide = Vec::with_capacity(panel.min(product.out) * k);
        for from in (0..product.out).step_by(panel) {
            let count = panel.min(product.out - from);
            wide.clear();
            (from..from + count).for_each(|row| wide.extend(product.w[row * product.stride..][..k].iter().map(|v| v.to_f32())));
            part.resize(rows * count, 0.0);
            multiply(&x, rows, k, &[Product::new(&wide, k, k, count, SharedOut(part.as_mut_ptr()))]);
            for (row, values) in part.chunks(count).enumerate() {
                // SAFETY: a part of the result that no other thread has
                unsafe { product.y.get().add(row * product.out + from).copy_from_nonoverlapping(values.as_ptr(), count) };
            }
        }
    }
}

/// A task's rows of W stay in the second-level cache (in bf16 elements), where every block of tokens finds them again.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
const W_TILES_ELEMENTS: usize = 256 * 1024;
/// Rows of x from which pairing W pays.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
const MANY_ROWS: usize = 2 * amx::BLOCK;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
thread_local! {
    static X_TILES: std::cell::Cell<amx::Lines> = std::cell::Cell::default();
    static W_TILES: std::cell::Cell<amx::Lines> = std::cell::Cell::default();
}

/// A thread's memory for tiles, taken to be used and put back when it is dropped.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) struct TileMemory {
    lines: amx::Lines,
    place: &'static std::thread::LocalKey<std::cell::Cell<amx::Lines>>,
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
impl TileMemory {
    /// That of activations.
    pub fn activations() -> Self {
        Self { lines: X_TILES.take(), place: &X_TILES }
    }

    /// That of weights.
    pub fn weights() -> Self {
        Self { lines: W_TILES.take(), place: &W_TILES }
    }

    /// Room for so many pairs of bf16; what is in it is of no meaning.
    pub fn pairs(&mut self, len: usize) -> &mut [u32] {
        self.lines.pairs(len)
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
impl Drop for TileMemory {
    fn drop(&mut self) {
        self.place.set(std::mem::take(&mut self.lines));
    }
}

/// x [rows, k] rounded to bf16 in tiles.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) fn tile_activations(x: &[f32], rows: usize, k: usize, paired: bool, tiles: &mut [u32]) {
    let sixteen = amx::BLOCK / 2;
    let tile = |(i, to): (usize, &mut [u32])| amx::tile_activations(x, rows, k, i * sixteen, paired, to);
    let blocks = sixteen * k / 2;
    if rows < MANY_ROWS { tiles.chunks_mut(blocks).enumerate().for_each(tile) } else { tiles.par_chunks_mut(blocks).enumerate().for_each(tile) }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn multiply_tiles(x: &[f32], rows: usize, k: usize, products: &[Product<'_, bf16>]) {
    let many = rows >= MANY_ROWS;
    let mut memory = TileMemory::activations();
    let tiles = memory.pairs(amx::tiled_len(rows, k));
    tile_activations(x, rows, k, !many, tiles);
    let tiles = &*tiles;
    each_panel(products, W_TILES_ELEMENTS / k, amx::BLOCK, is_serial(products, rows, k), |product, from, to| {
        let (w, stride, out) = (product.w, product.stride, product.out);
        let mut memory = TileMemory::weights();
        let paired = memory.pairs(if many { amx::tiled_len(to - from, k) } else { 0 });
        let mut edge = Vec::new();
        // the last rows of a matrix need not be a whole block
        let whole = from + (to - from) / amx::BLOCK * amx::BLOCK;
        if many {
            amx::pair_weights(&w[from * stride..], stride, to - from, k, paired);
        } else if whole < to {
            edge.resize(amx::BLOCK * k, bf16::ZERO);
            (whole..to).for_each(|row| edge[(row - whole) * k..(row - whole + 1) * k].copy_from_slice(&w[row * stride..row * stride + k]));
        }
        let _tiles = amx::Tiles::configure();
        for token in (0..rows).step_by(amx::BLOCK) {
            for first in (from..to).step_by(amx::BLOCK) {
                let (tokens, outputs) = ((rows - token).min(amx::BLOCK), (to - first).min(amx::BLOCK));
                // SAFETY: the tiles are configured; 32 rows of k elements, two blocks from `token`, and the part of y that no other task has
                unsafe {
                    let x = tiles.as_ptr().add(token * k / 2);
                    let y = product.y.get().add(token * out + first);
                    if many {
                        amx::many_tokens(paired.as_ptr().add((first - from) * k / 2), x, k, tokens, outputs, y, out);
                    } else {
                        let (block, stride) = if first < whole { (w[first * stride..].as_ptr(), stride) } else { (edge.as_ptr(), k) };
                        amx::few_tokens(block, stride, x, k, tokens, outputs, y, out);
                    }
                }
            }
        }
    });
}

fn multiply(x: &[f32], rows: usize, k: usize, products: &[Product<'_, f32>]) {
    assert!(x.len() >= rows * k, "whole rows");
    let block = (X_BLOCK_ELEMENTS / k.max(1) / ROW_MULTIPLE * ROW_MULTIPLE).max(ROW_MULTIPLE);
    // one row is read once whatever the panel: then the panels only share out the columns
    let panel = if rows > block { W_PANEL_ELEMENTS / k.max(1) } else { usize::MAX };
    each_panel(products, panel.max(8 * TILE_B), TILE_B, is_serial(products, rows, k), |product, from, to| {
        for start in (0..rows).step_by(block) {
            let count = block.min(rows - start);
            // SAFETY: rows start..start+count of x, rows from..to of w, and the same part of y, which no other task has
            unsafe {
                let a = RowMajor { data: x.as_ptr().add(start * k), stride: k };
                let b = RowMajor { data: product.w.as_ptr().add(from * product.stride), stride: product.stride };
                dot::block(a, count, b, to - from, k, product.y.get().add(start * product.out + from), product.out);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::with_bf16_rows;
    use super::*;
    use candle_core::{DType, Device};

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
            let target = SharedOut(widened.as_mut_ptr());
            let multiply = |x: &[f32], w: &[bf16], stride| multiply_widened(x, rows, k, &[Product::new(w, stride, k, out, target)]);
            with_bf16_rows(&w, |w, stride| with_slice(&x, |x| multiply(x, w, stride))).unwrap().unwrap();
            near(&widened);
            // a row alone, and on other threads, is the same to the bit
            let alone = linear(&x.narrow(0, rows - 1, 1).unwrap(), &w).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(alone[0], y[rows - 1]);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
            assert_eq!(pool.install(|| linear(&x, &w).unwrap().to_vec2::<f32>().unwrap()), y);
        }
    }

    #[test]
    fn several_products_together_have_the_bits_of_each_alone() {
        for (dtype, rows) in [(DType::F32, 5), (DType::BF16, 5), (DType::BF16, 90)] {
            let x = Tensor::randn(0f32, 1.0, (rows, 64), &Device::Cpu).unwrap();
            let w = |out: usize| Tensor::randn(0f32, 1.0, (out, 64), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
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
