//! Weight matrices as they are held: plain numbers on any device, or laid out for their products on the CPU.

use crate::held::Held;
use crate::kernels::ggml::BlockType;
use crate::kernels::packed::{self, Format, Line, Product, STEP, Weights};
use crate::kernels::{self, SharedOut, block_layout, q8, unfilled};
use crate::source::Source;
use crate::{Error, Result};
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

/// A matrix [rows, columns]; rows are outputs. Cloning and narrowing share the memory.
#[derive(Debug, Clone)]
pub(crate) enum Matrix {
    Plain(Tensor),
    Packed(Packed),
}

/// The first rows and columns of a matrix on the CPU, laid out for its products.
#[derive(Clone)]
pub(crate) struct Packed {
    format: Format,
    lines: Arc<Vec<Line>>,
    scales: Arc<Vec<f16>>,
    parts: Arc<Vec<u8>>,
    row_steps: usize,
    rows: usize,
    columns: usize,
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}({} x {})", self.format, self.rows, self.columns)
    }
}

impl Packed {
    fn new(format: Format, lines: Vec<Line>, scales: Vec<f16>, rows: usize, columns: usize) -> Self {
        let (lines, scales, parts) = (Arc::new(lines), Arc::new(scales), Arc::default());
        Self { format, lines, scales, parts, row_steps: columns.div_ceil(STEP), rows, columns }
    }

    /// Blocks in ggml's bytes.
    fn blocks(of: BlockType, bytes: &[u8], rows: usize, columns: usize) -> Self {
        let laid = block_layout::lay_out(of, bytes, rows, columns);
        Self { parts: Arc::new(laid.parts), ..Self::new(Format::Blocks(of), laid.lines, laid.scales, rows, columns) }
    }

    /// Lays out numbers of shape [rows, columns] that are rounded to what holds them. `read` gives them from an index on, a row at a time or less, so that
    /// they are nowhere as a whole besides.
    fn of(held: Held, rows: usize, columns: usize, read: impl Fn(usize, &mut [f32]) + Sync) -> Result<Self> {
        let own = |format, lines| Self::new(format, lines, Vec::new(), rows, columns);
        match held {
            Held::Plain(DType::BF16) => Ok(own(Format::Bf16, kernels::bf16::lay_out(rows, columns, read))),
            Held::Plain(_) => Ok(own(Format::F16, kernels::f16::lay_out(rows, columns, read))),
            Held::Q8_0 => {
                let block = |row: usize, block: usize| {
                    let mut values = [0f32; STEP];
                    let values = &mut values[..STEP.min(columns - block * STEP)];
                    read(row * columns + block * STEP, values);
                    q8::quantize(values)
                };
                let (lines, scales) = q8::lay_out(rows, columns, block);
                Ok(Self::new(Format::Q8, lines, scales, rows, columns))
            }
            Held::Blocks(of) => {
                const ROWS: usize = 256;
                let some_rows = |from: usize| -> Result<Vec<u8>> {
                    let rows = ROWS.min(rows - from);
                    let mut values = vec![0.0; rows * columns];
                    read(from * columns, &mut values);
                    Ok(QTensor::quantize(&Tensor::from_vec(values, (rows, columns), &Device::Cpu)?, of.ggml())?.data()?.into_owned())
                };
                let bytes = (0..rows).step_by(ROWS).map(some_rows).collect::<Result<Vec<_>>>()?.concat();
                Ok(Self::blocks(of, &bytes, rows, columns))
            }
        }
    }

    /// Blocks as a GGUF has them: a 16-bit scale and 32 numbers each.
    fn q8_of_gguf(bytes: &[u8], rows: usize, columns: usize) -> Self {
        let row_blocks = columns / STEP;
        let block = |row: usize, block: usize| {
            let bytes = &bytes[(row * row_blocks + block) * (STEP + 2)..][..STEP + 2];
            (f16::from_le_bytes([bytes[0], bytes[1]]), std::array::from_fn(|i| bytes[2 + i].cast_signed()))
        };
        let (lines, scales) = q8::lay_out(rows, columns, block);
        Self::new(Format::Q8, lines, scales, rows, columns)
    }

    /// What the kernels read.
    pub fn weights(&self) -> Weights<'_> {
        Weights { format: self.format, lines: &self.lines, scales: &self.scales, parts: &self.parts, row_steps: self.row_steps, rows: self.rows }
    }

    /// Some rows as plain numbers, [rows, columns].
    fn select<T: WithDType>(&self, rows: impl ExactSizeIterator<Item = usize>, of: impl Fn(f32) -> T) -> Result<Tensor> {
        let (weights, shape) = (self.weights(), (rows.len(), self.columns));
        let mut values = Vec::with_capacity(shape.0 * shape.1);
        rows.for_each(|row| values.extend((0..shape.1).map(|column| of(weights.at(row, column)))));
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}

impl Matrix {
    /// Loads `name` of shape [rows, columns].
    ///
    /// # Errors
    /// [`Error::Tensor`] for a missing, misshapen or non-finite tensor.
    pub fn load(source: &dyn Source, name: &str, [rows, columns]: [usize; 2], held: Held, device: &Device) -> Result<Self> {
        match held {
            Held::Plain(dtype) if dtype == DType::F32 || !device.is_cpu() => return Ok(Self::Plain(source.load(name, &[rows, columns], dtype, device)?)),
            _ => {}
        }
        if source.shape(name).is_none_or(|shape| shape != [rows, columns]) || source.block_type(name)? != Some(held) {
            let raw = source.checked(name, &[rows, columns])?;
            return Ok(Self::Packed(Packed::of(held, rows, columns, |from, to| raw.read(from, to))?));
        }
        let bytes = source.blocks(name)?;
        let packed = match held {
            Held::Blocks(of) => Packed::blocks(of, &bytes, rows, columns),
            _ => Packed::q8_of_gguf(&bytes, rows, columns),
        };
        match packed.scales.iter().find(|scale| !scale.is_finite()) {
            Some(scale) => Err(source.mismatch(name, "finite scales", &format!("{scale}: the weights are damaged"))),
            None => Ok(Self::Packed(packed)),
        }
    }

    /// A matrix of plain numbers in their own type.
    pub fn new(values: Tensor) -> Result<Self> {
        if values.device().is_cpu() && matches!(values.dtype(), DType::BF16 | DType::F16) {
            Self::of(&values, Held::Plain(values.dtype()))
        } else {
            Ok(Self::Plain(values))
        }
    }

    /// A matrix of plain numbers, held otherwise.
    pub fn of(values: &Tensor, held: Held) -> Result<Self> {
        let (rows, columns) = values.dims2()?;
        match held {
            Held::Plain(dtype) if dtype == DType::F32 || !values.device().is_cpu() => Ok(Self::Plain(values.to_dtype(dtype)?)),
            _ => {
                let values = values.to_dtype(DType::F32)?;
                let read = |values: &[f32]| Packed::of(held, rows, columns, |from, to| to.copy_from_slice(&values[from..from + to.len()]));
                Ok(Self::Packed(kernels::with_slice(&values, read)??))
            }
        }
    }

    /// One matrix of the rows of all of them, a copy; `None` where that gains nothing, which is anywhere but on a GPU.
    pub fn joined<const N: usize>(matrices: [&Self; N]) -> Result<Option<Self>> {
        let plain: Vec<&Tensor> = matrices.iter().filter_map(|m| if let Self::Plain(tensor) = m { Some(tensor) } else { None }).collect();
        let alike = plain.len() == N && plain.iter().all(|t| t.device().is_cuda() && t.dtype() == plain[0].dtype());
        if alike { Ok(Some(Self::Plain(Tensor::cat(&plain, 0)?))) } else { Ok(None) }
    }

    /// What it is held in.
    pub fn held(&self) -> Held {
        match self {
            Self::Plain(tensor) => Held::Plain(tensor.dtype()),
            Self::Packed(of) => match of.format {
                Format::Bf16 => Held::Plain(DType::BF16),
                Format::F16 => Held::Plain(DType::F16),
                Format::Q8 => Held::Q8_0,
                Format::Blocks(of) => Held::Blocks(of),
            },
        }
    }

    pub fn rows(&self) -> usize {
        match self {
            Self::Plain(tensor) => tensor.dims()[0],
            Self::Packed(of) => of.rows,
        }
    }

    pub fn columns(&self) -> usize {
        match self {
            Self::Plain(tensor) => tensor.dims()[1],
            Self::Packed(of) => of.columns,
        }
    }

    /// The first rows, as a view.
    pub fn narrow_rows(&self, rows: usize) -> Result<Self> {
        Ok(match self {
            Self::Plain(tensor) => Self::Plain(tensor.narrow(0, 0, rows)?),
            Self::Packed(of) => Self::Packed(Packed { rows, ..of.clone() }),
        })
    }

    /// The first columns, as a view; a copy where the device's products take whole matrices only.
    pub fn narrow_columns(&self, columns: usize) -> Result<Self> {
        Ok(match self {
            Self::Plain(tensor) => {
                let view = tensor.narrow(1, 0, columns)?;
                Self::Plain(if view.device().is_cpu() { view } else { view.contiguous()? })
            }
            Self::Packed(of) => Self::Packed(Packed { columns, ..of.clone() }),
        })
    }

    /// Plain numbers: the matrix itself, or a copy of a laid out one, in f32 if it is quantised.
    pub fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Plain(tensor) => Ok(tensor.clone()),
            Self::Packed(of) => {
                let rows = 0..of.rows;
                // (16-bit numbers come out of f32 as they went in)
                match self.held() {
                    Held::Plain(DType::BF16) => of.select(rows, bf16::from_f32),
                    Held::Plain(DType::F16) => of.select(rows, f16::from_f32),
                    _ => of.select(rows, |value| value),
                }
            }
        }
    }

    /// Rows that lie together, as plain numbers.
    pub fn rows_at(&self, rows: Range<usize>) -> Result<Tensor> {
        match self {
            Self::Plain(tensor) => Ok(tensor.narrow(0, rows.start, rows.len())?),
            Self::Packed(of) => of.select(rows, |value| value),
        }
    }

    /// Some rows as plain numbers, [rows, columns].
    pub fn select_rows(&self, rows: &[u32]) -> Result<Tensor> {
        match self {
            Self::Plain(tensor) => Ok(tensor.index_select(&Tensor::from_slice(rows, rows.len(), tensor.device())?, 0)?),
            Self::Packed(of) => of.select(rows.iter().map(|row| *row as usize), |value| value),
        }
    }

    /// Products of x [rows, columns] with several matrices transposed; on the CPU those of one type in one go.
    pub fn products<const N: usize>(matrices: [&Self; N], x: &Tensor) -> Result<Vec<Tensor>> {
        let mut results: [Option<Tensor>; N] = [const { None }; N];
        for first in 0..N {
            if results[first].is_some() {
                continue;
            }
            let alike: Vec<usize> = (first..N).filter(|i| matrices[*i].held() == matrices[first].held()).collect();
            let of: Vec<&Self> = alike.iter().map(|i| matrices[*i]).collect();
            for (i, y) in alike.into_iter().zip(Self::products_alike(&of, x)?) {
                results[i] = Some(y);
            }
        }
        Ok(results.into_iter().flatten().collect())
    }

    /// Products with matrices that are held in the same type.
    fn products_alike(matrices: &[&Self], x: &Tensor) -> Result<Vec<Tensor>> {
        let plain: Vec<&Tensor> = matrices.iter().filter_map(|matrix| if let Self::Plain(tensor) = matrix { Some(tensor) } else { None }).collect();
        let packed: Vec<&Packed> = matrices.iter().filter_map(|matrix| if let Self::Packed(of) = matrix { Some(of) } else { None }).collect();
        if packed.is_empty() {
            if x.device().is_cpu() && x.dtype() == DType::F32 {
                return kernels::matmul::linears(x, &plain);
            }
            return plain.iter().map(|w| Ok(x.contiguous()?.matmul(&w.t()?)?)).collect();
        }
        let k = x.dim(candle_core::D::Minus1)?;
        let tokens = x.elem_count() / k.max(1);
        if let Some(other) = packed.iter().find(|of| of.columns != k) {
            return Err(Error::Input(format!("a linear layer of {} inputs was given {:?}", other.columns, x.shape())));
        }
        let mut results: Vec<Vec<f32>> = packed.iter().map(|of| unfilled(tokens * of.rows)).collect();
        let products: Vec<Product<'_>> =
            packed.iter().zip(&mut results).map(|(of, y)| Product { weights: of.weights(), y: SharedOut(y.as_mut_ptr()) }).collect();
        kernels::with_slice(x, |x| packed::multiply(x, tokens, k, &products))?;
        let mut shape = x.dims().to_vec();
        let of_shape = |(of, y): (&Packed, Vec<f32>)| {
            if let Some(last) = shape.last_mut() {
                *last = of.rows;
            }
            Ok(Tensor::from_vec(y, shape.as_slice(), x.device())?)
        };
        packed.into_iter().zip(results).map(of_shape).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_rows_and_views_are_near_the_plain_ones() {
        let values = Tensor::randn(0f32, 1.0, (37, 512), &Device::Cpu).unwrap();
        let near = |a: &Tensor, b: &Tensor, within: f32| {
            let flat = |t: &Tensor| t.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap().concat();
            let (a, b) = (flat(a), flat(b));
            assert!(a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| (a - b).abs() < within));
        };
        let plain = [(DType::BF16, 0.02), (DType::F16, 0.002)].map(|(dtype, within)| (Held::Plain(dtype), within));
        let blocks = BlockType::ALL.map(|of| (Held::Blocks(of), 8.0 / f32::powi(2.0, of.layout().bits as i32)));
        for (held, within) in plain.into_iter().chain([(Held::Q8_0, 0.03)]).chain(blocks) {
            let packed = Matrix::of(&values, held).unwrap();
            assert_eq!(packed.held(), held);
            near(&packed.tensor().unwrap(), &values, within);
            near(&packed.select_rows(&[36, 0, 5]).unwrap(), &Matrix::Plain(values.clone()).select_rows(&[36, 0, 5]).unwrap(), within);
            let view = packed.narrow_rows(20).unwrap().narrow_columns(40).unwrap();
            assert_eq!((view.rows(), view.columns()), (20, 40));
            near(&view.tensor().unwrap(), &values.narrow(0, 0, 20).unwrap().narrow(1, 0, 40).unwrap(), within);
            // identity in: a view's columns come out
            let identity = Tensor::eye(40, DType::F32, &Device::Cpu).unwrap();
            let columns = Matrix::products([&view, &view.narrow_rows(3).unwrap()], &identity).unwrap();
            near(&columns[0].t().unwrap().contiguous().unwrap(), &view.tensor().unwrap(), 1e-3);
            assert_eq!(columns[1].dims(), [40, 3]);
            assert!(Matrix::products([&packed], &identity).is_err(), "another number of inputs");
        }
    }

    #[test]
    fn matrices_of_several_types_over_one_input_have_the_results_that_each_has_alone() {
        let x = Tensor::randn(0f32, 1.0, (3, 256), &Device::Cpu).unwrap();
        let of = |rows: usize, held| Matrix::of(&Tensor::randn(0f32, 1.0, (rows, 256), &Device::Cpu).unwrap(), held).unwrap();
        let (a, b, c) = (of(20, Held::Blocks(BlockType::Q4K)), of(7, Held::Blocks(BlockType::Q6K)), of(33, Held::Blocks(BlockType::Q4K)));
        let (d, e) = (of(5, Held::Plain(DType::F32)), of(9, Held::Q8_0));
        let together = Matrix::products([&a, &b, &c, &d, &e], &x).unwrap();
        for (y, matrix) in together.iter().zip([&a, &b, &c, &d, &e]) {
            let alone = Matrix::products([matrix], &x).unwrap();
            assert_eq!(y.to_vec2::<f32>().unwrap(), alone[0].to_vec2::<f32>().unwrap());
        }
    }
}
