//! The few dense solves that compensation needs, in f64 through faer, on one thread each: results don't depend on the number of threads.

use crate::{Error, Result};
use evop_model::{DType, Device, Tensor};
use faer::linalg::matmul::matmul;
use faer::linalg::solvers::{Llt, Solve};
use faer::{Accum, Mat, Par, Side};

/// A dense f64 matrix.
pub(crate) type Matrix = Mat<f64>;

fn factor(h: &Matrix) -> Result<Llt<f64>> {
    faer::set_global_parallelism(Par::Seq);
    h.llt(Side::Lower).map_err(|_| {
        Error::Activations("the activations' second moments are not positive definite: expected a larger damping, or more calibration tokens".to_string())
    })
}

/// h^-1 b for a symmetric positive definite h.
pub(crate) fn solve_spd(h: &Matrix, b: &Matrix) -> Result<Matrix> {
    let solution = factor(h)?.solve(b);
    finite(solution)
}

/// h^-1 for a symmetric positive definite h.
pub(crate) fn inverse_spd(h: &Matrix) -> Result<Matrix> {
    solve_spd(h, &Matrix::identity(h.nrows(), h.nrows()))
}

fn finite(m: Matrix) -> Result<Matrix> {
    let sum: f64 = (0..m.ncols()).map(|j| m.col(j).iter().sum::<f64>()).sum();
    if sum.is_finite() { Ok(m) } else { Err(Error::Activations("a solve gave numbers that are not finite".to_string())) }
}

/// a b.
pub(crate) fn product(a: &Matrix, b: &Matrix) -> Matrix {
    let mut out = Matrix::zeros(a.nrows(), b.ncols());
    matmul(out.as_mut(), Accum::Replace, a.as_ref(), b.as_ref(), 1.0, Par::Seq);
    out
}

/// The rows `start..start + count` of X^T X, from column `start` on.
pub(crate) fn cross_products(x: &Matrix, start: usize, count: usize) -> Matrix {
    let mut out = Matrix::zeros(count, x.ncols() - start);
    let (left, right) = (x.subcols(start, count), x.subcols(start, x.ncols() - start));
    matmul(out.as_mut(), Accum::Replace, left.transpose(), right, 1.0, Par::Seq);
    out
}

/// Removes inputs `p` from a least squares problem: W -= W_p (H^-1_pp)^-1 H^-1_p, and H^-1 -= H^-1_p^T (H^-1_pp)^-1 H^-1_p.
/// The rows and columns of `p` become zero (their diagonal stays out of use).
pub(crate) fn downdate(inverse: &mut Matrix, w: &mut Matrix, p: &[usize]) -> Result<()> {
    let (size, count) = (inverse.nrows(), p.len());
    let block = Matrix::from_fn(count, count, |i, j| inverse[(p[i], p[j])]);
    let rows = Matrix::from_fn(count, size, |i, j| inverse[(p[i], j)]);
    let solved = solve_spd(&block, &rows)?; // (H^-1_pp)^-1 H^-1_p
    let part = Matrix::from_fn(w.nrows(), count, |o, i| w[(o, p[i])]);
    matmul(w.as_mut(), Accum::Add, part.as_ref(), solved.as_ref(), -1.0, Par::Seq);
    matmul(inverse.as_mut(), Accum::Add, rows.transpose(), solved.as_ref(), -1.0, Par::Seq);
    for i in p {
        w.col_mut(*i).fill(0.0);
        inverse.col_mut(*i).fill(0.0);
        inverse.row_mut(*i).fill(0.0);
    }
    Ok(())
}

/// The orthogonal matrix Q = U V^T nearest to m = U S V^T, and tr(S).
pub(crate) fn nearest_rotation(m: &Matrix) -> Result<(Matrix, f64)> {
    faer::set_global_parallelism(Par::Seq);
    let svd = m.svd().map_err(|_| Error::Activations("the singular value decomposition did not converge".to_string()))?;
    let rotation = product(&svd.U().to_owned(), &svd.V().transpose().to_owned());
    Ok((rotation, svd.S().column_vector().iter().sum()))
}

/// A [rows, columns] tensor widened to f64.
pub(crate) fn from_tensor(tensor: &Tensor) -> Result<Matrix> {
    let rows = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let columns = rows.first().map_or(0, Vec::len);
    Ok(Matrix::from_fn(rows.len(), columns, |i, j| f64::from(rows[i][j])))
}

/// The elements row by row, rounded to f32.
pub(crate) fn to_f32(m: &Matrix) -> Vec<f32> {
    (0..m.nrows()).flat_map(|i| (0..m.ncols()).map(move |j| m[(i, j)] as f32)).collect()
}
