//! Second-order statistics of activations, streamed: what importance and compensation are computed from.

use crate::linalg::{self, Matrix};
use crate::{Error, Result};
use evop_model::{DType, Span, Tensor};
use rayon::prelude::*;

/// Columns of X^T X that are computed together, on one thread: only blocks on and above the diagonal are.
const PANEL: usize = 128;

/// Sums over the rows (tokens) of activations X [tokens, size], all in f64: a product rounded to f32 can leave X^T X indefinite by more than a small
/// ridge repairs, where a few massive activations carry most of its trace.
#[derive(Debug, Clone)]
pub struct Gram {
    /// X^T X, row-major, both triangles.
    pub products: Vec<f64>,
    /// Sum of the rows.
    pub sums: Vec<f64>,
    /// Sum over sequences of the column norms ||x_j||_2 of the sequence (2SSP).
    pub sequence_norms: Vec<f64>,
    /// Rows seen.
    pub rows: usize,
    /// Sequences seen.
    pub sequences: usize,
}

impl Gram {
    /// Nothing seen yet.
    pub fn new(size: usize) -> Self {
        Self { products: vec![0.0; size * size], sums: vec![0.0; size], sequence_norms: vec![0.0; size], rows: 0, sequences: 0 }
    }

    /// Columns.
    pub fn size(&self) -> usize {
        self.sums.len()
    }

    /// Adds packed sequences, x [tokens, size].
    ///
    /// # Errors
    /// [`Error::Activations`] when a value is not finite.
    pub fn add(&mut self, x: &Tensor, spans: &[Span]) -> Result<()> {
        if x.device().is_cpu() {
            self.add_on_host(x, spans)?
        } else {
            self.add_on_device(x, spans)?
        }
        if let Some(column) = self.sums.iter().position(|s| !s.is_finite()) {
            return Err(Error::Activations(format!("channel {column} is not finite")));
        }
        self.rows += spans.iter().map(|s| s.len).sum::<usize>();
        self.sequences += spans.len();
        Ok(())
    }

    fn add_on_host(&mut self, x: &Tensor, spans: &[Span]) -> Result<()> {
        let size = self.size();
        let values = x.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let wide = Matrix::from_fn(values.len(), size, |i, j| f64::from(values[i][j]));
        self.products.par_chunks_mut(PANEL * size).enumerate().for_each(|(panel, rows)| {
            let start = panel * PANEL;
            let block = linalg::cross_products(&wide, start, rows.len() / size);
            for (i, row) in rows.chunks_mut(size).enumerate() {
                for j in i..size - start {
                    row[start + j] += block[(i, j)];
                }
            }
        });
        let mut row = 0;
        for span in spans {
            let mut squares = vec![0f64; size];
            for values in &values[row..row + span.len] {
                for (j, v) in values.iter().enumerate() {
                    let v = f64::from(*v);
                    self.sums[j] += v;
                    squares[j] += v * v;
                }
            }
            self.sequence_norms.iter_mut().zip(squares).for_each(|(norm, square)| *norm += square.sqrt());
            row += span.len;
        }
        Ok(())
    }

    fn add_on_device(&mut self, x: &Tensor, spans: &[Span]) -> Result<()> {
        let x = x.to_dtype(DType::F64)?.contiguous()?;
        add(&mut self.products, &x.t()?.matmul(&x)?)?;
        add(&mut self.sums, &x.sum(0)?)?;
        let mut row = 0;
        for span in spans {
            add(&mut self.sequence_norms, &x.narrow(0, row, span.len)?.sqr()?.sum(0)?.sqrt()?)?;
            row += span.len;
        }
        Ok(())
    }

    /// Copies the upper triangle into the lower one; call once, after the last [`Gram::add`].
    pub fn finish(&mut self) {
        let size = self.size();
        for i in 0..size {
            for j in 0..i {
                self.products[i * size + j] = self.products[j * size + i];
            }
        }
    }

    /// Sum of squares of a column.
    pub fn square(&self, column: usize) -> f64 {
        self.products[column * (self.size() + 1)]
    }

    /// Mean of a column.
    pub fn mean(&self, column: usize) -> f64 {
        self.sums[column] / self.rows.max(1) as f64
    }

    /// Variance of a column.
    pub fn variance(&self, column: usize) -> f64 {
        (self.square(column) / self.rows.max(1) as f64 - self.mean(column).powi(2)).max(0.0)
    }

    /// Mean of the diagonal of X^T X: what dampings are relative to.
    pub fn mean_square(&self) -> f64 {
        (0..self.size()).map(|j| self.square(j)).sum::<f64>() / self.size().max(1) as f64
    }

    /// Bytes held.
    pub fn bytes(size: usize) -> usize {
        (size * size + 2 * size) * size_of::<f64>()
    }
}

/// Sums over the rows of X [tokens, size] and Y [tokens, outputs], in f64.
#[derive(Debug, Clone)]
pub(crate) struct Cross {
    /// X^T Y, row-major.
    pub products: Vec<f64>,
    /// Sum of the rows of Y.
    pub sums: Vec<f64>,
    /// Sum of |y|^2.
    pub energy: f64,
}

impl Cross {
    /// Nothing seen yet.
    pub fn new(size: usize, outputs: usize) -> Self {
        Self { products: vec![0.0; size * outputs], sums: vec![0.0; outputs], energy: 0.0 }
    }

    /// Adds rows.
    pub fn add(&mut self, x: &Tensor, y: &Tensor) -> Result<()> {
        if x.device().is_cpu() {
            self.add_on_host(x, y)?
        } else {
            self.add_on_device(x, y)?
        }
        if !self.energy.is_finite() {
            return Err(Error::Activations("an element is not finite".to_string()));
        }
        Ok(())
    }

    fn add_on_host(&mut self, x: &Tensor, y: &Tensor) -> Result<()> {
        let outputs = self.sums.len();
        let (x, y) = (linalg::from_tensor(x)?, linalg::from_tensor(y)?);
        self.products.par_chunks_mut(PANEL * outputs).enumerate().for_each(|(panel, rows)| {
            let block = linalg::product(&x.subcols(panel * PANEL, rows.len() / outputs).transpose().to_owned(), &y);
            for (i, row) in rows.chunks_mut(outputs).enumerate() {
                row.iter_mut().enumerate().for_each(|(o, sum)| *sum += block[(i, o)]);
            }
        });
        for (o, sum) in self.sums.iter_mut().enumerate() {
            *sum += y.col(o).iter().sum::<f64>();
            self.energy += y.col(o).iter().map(|v| v * v).sum::<f64>();
        }
        Ok(())
    }

    fn add_on_device(&mut self, x: &Tensor, y: &Tensor) -> Result<()> {
        let (x, y) = (x.to_dtype(DType::F64)?.contiguous()?, y.to_dtype(DType::F64)?.contiguous()?);
        add(&mut self.products, &x.t()?.matmul(&y)?)?;
        add(&mut self.sums, &y.sum(0)?)?;
        self.energy += y.sqr()?.sum_all()?.to_scalar::<f64>()?;
        Ok(())
    }

    /// Bytes held.
    pub fn bytes(size: usize, outputs: usize) -> usize {
        (size * outputs + outputs) * size_of::<f64>()
    }
}

/// sums += f64 numbers on a device, row by row.
fn add(sums: &mut [f64], terms: &Tensor) -> Result<()> {
    let terms = terms.flatten_all()?.to_vec1::<f64>()?;
    sums.par_iter_mut().zip(&terms).for_each(|(sum, term)| *sum += term);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;

    #[test]
    fn sums_equal_plain_loops_over_chunks() {
        let x = normal(1, 0.3, 1.0, (10, 300));
        let mut gram = Gram::new(300);
        gram.add(&x.narrow(0, 0, 6).unwrap(), &[Span::prompt(2), Span::prompt(4)]).unwrap();
        gram.add(&x.narrow(0, 6, 4).unwrap(), &[Span::prompt(4)]).unwrap();
        gram.finish();
        let rows = x.to_vec2::<f32>().unwrap();
        for (i, j) in [(0, 0), (3, 270), (270, 3), (299, 299), (257, 12)] {
            let exact: f64 = rows.iter().map(|r| f64::from(r[i]) * f64::from(r[j])).sum();
            assert!((gram.products[i * 300 + j] - exact).abs() < 1e-4);
        }
        let norm = |range: std::ops::Range<usize>| rows[range].iter().map(|r| f64::from(r[7]).powi(2)).sum::<f64>().sqrt();
        assert!((gram.sequence_norms[7] - norm(0..2) - norm(2..6) - norm(6..10)).abs() < 1e-6);
        assert_eq!((gram.rows, gram.sequences), (10, 3));
    }

    #[test]
    fn sums_by_tensor_operations_are_the_same() {
        let (x, y) = (normal(2, 0.3, 1.0, (12, 40)), normal(3, -0.1, 2.0, (12, 7)));
        let spans = [Span::prompt(5), Span::prompt(7)];
        let (mut host, mut device) = (Gram::new(40), Gram::new(40));
        host.add_on_host(&x, &spans).unwrap();
        device.add_on_device(&x, &spans).unwrap();
        host.finish();
        let near = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9);
        assert!(near(&host.products, &device.products) && near(&host.sums, &device.sums) && near(&host.sequence_norms, &device.sequence_norms));
        let (mut host, mut device) = (Cross::new(40, 7), Cross::new(40, 7));
        host.add_on_host(&x, &y).unwrap();
        device.add_on_device(&x, &y).unwrap();
        assert!(near(&host.products, &device.products) && near(&host.sums, &device.sums) && near(&[host.energy], &[device.energy]));
    }
}
