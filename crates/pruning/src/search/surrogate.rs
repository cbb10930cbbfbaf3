//! A ridge model of the loss over genomes: one weight an option, and one a pair of neighbours that both lose something. It is fitted on
//! all that the search has evaluated and screens offspring before they cost a forward pass.

use crate::Result;
use crate::linalg::{self, Matrix};
use crate::space::{Genome, SearchSpace};

/// Shrinkage of the weights; features are in [0, 1] and losses are centred logarithms.
const RIDGE: f64 = 0.3;

/// Predicts log losses.
pub(super) struct Surrogate {
    /// First feature of each unit.
    offsets: Vec<usize>,
    options: Vec<usize>,
    weights: Vec<f64>,
    mean: f64,
}

impl Surrogate {
    /// Fits a model on genomes and their losses.
    ///
    /// # Errors
    /// [`crate::Error::Activations`] when no loss is a number.
    pub fn fit(space: &SearchSpace, archive: &[(Genome, f64)]) -> Result<Self> {
        let options: Vec<usize> = (0..space.units()).map(|u| space.options(u)).collect();
        let mut offsets = Vec::with_capacity(options.len());
        let mut features = 0;
        for n in &options {
            offsets.push(features);
            features += n - 1;
        }
        features += options.len().saturating_sub(1);
        let usable: Vec<(&Genome, f64)> = archive.iter().filter(|(_, l)| l.is_finite() && *l > 0.0).map(|(g, l)| (g, l.ln())).collect();
        let mean = usable.iter().map(|(_, l)| l).sum::<f64>() / usable.len().max(1) as f64;
        let mut model = Self { offsets, options, weights: vec![0.0; features], mean };
        let mut normal = Matrix::from_fn(features, features, |i, j| if i == j { RIDGE } else { 0.0 });
        let mut right = Matrix::zeros(features, 1);
        for (genome, loss) in usable {
            let active = model.features(genome);
            for (i, x) in &active {
                right[(*i, 0)] += x * (loss - mean);
                for (j, y) in &active {
                    normal[(*i, *j)] += x * y;
                }
            }
        }
        let solution = linalg::solve_spd(&normal, &right)?;
        model.weights = (0..features).map(|i| solution[(i, 0)]).collect();
        Ok(model)
    }

    /// Features that aren't zero.
    fn features(&self, genome: &[u8]) -> Vec<(usize, f64)> {
        let lost = |u: usize| 1.0 - f64::from(genome[u]) / (self.options[u] - 1).max(1) as f64;
        let single = (0..genome.len()).filter(|u| usize::from(genome[*u]) + 1 < self.options[*u]).map(|u| (self.offsets[u] + usize::from(genome[u]), 1.0));
        let first_pair = self.weights.len() - (self.options.len() - 1);
        let pairs = (1..genome.len()).map(|u| (first_pair + u - 1, lost(u - 1) * lost(u))).filter(|(_, x)| *x > 0.0);
        single.chain(pairs).collect()
    }

    /// The predicted logarithm of a genome's loss.
    pub fn predict(&self, genome: &[u8]) -> f64 {
        self.mean + self.features(genome).iter().map(|(i, x)| self.weights[*i] * x).sum::<f64>()
    }
}

/// Spearman's rank correlation: how well predictions order what was then measured.
pub(super) fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    let ranks = |v: &[f64]| {
        let mut order: Vec<usize> = (0..v.len()).collect();
        order.sort_by(|x, y| v[*x].total_cmp(&v[*y]));
        let mut ranks = vec![0.0; v.len()];
        order.iter().enumerate().for_each(|(rank, i)| ranks[*i] = rank as f64);
        ranks
    };
    let n = a.len() as f64;
    if n < 2.0 {
        return 0.0;
    }
    let squares: f64 = ranks(a).iter().zip(ranks(b)).map(|(x, y)| (x - y).powi(2)).sum();
    1.0 - 6.0 * squares / (n * (n * n - 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_correlation_is_one_for_the_same_order_and_minus_one_for_the_reverse() {
        assert_eq!(rank_correlation(&[1.0, 2.0, 5.0], &[0.1, 0.2, 0.3]), 1.0);
        assert_eq!(rank_correlation(&[1.0, 2.0, 5.0], &[3.0, 2.0, 1.0]), -1.0);
    }
}
