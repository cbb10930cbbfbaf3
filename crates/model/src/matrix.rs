//! Weight matrices as they are held: plain numbers on any device, or 8-bit blocks on the CPU.

use crate::kernels::packed::{self, Format, Line, Product, STEP, Weights};
use crate::kernels::{self, SharedOut, q8, unfilled};
use crate::source::Source;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
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
            Self::Q8_0 => weights.div_ceil(STEP) * (STEP + 2),
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
    Packed(Packed),
}

/// The first rows and columns of a matrix on the CPU, laid out for its products.
#[derive(Clone)]
pub(crate) struct Packed {
    format: Format,
    lines: Arc<Vec<Line>>,
    scales: Arc<Vec<f16>>,
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
        Self { format, lines: Arc::new(lines), scales: Arc::new(scales), row_steps: columns.div_ceil(STEP), rows, columns }
    }

    fn bf16(values: &[bf16], rows: usize, columns: usize) -> Self {
        Self::new(Format::Bf16, kernels::bf16::lay_out(values, rows, columns), Vec::new(), rows, columns)
    }

    /// Rounds rows of `columns` numbers.
    fn q8(values: &[f32], rows: usize, columns: usize) -> Self {
        let block = |row: usize, block: usize| q8::quantize(&values[row * columns..(row + 1) * columns][block * STEP..columns.min((block + 1) * STEP)]);
        let (lines, scales) = q8::lay_out(rows, columns, block);
        Self::new(Format::Q8, lines, scales, rows, columns)
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
        Weights { format: self.format, lines: &self.lines, scales: &self.scales, row_steps: self.row_steps, rows: self.rows }
    }

    /// Some rows as f32, [rows, columns].
    fn select(&self, rows: impl ExactSizeIterator<Item = usize>) -> Result<Tensor> {
        let (weights, count, columns) = (self.weights(), rows.len(), self.columns);
        let values: Vec<f32> = rows.flat_map(|row| (0..columns).map(move |column| weights.at(row, column))).collect();
        Ok(Tensor::from_vec(values, (count, columns), &Device::Cpu)?)
    }
}

impl Matrix {
    /// Loads `name` of shape [rows, columns].
    ///
    /// # Errors
    /// [`Error::Tensor`] for a missing, misshapen or non-finite tensor.
    pub fn load(source: &dyn Source, name: &str, [rows, columns]: [usize; 2], weights: WeightType, device: &Device) -> Result<Self> {
        match weights {
            WeightType::Plain(dtype) => Self::new(source.load(name, &[rows, columns], dtype, device)?),
            WeightType::Q8_0 => {
                if source.shape(name).is_some_and(|shape| shape == [rows, columns])
                    && let Some(bytes) = source.q8_0(name)?
                {
                    return Ok(Self::Packed(Packed::q8_of_gguf(&bytes, rows, columns)));
                }
                Self::of(&source.load(name, &[rows, columns], DType::F32, &Device::Cpu)?, weights)
            }
        }
    }

    /// A matrix of plain numbers in their own type.
    pub fn new(values: Tensor) -> Result<Self> {
        if values.dtype() != DType::BF16 || !values.device().is_cpu() {
            return Ok(Self::Plain(values));
        }
        let (rows, columns) = values.dims2()?;
        Ok(Self::Packed(Packed::bf16(&values.flatten_all()?.to_vec1::<bf16>()?, rows, columns)))
    }

    /// A matrix of plain numbers, held as `weights`.
    pub fn of(values: &Tensor, weights: WeightType) -> Result<Self> {
        match weights {
            WeightType::Plain(dtype) => Self::new(values.to_dtype(dtype)?),
            WeightType::Q8_0 => {
                let (rows, columns) = values.dims2()?;
                Ok(Self::Packed(kernels::with_slice(&values.to_dtype(DType::F32)?, |values| Packed::q8(values, rows, columns))?))
            }
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
                let values = of.select(0..of.rows)?;
                Ok(if of.format == Format::Bf16 { values.to_dtype(DType::BF16)? } else { values })
            }
        }
    }

    /// Some rows as plain numbers, [rows, columns].
    pub fn select_rows(&self, rows: &[u32]) -> Result<Tensor> {
        match self {
            Self::Plain(tensor) => Ok(tensor.index_select(&Tensor::from_slice(rows, rows.len(), tensor.device())?, 0)?),
            Self::Packed(of) => of.select(rows.iter().map(|row| *row as usize)),
        }
    }

    /// Products of x [rows, columns] with several matrices transposed, in one go on the CPU.
    pub fn products<const N: usize>(matrices: [&Self; N], x: &Tensor) -> Result<Vec<Tensor>> {
        let mut plain = Vec::with_capacity(N);
        let mut packed: Vec<&Packed> = Vec::with_capacity(N);
        for matrix in matrices {
            match matrix {
                Self::Plain(tensor) => plain.push(tensor),
                Self::Packed(of) => packed.push(of),
            }
        }
        if packed.is_empty() {
            if x.device().is_cpu() && x.dtype() == DType::F32 {
                return kernels::matmul::linears(x, &plain);
            }
            return plain.iter().map(|w| Ok(x.contiguous()?.matmul(&w.t()?)?)).collect();
        }
        if !plain.is_empty() || packed.iter().any(|of| of.format != packed[0].format) {
            return Err(Error::Input("layers over the same input are held in different types".into()));
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
        let values = Tensor::randn(0f32, 1.0, (37, 96), &Device::Cpu).unwrap();
        let near = |a: &Tensor, b: &Tensor| {
            let flat = |t: &Tensor| t.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap().concat();
            let (a, b) = (flat(a), flat(b));
            assert!(a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 0.02));
        };
        for weights in [WeightType::Q8_0, DType::BF16.into()] {
            let packed = Matrix::of(&values, weights).unwrap();
            near(&packed.tensor().unwrap(), &values);
            near(&packed.select_rows(&[36, 0, 5]).unwrap(), &Matrix::Plain(values.clone()).select_rows(&[36, 0, 5]).unwrap());
            let view = packed.narrow_rows(20).unwrap().narrow_columns(40).unwrap();
            assert_eq!((view.rows(), view.columns()), (20, 40));
            near(&view.tensor().unwrap(), &values.narrow(0, 0, 20).unwrap().narrow(1, 0, 40).unwrap());
            // identity in: a view's columns come out
            let identity = Tensor::eye(40, DType::F32, &Device::Cpu).unwrap();
            let columns = Matrix::products([&view, &view.narrow_rows(3).unwrap()], &identity).unwrap();
            near(&columns[0].t().unwrap().contiguous().unwrap(), &view.tensor().unwrap());
            assert_eq!(columns[1].dims(), [40, 3]);
            assert!(Matrix::products([&packed], &identity).is_err(), "another number of inputs");
            assert!(Matrix::products([&view, &Matrix::Plain(values.narrow(1, 0, 40).unwrap())], &identity).is_err(), "two types");
        }
    }
}
