//! A picture of vectors in a plane: their two principal components.

use crate::linalg::{self, Matrix};

/// Power iterations; a picture needs no more digits.
const ITERATIONS: usize = 60;

/// The coordinates of every vector along the two directions of greatest variance, by orthogonal iteration on the covariance.
pub(crate) fn plane(vectors: &[Vec<f64>]) -> Vec<(f32, f32)> {
    let (rows, width) = (vectors.len(), vectors.first().map_or(0, Vec::len));
    let means: Vec<f64> = (0..width).map(|j| vectors.iter().map(|v| v[j]).sum::<f64>() / rows.max(1) as f64).collect();
    let x = Matrix::from_fn(rows, width, |i, j| vectors[i][j] - means[j]);
    let transposed = x.transpose().to_owned();
    let mut basis = Matrix::from_fn(width, 2, |i, j| if j == 0 { 1.0 } else { (i as f64 * 0.7).sin() + 0.1 });
    for _ in 0..ITERATIONS {
        basis = linalg::product(&transposed, &linalg::product(&x, &basis));
        orthonormalise(&mut basis);
    }
    let coordinates = linalg::product(&x, &basis);
    (0..rows).map(|i| (coordinates[(i, 0)] as f32, coordinates[(i, 1)] as f32)).collect()
}

/// Gram-Schmidt on two columns; a column without length stays zero.
fn orthonormalise(basis: &mut Matrix) {
    let width = basis.nrows();
    let scale = |basis: &mut Matrix, column: usize| {
        let norm = (0..width).map(|i| basis[(i, column)].powi(2)).sum::<f64>().sqrt();
        (0..width).for_each(|i| basis[(i, column)] = if norm > 1e-300 { basis[(i, column)] / norm } else { 0.0 });
    };
    scale(basis, 0);
    let along: f64 = (0..width).map(|i| basis[(i, 0)] * basis[(i, 1)]).sum();
    (0..width).for_each(|i| basis[(i, 1)] -= along * basis[(i, 0)]);
    scale(basis, 1);
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_longest_axis_comes_first_and_blobs_stay_apart() {
        let vectors: Vec<Vec<f64>> = (0..40).map(|i| vec![f64::from(i % 2) * 10.0, f64::from(i % 5) * 0.5, 3.0, f64::from(i) * 0.01]).collect();
        let plane = super::plane(&vectors);
        let spread = |f: fn(&(f32, f32)) -> f32| plane.iter().map(f).fold(f32::NEG_INFINITY, f32::max) - plane.iter().map(f).fold(f32::INFINITY, f32::min);
        assert!(spread(|p| p.0) > 9.0 && spread(|p| p.1) < 3.0 && spread(|p| p.1) > 0.5);
        assert!(super::plane(&[]).is_empty());
    }
}
