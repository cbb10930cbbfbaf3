//! Weight matrices as they are held: plain numbers on any device, or 8-bit blocks on the CPU.

use crate::kernels::{self, SharedOut, q8, unfilled};
use crate::source::Source;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use half::f16;
use std::sync::Arc;

/// What a model's matrices are held in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// Plain numbers.
    Plain(DType),
    /// GGUF's Q8_0 on the CPU: blocks of 32 inputs in 8 bits with a 16-bit scale, multiplied with activations in 8 bits.
    Q8_0,
}

impl From<DType> for WeightType {
    fn from(dtype: DType) -> Self {
        Self::Plain(dtype)
    }
}

impl WeightType {
    /// Its name: `f32`, `bf16`, `q8_0`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plain(dtype) => dtype.as_str(),
            Self::Q8_0 => "q8_0",
        }
    }

    /// Bytes of so many weights.
    pub fn bytes(self, weights: usize) -> usize {
        match self {
            Self::Plain(dtype) => weights * dtype.size_in_bytes(),
            Self::Q8_0 => weights.div_ceil(q8::BLOCK) * (q8::BLOCK + 2),
        }
    }

    /// The plain type, for what changes weights.
    ///
    /// # Errors
    /// [`Error::Device`] for a quantised type.
    pub fn plain(self) -> Result<DType> {
        match self {
            Self::Plain(dtype) => Ok(dtype),
            Self::Q8_0 => Err(Error::Device("weights in q8_0 can be run, not changed: load the model with --dtype f32 or bf16".into())),
        }
    }
}

/// A matrix [rows, columns]; rows are outputs. Cloning and narrowing share the memory.
#[derive(Debug, Clone)]
pub(crate) enum Matrix {
    Plain(Tensor),
    Q8(Quantized),
}

/// The first rows and columns of a matrix in 8-bit blocks.
#[derive(Clone)]
pub(crate) struct Quantized {
    lines: Arc<Vec<q8::Line>>,
    scales: Arc<Vec<f16>>,
    row_blocks: usize,
    rows: usize,
    columns: usize,
}

impl std::fmt::Debug for Quantized {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Quantized({} x {})", self.rows, self.columns)
    }
}

impl Quantized {
    /// Rounds rows of `columns` numbers.
    fn new(values: &[f32], rows: usize, columns: usize) -> Self {
        let block = |row: usize, block: usize| q8::quantize(&values[row * columns..(row + 1) * columns][block * q8::BLOCK..columns.min((block + 1) * q8::BLOCK)]);
        Self::laid_out(q8::lay_out(rows, columns, block), rows, columns)
    }

    /// Blocks as a GGUF has them: a 16-bit scale and 32 numbers each.
    fn from_gguf(bytes: &[u8], rows: usize, columns: usize) -> Self {
        let row_blocks = columns / q8::BLOCK;
        let block = |row: usize, block: usize| {
            let bytes = &bytes[(row * row_blocks + block) * (q8::BLOCK + 2)..][..q8::BLOCK + 2];
            (f16::from_le_bytes([bytes[0], bytes[1]]), std::array::from_fn(|i| bytes[2 + i].cast_signed()))
        };
        Self::laid_out(q8::lay_out(rows, columns, block), rows, columns)
    }

    fn laid_out((lines, scales): (Vec<q8::Line>, Vec<f16>), rows: usize, columns: usize) -> Self {
        Self { lines: Arc::new(lines), scales: Arc::new(scales), row_blocks: columns.div_ceil(q8::BLOCK), rows, columns }
    }

    fn weights(&self) -> q8::Weights<'_> {
        q8::Weights { lines: &self.lines, scales: &self.scales, row_blocks: self.row_blocks, rows: self.rows }
    }

    /// Some rows as f32, [rows, columns].
    fn select(&self, rows: impl ExactSizeIterator<Item = usize>) -> Result<Tensor> {
        let (weights, count) = (self.weights(), rows.len());
        let value = |row: usize, column: usize| {
            let (number, scale) = weights.at(row, column);
            f32::from(number) * scale.to_f32()
        };
        let values: Vec<f32> = rows.flat_map(|row| (0..self.columns).map(move |column| value(row, column))).collect();
        Ok(Tensor::from_vec(values, (count, self.columns), &Device::Cpu)?)
    }
}

impl Matrix {
    /// Loads `name` of shape [rows, columns].
    ///
    /// # Errors
    /// [`Error::Tensor`] for a missing, misshapen or non-finite tensor.
    pub fn load(source: &dyn Source, name: &str, [rows, columns]: [usize; 2], weights: WeightType, device: &Device) -> Result<Self> {
        match weights {
            WeightType::Plain(dtype) => Ok(Self::Plain(source.load(name, &[rows, columns], dtype, device)?)),
            WeightType::Q8_0 => {
                if source.shape(name).is_some_and(|shape| shape == [rows, columns])
                    && let Some(bytes) = source.q8_0(name)?
                {
                    return Ok(Self::Q8(Quantized::from_gguf(&bytes, rows, columns)));
                }
                Self::of(&source.load(name, &[rows, columns], DType::F32, &Device::Cpu)?, weights)
            }
        }
    }

    /// A matrix of plain numbers, held as `weights`.
    pub fn of(values: &Tensor, weights: WeightType) -> Result<Self> {
        match weights {
            WeightType::Plain(dtype) => Ok(Self::Plain(values.to_dtype(dtype)?)),
            WeightType::Q8_0 => {
                let (rows, columns) = values.dims2()?;
                Ok(Self::Q8(kernels::with_slice(&values.to_dtype(DType::F32)?, |values| Quantized::new(values, rows, columns))?))
            }
        }
    }

    pub fn rows(&self) -> usize {
        match self {
            Self::Plain(tensor) => tensor.dims()[0],
            Self::Q8(of) => of.rows,
        }
    }

    pub fn columns(&self) -> usize {
        match self {
            Self::Plain(tensor) => tensor.dims()[1],
            Self::Q8(of) => of.columns,
        }
    }

    /// The first rows, as a view.
    pub fn narrow_rows(&self, rows: usize) -> Result<Self> {
        Ok(match self {
            Self::Plain(tensor) => Self::Plain(tensor.narrow(0, 0, rows)?),
            Self::Q8(of) => Self::Q8(Quantized { rows, ..of.clone() }),
        })
    }

    /// The first columns, as a view; a copy where the device's products take whole matrices only.
    pub fn narrow_columns(&self, columns: usize) -> Result<Self> {
        Ok(match self {
            Self::Plain(tensor) => {
                let view = tensor.narrow(1, 0, columns)?;
                Self::Plain(if view.device().is_cpu() { view } else { view.contiguous()? })
            }
            Self::Q8(of) => Self::Q8(Quantized { columns, ..of.clone() }),
        })
    }

    /// Plain numbers: the matrix itself, or f32 for a quantised one.
    pub fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Plain(tensor) => Ok(tensor.clone()),
            Self::Q8(of) => of.select(0..of.rows),
        }
    }

    /// Some rows as plain numbers, [rows, columns].
    pub fn select_rows(&self, rows: &[u32]) -> Result<Tensor> {
        match self {
            Self::Plain(tensor) => Ok(tensor.index_select(&Tensor::from_slice(rows, rows.len(), tensor.device())?, 0)?),
            Self::Q8(of) => of.select(rows.iter().map(|row| *row as usize)),
        }
    }

    /// Products of x [rows, columns] with several matrices transposed, in one go on the CPU.
    pub fn products<const N: usize>(matrices: [&Self; N], x: &Tensor) -> Result<Vec<Tensor>> {
        let mut plain = Vec::with_capacity(N);
        let mut quantized = Vec::with_capacity(N);
        for matrix in matrices {
            match matrix {
                Self::Plain(tensor) => plain.push(tensor),
                Self::Q8(of) => quantized.push(of),
            }
        }
        if quantized.is_empty() {
            if x.device().is_cpu() && x.dtype() == DType::F32 {
                return kernels::matmul::linears(x, &plain);
            }
            return plain.iter().map(|w| Ok(x.contiguous()?.matmul(&w.t()?)?)).collect();
        }
        if !plain.is_empty() {
            return Err(Error::Input("layers over the same input are held in different types".into()));
        }
        let k = x.dim(candle_core::D::Minus1)?;
        let tokens = x.elem_count() / k.max(1);
        if let Some(other) = quantized.iter().find(|of| of.columns != k) {
            return Err(Error::Input(format!("a linear layer of {} inputs was given {:?}", other.columns, x.shape())));
        }
        let mut results: Vec<Vec<f32>> = quantized.iter().map(|of| unfilled(tokens * of.rows)).collect();
        let products: Vec<q8::Product<'_>> =
            quantized.iter().zip(&mut results).map(|(of, y)| q8::Product { weights: of.weights(), y: SharedOut(y.as_mut_ptr()) }).collect();
        kernels::with_slice(x, |x| q8::multiply(x, tokens, k, &products))?;
        let mut shape = x.dims().to_vec();
        let of_shape = |(of, y): (&Quantized, Vec<f32>)| {
            if let Some(last) = shape.last_mut() {
                *last = of.rows;
            }
            Ok(Tensor::from_vec(y, shape.as_slice(), x.device())?)
        };
        quantized.into_iter().zip(results).map(of_shape).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantised_rows_and_views_are_near_the_plain_ones() {
        let values = Tensor::randn(0f32, 1.0, (37, 96), &Device::Cpu).unwrap();
        let flat = values.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let quantized = Matrix::Q8(Quantized::new(&flat, 37, 96));
        let near = |a: &Tensor, b: &Tensor| {
            let (a, b) = (a.to_vec2::<f32>().unwrap().concat(), b.to_vec2::<f32>().unwrap().concat());
            assert!(a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 0.02));
        };
        near(&quantized.tensor().unwrap(), &values);
        near(&quantized.select_rows(&[36, 0, 5]).unwrap(), &Matrix::Plain(values.clone()).select_rows(&[36, 0, 5]).unwrap());
        let view = quantized.narrow_rows(20).unwrap().narrow_columns(40).unwrap();
        assert_eq!((view.rows(), view.columns()), (20, 40));
        near(&view.tensor().unwrap(), &values.narrow(0, 0, 20).unwrap().narrow(1, 0, 40).unwrap());
        // identity in: a view's columns come out
        let identity = Tensor::eye(40, DType::F32, &Device::Cpu).unwrap();
        let columns = Matrix::products([&view, &view.narrow_rows(3).unwrap()], &identity).unwrap();
        near(&columns[0].t().unwrap().contiguous().unwrap(), &view.tensor().unwrap());
        assert_eq!(columns[1].dims(), [40, 3]);
        assert!(Matrix::products([&quantized], &identity).is_err(), "another number of inputs");
    }
}
